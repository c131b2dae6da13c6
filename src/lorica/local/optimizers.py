"""Local optimisers, from a noisy gradient to an increment. All of it is post-processing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.adapters.names import is_a, is_b
from lorica.config import OptimizerConfig
from lorica.privacy.released import Released, post_process


class Sgd:
    """`m ← μ m + ĝ + λ θ`, increment `-η m` (the update of `torch.optim.SGD`).

    Args:
        rates: name -> `η`.
        momentum: `μ`.
        weight_decay: `λ`.
    """

    def __init__(self, rates: Mapping[str, float], momentum: float, weight_decay: float) -> None:
        self._rates, self._momentum, self._weight_decay = rates, momentum, weight_decay
        self._velocity: dict[str, Released] = {}

    def step(self, gradients: Mapping[str, Released], parameters: Mapping[str, Tensor]) -> dict[str, Released]:
        """Increments of the trained tensors. `parameters` are public values plus earlier increments."""
        increments = {}
        for name, gradient in gradients.items():
            direction = gradient
            if self._weight_decay:
                direction = post_process(lambda g, name=name: g + self._weight_decay * parameters[name], direction)
            if self._momentum:
                if name in self._velocity:
                    direction = post_process(lambda v, g: self._momentum * v + g, self._velocity[name], direction)
                self._velocity[name] = direction
            increments[name] = post_process(lambda d, name=name: -self._rates[name] * d, direction)
        return increments


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the noisy gradient, with the defaults of `torch.optim.AdamW`.

    Increment `-η (m̂ / (√v̂ + 1e-8) + λ θ)`, `β = (0.9, 0.999)`.
    """

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, rates: Mapping[str, float], weight_decay: float) -> None:
        self._rates, self._weight_decay = rates, weight_decay
        self._first: dict[str, Released] = {}
        self._second: dict[str, Released] = {}
        self._count: dict[str, int] = {}

    def step(self, gradients: Mapping[str, Released], parameters: Mapping[str, Tensor]) -> dict[str, Released]:
        """Increments of the trained tensors. `parameters` are public values plus earlier increments."""
        first_decay, second_decay = self.BETAS
        increments = {}
        for name, gradient in gradients.items():
            # Counted per tensor, because a step may train only some of them.
            count = self._count[name] = self._count.get(name, 0) + 1
            first_scale, second_scale = 1 - first_decay**count, 1 - second_decay**count
            first = self._first.get(name) or post_process(torch.zeros_like, gradient)
            second = self._second.get(name) or post_process(torch.zeros_like, gradient)
            self._first[name] = post_process(lambda m, g: first_decay * m + (1 - first_decay) * g, first, gradient)
            self._second[name] = post_process(
                lambda v, g: second_decay * v + (1 - second_decay) * g**2, second, gradient
            )
            normalised = post_process(
                lambda m, v, f=first_scale, s=second_scale: m / f / ((v / s).sqrt() + self.EPSILON),
                self._first[name],
                self._second[name],
            )
            increments[name] = post_process(
                lambda d, name=name: -self._rates[name] * (d + self._weight_decay * parameters[name]), normalised
            )
        return increments


def make_optimizer(config: OptimizerConfig, rates: Mapping[str, float]) -> Sgd | AdamW:
    """A new instance of the configured optimiser, so that no state is kept between rounds."""
    if config.name == "adamw":
        return AdamW(rates, config.weight_decay)
    return Sgd(rates, config.momentum, config.weight_decay)


def schedule_factor(schedule: str, round_number: int, rounds: int) -> float:
    """What the learning rates of a round are multiplied by; above 0 in every round.

    With the share `p = (t - 1) / T` of the rounds that are over: `linear` is `1 - p`, `cosine` is `(1 + cos πp) / 2`.

    >>> [schedule_factor("linear", round_number, 4) for round_number in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    over = (round_number - 1) / rounds
    if schedule == "linear":
        return 1 - over
    return (1 + math.cos(math.pi * over)) / 2 if schedule == "cosine" else 1.0


def learning_rates(config: OptimizerConfig, names: list[str]) -> dict[str, float]:
    """Name -> learning rate: `lr_a` for factors A, `lr_b` for factors B, `lr` for other tensors and as the default."""
    own = {name: config.lr_a if is_a(name) else config.lr_b if is_b(name) else None for name in names}
    return {name: rate or config.lr for name, rate in own.items()}
