"""The public terms of a summation, and the error that ends it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorica.errors import UserError

# Ids are 64-bit numbers in the messages and as x-coordinates of Shamir shares.
LARGEST_ID = 2**63 - 1


class SummationError(Exception):
    """The summation failed. The message gives the reason and contains no private data.

    Attributes:
        client: the client that sent wrong bytes; None if too few clients answered, or if a client refuses what the
            server asked for.
    """

    def __init__(self, problem: str, client: int | None = None) -> None:
        self.problem, self.client = problem, client
        super().__init__(f"secure summation: {'' if client is None else f'client {client}: '}{problem}")


@dataclass(frozen=True)
class Setup:
    """The public terms of one summation.

    Attributes:
        summation: an id that is never used twice; all keys and encrypted shares are bound to it.
        clients: the largest number of summands, `n`, from 2 to 65536.
        threshold: `t`, more than `n / 2`: clients that must answer each stage, and shares that reveal a secret.
        bits: `k`, 32 or 64: sums are modulo `2^k`.
        bound: coordinates are clipped to `[-bound, bound]`, from 1e-30 to 1e30.

    Raises:
        UserError: an attribute out of its range.
    """

    summation: str
    clients: int
    threshold: int
    bits: int
    bound: float

    def __post_init__(self) -> None:
        if not self.summation:
            raise UserError("summation", self.summation, "it is empty", "give each summation a unique id")
        if not 2 <= self.clients <= 2**16:
            raise UserError("clients", self.clients, "out of range", "choose a number from 2 to 65536")
        if not self.clients < 2 * self.threshold <= 2 * self.clients:
            problem = f"not a majority of {self.clients} clients"
            raise UserError(
                "threshold", self.threshold, problem, f"choose a number from {self.clients // 2 + 1} to {self.clients}"
            )
        if self.bits not in (32, 64):
            raise UserError("bits", self.bits, "unsupported word size", "choose 32 or 64")
        if not 1e-30 <= self.bound <= 1e30:
            raise UserError("bound", self.bound, "out of range", "choose a number from 1e-30 to 1e30")

    @property
    def step(self) -> float:
        """The quantisation step: the power of two above `bound / levels`, with `levels = ⌊(2^(k-1) − 1) / n⌋`.

        Hence `n · round(bound / step) < 2^(k-1)`. Division by a power of two is exact.
        """
        levels = (2 ** (self.bits - 1) - 1) // self.clients
        return math.ldexp(1.0, math.frexp(self.bound / levels)[1])

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """Unsigned k-bit words, little-endian as in the messages. NumPy adds them modulo `2^k`."""
        return np.dtype(f"<u{self.bits // 8}")
