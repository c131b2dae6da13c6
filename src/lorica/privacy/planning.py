"""What a batch size and a number of steps cost in noise, at the same ε: to choose between them before a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lorica.privacy.calibration import calibrate

NEAR = 1.2
"""A batch is large enough if the run's noise is at most this many times the least possible."""


@dataclass(frozen=True)
class Option:
    """One choice for a client, with the noise multiplier that its ε needs."""

    records: int
    batch_size: int
    steps: int
    noise_multiplier: float

    @property
    def run_noise(self) -> float:
        """`σ / (b √T)`: standard deviation of each coordinate of the mean of a run's gradients, for C = 1."""
        return self.noise_multiplier / (self.batch_size * math.sqrt(self.steps))

    @property
    def passes(self) -> float:
        """`b T / n`: how often each record's gradient is computed, on average."""
        return self.batch_size * self.steps / self.records


def option(records: int, batch_size: int, steps: int, epsilon: float, delta: float) -> Option:
    """The choice of a batch size and a number of steps at a target ε.

    Raises:
        UserError: no noise multiplier meets the target.
    """
    return Option(records, batch_size, steps, calibrate(batch_size / records, steps, epsilon, delta))


def least_noise(records: int, steps: int, epsilon: float, delta: float) -> float:
    """The run's noise with all records in every batch, below which no batch size gets.

    For large batches `σ` grows as `b √T`, so that `σ / (b √T)` tends to a constant that depends on n, ε and δ alone:
    more steps then cost no accuracy, but gain none either. For small batches `σ` stops falling with `b` (the noise that
    a single step needs), and a larger batch reduces the noise at no cost in ε.
    """
    return option(records, records, steps, epsilon, delta).run_noise


def smallest_good_batch(records: int, steps: int, epsilon: float, delta: float, batch_sizes: Iterable[int]) -> Option:
    """The smallest batch whose noise is `NEAR` the least possible; the largest one if none is.

    Args:
        batch_sizes: ascending, at most `records`, at least one.
    """
    enough = NEAR * least_noise(records, steps, epsilon, delta)
    sizes = list(batch_sizes)
    low, high = 0, len(sizes) - 1
    # The noise falls as the batch grows.
    while low < high:
        middle = (low + high) // 2
        if option(records, sizes[middle], steps, epsilon, delta).run_noise <= enough:
            high = middle
        else:
            low = middle + 1
    return option(records, sizes[low], steps, epsilon, delta)


def usual_batch_sizes(records: int, largest: int | None = None) -> list[int]:
    """8, 16, 32, … up to `largest`, and none above the number of records."""
    most = min(records, largest or records)
    return [8 * 2**power for power in range(40) if 8 * 2**power <= most] or [most]
