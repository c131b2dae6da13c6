"""What an owner checks before it adds only its part of the noise (`lorica.privacy.shared_noise`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorica.local.step import LocalStep
from lorica.messages import Request, Training
from lorica.privacy.plan import ClientPlan, Refused
from lorica.privacy.shared_noise import own_noise_std, summand_limits
from lorica.secure_sum.agreement import Agreement

# Relative tolerance for rounding of noise multipliers and weights.
ROUNDING = 1e-9


def check_shared_noise(
    plan: ClientPlan, request: Request, held: Mapping[str, Tensor], agreement: Agreement | None
) -> None:
    """Refuse a request in which the noise of the others would not protect this client's records.

    Args:
        held: all global tensors at the client.
        agreement: the terms of the sum; None if the reply would not be summed.

    Raises:
        Refused: the reply would not be summed, it is not linear in the noisy gradient, or the terms of the sum are not
            those of the plan. The message contains public information only.
    """
    shared, work = plan.shared, request.work
    assert shared is not None
    if agreement is None or agreement.noise is None:
        raise _refused(plan, "the reply would not be part of a sum whose members share the noise")
    if not isinstance(work, Training) or not _is_linear(work):
        raise _refused(plan, "a reply must be one step of plain SGD on all ranks of the shared tensors")
    noise, weight = agreement.noise, agreement.weights[plan.client]
    if (noise.min_clients, noise.colluding) != (shared.min_clients, shared.colluding):
        raise _refused(
            plan,
            f"the sum has min_clients = {noise.min_clients} and colluding = {noise.colluding}, but the plan has "
            f"{shared.min_clients} and {shared.colluding}",
        )
    if noise.work != work.common_digest(held):
        raise _refused(plan, "the members of the sum were told to do other work")
    own = own_noise_std(noise.std, weight, noise.min_clients, noise.colluding)
    if noise.std < weight * plan.noise_std * (1 - ROUNDING):
        needed = weight * plan.noise_std
        raise _refused(plan, f"the noise in the sum is {noise.std:.4g}, but its records need {needed:.4g}")
    if work.terms.noise_std < own * (1 - ROUNDING):
        raise _refused(plan, f"its own noise would be {work.terms.noise_std:.4g}, but its part is {own:.4g}")
    largest, grid = summand_limits(work.terms, weight, work.rates, work.optimizer.weight_decay, held)
    if agreement.setup.bound < largest * (1 - ROUNDING):
        raise _refused(plan, "the bound on its summand is so small that clipping would not be rare")
    if agreement.setup.step > grid:
        raise _refused(plan, "the words of the sum are too short for its noise")


def _is_linear(work: Training) -> bool:
    """Whether the updates are `-η ĝ` plus public values, for every trained tensor."""
    return (
        work.steps == 1
        and work.optimizer.name == "sgd"
        and work.local == LocalStep(perturbation=work.local.perturbation)
        and work.rank is None
        and not work.personal
        and not work.corrections
        and work.sketch_columns is None
        and not work.last_step_energy
    )


def _refused(plan: ClientPlan, problem: str) -> Refused:
    return Refused(f"client {plan.client} shares its noise (privacy.noise_against = sums), but {problem}")
