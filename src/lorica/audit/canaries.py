"""Canaries: records that are included or not by a fair coin, and null records in place of those that are not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from lorica.tasks.records import Batch, Records


def toss(count: int) -> np.ndarray:
    """(count,) bool, fair coins from the operating system's entropy."""
    return np.random.default_rng().random(count) < 0.5


@dataclass(frozen=True, eq=False)
class Canaries(Records):
    """Records of which those that are not included have a loss of zero, so that n is the same for all coins.

    This is the neighbour of the guarantee: the record contributes zero to every batch.

    Attributes:
        base: all canaries.
        included: (n,) bool.
    """

    base: Records
    included: np.ndarray

    @classmethod
    def of(cls, base: Records, included: np.ndarray) -> Canaries:
        return cls(base.labels, base.digests, base, included)

    @property
    def lengths(self) -> np.ndarray:
        return self.base.lengths

    @property
    def row_counts(self) -> np.ndarray:
        return self.base.row_counts

    def subset(self, indices: np.ndarray) -> Canaries:
        return Canaries.of(self.base.subset(indices), self.included[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        batch = self.base.batch(indices)
        example = torch.arange(len(batch)) if batch.example_of_row is None else batch.example_of_row
        included = torch.from_numpy(self.included[indices].astype(np.float32))
        return replace(batch, example_of_row=example, weights=batch.row_weights() * included[example])
