"""Sources of randomness for a mechanism: the operating system, or a seed for research."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorica.streams import torch_stream


class Randomness(Protocol):
    """Independent draws, float64 on the CPU."""

    def uniform(self, count: int) -> Tensor:
        """`count` draws from U(0, 1)."""

    def normal(self, count: int) -> Tensor:
        """`count` draws from N(0, 1)."""


class SecureRandomness:
    """Draws from the operating system's entropy source: never seeded and never stored."""

    def uniform(self, count: int) -> Tensor:
        """`(k + ½) 2⁻⁵³` for a uniform 53-bit integer `k`: in the open interval (0, 1)."""
        bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
        return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-53)

    def normal(self, count: int) -> Tensor:
        """The Box-Muller transform of pairs of uniform draws."""
        half = (count + 1) // 2
        radius = torch.sqrt(-2.0 * torch.log(self.uniform(half)))
        angle = 2.0 * torch.pi * self.uniform(half)
        return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]


class ReproducibleRandomness:
    """Draws that are a function of public numbers, for comparisons and tests. Provides no privacy."""

    def __init__(self, seed: int, round_number: int, exchange: int, client: int) -> None:
        self._generator = torch_stream(seed, "mechanism", round_number, exchange, client)

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator, dtype=torch.float64)

    def normal(self, count: int) -> Tensor:
        return torch.randn(count, generator=self._generator, dtype=torch.float64)
