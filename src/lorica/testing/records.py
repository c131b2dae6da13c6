"""Records in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lorica.tasks.records import Batch, Records, digest, stack_digests
from lorica.testing.models import random_texts


@dataclass(frozen=True, eq=False)
class TinyRecords(Records):
    """Whole padded tensors, indexed.

    Attributes:
        inputs: the model's inputs by name, a row a record.
    """

    inputs: dict[str, Tensor]

    @classmethod
    def of(cls, examples: Batch, seed: int = 0) -> TinyRecords:
        """The rows of a batch as records, whose digests are numbers made from the seed."""
        digests = [digest([bytes([seed % 256]), index.to_bytes(4, "little")]) for index in range(len(examples))]
        return cls(examples.labels.numpy(), stack_digests(digests), examples.inputs)

    @classmethod
    def texts(cls, count: int, seed: int = 0) -> TinyRecords:
        """Random texts of 3 to 8 tokens."""
        return cls.of(random_texts(count, seed), seed)

    @property
    def lengths(self) -> np.ndarray:
        if "attention_mask" in self.inputs:
            return self.inputs["attention_mask"].sum(1).numpy()
        return np.full(len(self), 4)

    def subset(self, indices: np.ndarray) -> TinyRecords:
        chosen = {name: value[torch.from_numpy(indices)] for name, value in self.inputs.items()}
        return replace(self, labels=self.labels[indices], digests=self.digests[indices], inputs=chosen)

    def batch(self, indices: np.ndarray) -> Batch:
        where = torch.from_numpy(np.asarray(indices))
        return Batch(
            {name: value[where] for name, value in self.inputs.items()}, torch.from_numpy(self.labels[indices])
        )
