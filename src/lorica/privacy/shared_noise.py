"""Noise shared by the members of a secure sum: each adds a part of it, and the noise of all protects every record.

The server sees only `Σ_k w_k ĝ_k`, so a record is protected by the noise of all members. An adversary is the server
together with at most `t` members, who know their own noise. If a sum has at least `m` members, at least `m - t` honest
ones add noise that the adversary does not know.

Calibration. `σ_k` is client k's noise multiplier for its sampling rate, its steps and the target ε, `τ_k = σ_k C / b`,
and `R ≥ max_k w_k τ_k`. Client j adds noise of standard deviation `R / (w_j √(m - t))` to its mean gradient, so the
noise of any `m - t` honest members in the sum has at least the standard deviation `R`. One record of client k moves the
sum by at most `w_k C / b`: it is protected by a Gaussian mechanism with a noise multiplier of at least `σ_k`. With
`w_k ∝ 1/τ_k`, nobody adds more than its own part, `τ_j / √(m - t)`.

Two conditions make the sum of the replies a function of the noisy sum alone:

* A reply is linear in the noisy gradient, with the same map for all members: one step of SGD. After two steps, the
  second gradient would depend on a first one that too little noise protects.
* A summand is rounded to a grid `g ≤ s/16`, where `s` is the standard deviation of a member's noise in the sum, and is
  clipped with negligible probability. By Poisson's summation formula the rounded sum then has the distribution of the
  noisy sum plus independent rounding errors, up to terms of `exp(-2π² s²/g²)`.

Neighbours: the distributed discrete Gaussian (arXiv 2102.06387) and the Skellam mechanism (arXiv 2110.04995), which
share discrete noise between all clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorica.config import ExperimentConfig
from lorica.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lorica.privacy.mechanism import Terms

GRID = 16
"""The rounding grid of a sum is at most `s / GRID`."""
TAIL = 10.0
"""Standard deviations of noise that a summand's bound covers; a Gaussian exceeds them with probability 1.5e-23."""


@dataclass(frozen=True)
class SharedNoise:
    """How a client shares its noise with the other members of a secure sum.

    Attributes:
        noise_multiplier: `σ_k`, the noise multiplier of the sum for this client's records.
        min_clients: `m`, minimum number of members of a sum.
        colluding: `t`, maximum number of members that collude with the server.
    """

    noise_multiplier: float
    min_clients: int
    colluding: int

    @property
    def own_noise_multiplier(self) -> float:
        """`σ_k / √(m - t)`: the least noise multiplier of the client's own noise."""
        return self.noise_multiplier / math.sqrt(self.min_clients - self.colluding)


def own_noise_std(noise_in_sum: float, weight: float, min_clients: int, colluding: int) -> float:
    """`R / (w √(m - t))`: standard deviation of the noise on one member's mean gradient.

    >>> own_noise_std(0.5, weight=0.25, min_clients=5, colluding=1)
    1.0
    """
    return noise_in_sum / (weight * math.sqrt(min_clients - colluding))


def summand_limits(
    terms: Terms, weight: float, rates: Mapping[str, float], weight_decay: float, adapter: Mapping[str, Tensor]
) -> tuple[float, float]:
    """What one member's summand requires of the sum.

    Args:
        rates: learning rate `η` of each trained tensor.
        adapter: all global tensors `θ`.

    Returns:
        `w max η (C/q + 10 s + λ max |θ|)`, which no coordinate exceeds for a batch of any size, and
        `w min η s / 16`, the coarsest grid.
    """
    drift = weight_decay * max(float(adapter[name].abs().max()) for name in rates)
    largest = terms.clip_norm / terms.sampling_rate + TAIL * terms.noise_std + drift
    return weight * max(rates.values()) * largest, weight * min(rates.values()) * terms.noise_std / GRID


def shares_noise(config: ExperimentConfig) -> bool:
    """Whether the owners share the noise."""
    return config.privacy.private and config.privacy.noise_against == "sums"


def check_shared(config: ExperimentConfig) -> None:
    """Check that the noise of an experiment can be shared, if it is to be.

    Raises:
        UserError: no secure sums, no minimum number of clients, more than one local step, an optimiser that is not
            linear, or a component that changes the noisy gradient.
    """
    if not shares_noise(config):
        return
    federation, colluding = config.federation, config.privacy.colluding
    if not federation.secure_sum:
        raise UserError(
            "privacy.noise_against",
            "sums",
            "without secure sums the server sees single replies, which shared noise does not protect",
            "set federation.secure_sum=true",
        )
    if federation.min_clients is None:
        raise UserError(
            "federation.min_clients",
            None,
            "with privacy.noise_against = sums, each owner's noise depends on the smallest number of owners in a sum",
            f"set federation.min_clients to at most {federation.participants}, the number of clients in a round",
        )
    if federation.min_clients - colluding < 2:
        raise UserError(
            "privacy.colluding",
            colluding,
            f"in a sum over federation.min_clients = {federation.min_clients} owners, fewer than two honest ones would "
            "be left to share the noise",
            f"raise federation.min_clients to at least {colluding + 2}, or set privacy.noise_against=replies",
        )
    linear = "a reply must be linear in the noisy gradient, or the noise of the others does not protect it"
    clashes = [
        (
            "federation.local_steps",
            federation.local_steps,
            federation.local_steps != 1,
            "after the first step, gradients would depend on one that too little noise protects",
            "set federation.local_steps=1, and raise federation.batch_size or federation.rounds instead",
        ),
        ("optimizer.name", config.optimizer.name, config.optimizer.name != "sgd", linear, "set optimizer.name=sgd"),
        ("local.scaled_gd", True, config.local.scaled_gd, linear, "remove local.scaled_gd"),
        ("local.fedprox", config.local.fedprox, config.local.fedprox > 0, linear, "remove local.fedprox"),
    ]
    for key, value, on, reason, remedy in clashes:
        if on:
            raise UserError(key, value, f"not supported with privacy.noise_against = sums: {reason}", remedy)
