"""Records ready for a model, and the micro-batches they are cut into."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some records as tensors.

    Attributes:
        inputs: keyword arguments of the model's `forward`, each with n rows: `input_ids`, `attention_mask` and, where
            the tokenizer makes them, `token_type_ids`, all (n, longest) int64; or `pixel_values` (n, channels, height,
            width) float32.
        labels: (n,) int64; for language modelling (n, longest) int64, the tokens themselves where the loss counts and
            -100 elsewhere.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Records(ABC):
    """The records of one data set, in the order of their source.

    Attributes:
        labels: (n,) int64, positions in the task's label names.
        digests: (n, 32) uint8, the SHA-256 of each record as its source gave it, label included.
    """

    labels: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens (text) or patches (images) of each record."""

    @abstractmethod
    def subset(self, indices: np.ndarray) -> Records:
        """The records at `indices`, in that order; shares the stored tokens or pixels."""

    @abstractmethod
    def batch(self, indices: np.ndarray) -> Batch:
        """The records at `indices` as one batch, in that order; at least one."""

    def micro_batches(self, indices: np.ndarray, tokens: int) -> Iterator[Batch]:
        """Cut the records at `indices` into batches of similar length.

        Records are sorted by length (equal lengths keep their order) and cut where `cheapest_cuts` says. A batch keeps
        (records × longest length) within `tokens`, and holds at least one record, even if that one is longer than
        `tokens`. Every index comes out as often as it went in; no index gives no batch.
        """
        order = np.asarray(indices, dtype=np.int64)
        order = order[np.argsort(self.lengths[order], kind="stable")]
        start = 0
        for end in cheapest_cuts(self.lengths[order], tokens):
            yield self.batch(order[start:end])
            start = end

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over the records as their source gave them, in order.

        It depends on no tokenizer, image processor or `max_length`, so that the same data has the same fingerprint
        under every base model. It depends on the columns that the task reads, on the labels' names, and on the order.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self.digests.tobytes()).hexdigest()


def cheapest_cuts(lengths: np.ndarray, tokens: int) -> list[int]:
    """Where to cut sorted records so that the passes over them cost least.

    A pass over records `i … j-1` costs its padded tokens `(j - i) · lengths[j-1]` plus a fixed `tokens / 16`, about
    what starting a pass costs beside its tokens: many passes waste starts, few passes waste padding. Dynamic
    programming over the last cut: `cost(j) = min_i cost(i) + (j - i) · lengths[j-1] + tokens/16`. Among equals, earlier
    passes are the fuller ones.

    Args:
        lengths: (n,), ascending, each at least 1.
        tokens: most padded tokens in a pass; a single record may exceed it.

    Returns:
        The end of each pass, ascending, the last one n; empty if n is 0.
    """
    n = len(lengths)
    cost, last = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for end in range(1, n + 1):
        longest = int(lengths[end - 1])
        starts = np.arange(end - 1, max(0, end - max(1, tokens // longest)) - 1, -1)
        costs = cost[starts] + (end - starts) * longest + tokens / 16
        best = int(np.argmin(costs))
        cost[end], last[end] = costs[best], starts[best]
    ends: list[int] = []
    while n:
        ends.append(n)
        n = int(last[n])
    return ends[::-1]


def digest(fields: Iterable[bytes]) -> bytes:
    """SHA-256 (32 bytes) of one record's fields; the same bytes divided otherwise into fields give another digest."""
    content = hashlib.sha256()
    for field in fields:
        content.update(len(field).to_bytes(8, "little"))
        content.update(field)
    return content.digest()


def stack_digests(digests: list[bytes]) -> np.ndarray:
    """The digests of n records as (n, 32) uint8."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


@dataclass(frozen=True)
class Task:
    """What is learned: labelled records to train on, public ones to test on, and the labels' names.

    Attributes:
        label_names: `label_names[i]` is the name of label i.
    """

    train: Records
    test: Records
    label_names: list[str]
