"""What an attack found, always beside the claim and a control: the same attack where there is nearly no noise."""

from __future__ import annotations

from typing import Any

from lorica.audit.estimators import CONFIDENCE, Scores, best_plans, fdp_bound, one_run_bound, plans_of
from lorica.config import PrivacyConfig
from lorica.privacy.accounting import Steps

NEARLY_NO_NOISE = 1e-3
"""Noise multiplier of a control. It is not zero, so that the control takes the same path through the code."""


def nearly_without_noise(privacy: PrivacyConfig) -> PrivacyConfig:
    """The terms of a control."""
    return privacy.model_copy(update={"epsilon": None, "noise_multiplier": NEARLY_NO_NOISE})


def findings(scores: Scores, control: Scores, claimed: float, steps: Steps, delta: float) -> dict[str, Any]:
    """Lower bounds on ε, AUC and TPR of an attack and of its control, JSON-able.

    `has_power` says whether the control refutes the claim. If it does not, the attack could not have refuted the claim
    whatever the noise, and its other figures say nothing.

    Args:
        claimed: ε at `delta`.
        steps: the claimed mechanism.
    """
    for_one_run, for_fdp = best_plans(len(scores), steps, delta)
    largest = one_run_bound(control, delta, plans_of(len(control), steps.sampling_rate < 1)[0])
    return {
        "confidence": CONFIDENCE,
        "epsilon_one_run": one_run_bound(scores, delta, for_one_run),
        "epsilon_fdp": fdp_bound(scores, steps, delta, for_fdp),
        "auc": scores.auc(),
        "tpr_at_1_percent_fpr": scores.tpr_at_fpr(),
        "control": {
            "epsilon_one_run": largest,
            "auc": control.auc(),
            "tpr_at_1_percent_fpr": control.tpr_at_fpr(),
            "has_power": largest > claimed,
        },
    }
