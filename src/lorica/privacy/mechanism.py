"""The noisy gradient of DP-SGD: sample a batch, clip each example's gradient, sum, add noise, divide.

For client-level DP, the same with clients and their updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lorica.privacy.clipping import clipped_sum
from lorica.privacy.gradients import TrainedTensor
from lorica.privacy.passes import clipped_batch
from lorica.privacy.randomness import Randomness
from lorica.privacy.released import Released, _release

if TYPE_CHECKING:
    from lorica.tasks.records import Batch, Records


@dataclass(frozen=True)
class Terms:
    """The DP terms of one client's steps, proposed by the server. They determine the cost of a step and are public.

    Attributes:
        sampling_rate: `q`, the probability that a record enters a batch.
        batch_size: `b`, the expected batch size, by which the sum is divided.
        clip_norm: `C`; `inf` if nothing is clipped, which only a run without privacy can have.
        noise_multiplier: `σ`; the noise on the sum has standard deviation `σC`. Zero without privacy.
    """

    sampling_rate: float
    batch_size: int
    clip_norm: float
    noise_multiplier: float

    @property
    def private(self) -> bool:
        return self.noise_multiplier > 0

    @property
    def noise_std(self) -> float:
        """`τ = σC/b`: standard deviation of each coordinate of the noisy gradient."""
        return self.noise_multiplier * self.clip_norm / self.batch_size if self.private else 0.0


def poisson_sample(records: int, sampling_rate: float, randomness: Randomness) -> np.ndarray:
    """Indices of a Poisson batch: each of `records` records is in it independently with probability `sampling_rate`.

    The batch may be empty. Zhu and Wang, Poisson Subsampled Rényi Differential Privacy, 2019.
    """
    return np.flatnonzero((randomness.uniform(records) < sampling_rate).numpy())


def add_noise(value: Tensor, noise_std: float, draws: Tensor) -> Tensor:
    """`value + s z` with draws `z` from N(0, 1), rounded to a grid of spacing `2^⌊log₂ s⌋ · 2⁻¹⁶`.

    Sum and rounding are done in fp64. The grid hides the low-order bits, through which floating-point noise can reveal
    the value it was added to (Mironov, CCS 2012). The rounding adds a variance of less than `2⁻³⁵ s²`.
    """
    grid = 2.0 ** (math.floor(math.log2(noise_std)) - 16)
    noisy = value.double().cpu() + noise_std * draws.reshape(value.shape)
    return ((noisy / grid).round() * grid).to(value)


def noisy_gradient(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    trained: Mapping[str, TrainedTensor],
    records: Records,
    terms: Terms,
    randomness: Randomness,
    micro_batch_tokens: int,
) -> dict[str, Released]:
    """`ĝ = (Σ_{i∈S} clip_C(g_i) + N(0, σ²C² I)) / b` over a Poisson batch `S`.

    One release of the subsampled Gaussian mechanism with (`q`, `σ`). An empty batch has the sum zero: the noise is
    added and the step counts. Abadi et al., arXiv 1607.00133, Algorithm 1, with the expected batch size instead of the
    actual one.

    Args:
        losses: one loss per example of a batch, shape `(n,)`.
        trained: the tensors trained in this step; their per-example gradients share one clip norm.
        micro_batch_tokens: bounds the memory of one pass (`lorica.privacy.passes`); it does not change the result.

    Returns:
        name -> released gradient of the tensor's shape, fp32.
    """
    indices = poisson_sample(len(records), terms.sampling_rate, randomness)
    total = clipped_batch(model, losses, trained, records, indices, terms.clip_norm, micro_batch_tokens)
    return _released(total, terms, randomness)


def noisy_mean_update(
    update_of: Callable[[int], Mapping[str, Tensor]],
    clients: int,
    shapes: Mapping[str, torch.Size],
    terms: Terms,
    randomness: Randomness,
) -> dict[str, Released]:
    """`(Σ_{k∈S} clip_C(U_k) + N(0, σ²C² I)) / K₀` over the updates of a Poisson sample `S` of clients.

    One release of the subsampled Gaussian mechanism with (`q`, `σ`) whose unit is a client. `K₀`, the expected number
    of clients, is public and fixed: with the actual number, leaving out one client would change every other term.
    McMahan et al., arXiv 1710.06963, with flat clipping and the estimator of fixed denominator.

    Args:
        update_of: number of a client -> its update, which depends on no other client's data.
        clients: number of clients, of whom each is in the sample with probability `q`.
        shapes: name -> shape of each tensor. An empty sample has the sum zero.
        terms: with `K₀` as the batch size.

    Returns:
        name -> released mean update, fp32.
    """
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for number in poisson_sample(clients, terms.sampling_rate, randomness).tolist():
        update = {name: value[None] for name, value in update_of(number).items()}
        for name, value in clipped_sum(update, terms.clip_norm).items():
            total[name] += value.cpu()
    return _released(total, terms, randomness)


def _released(total: Mapping[str, Tensor], terms: Terms, randomness: Randomness) -> dict[str, Released]:
    noise_std = terms.noise_multiplier * terms.clip_norm if terms.private else 0.0
    if noise_std > 0:
        draws = randomness.normal([value.numel() for value in total.values()])
        total = {
            name: add_noise(value, noise_std, own) for (name, value), own in zip(total.items(), draws, strict=True)
        }
    return {name: _release((value / terms.batch_size).float()) for name, value in total.items()}
