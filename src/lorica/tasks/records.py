"""Records ready for a model, and the micro-batches they are cut into."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some examples as tensors. An example is one row of the model's input, or several that share one clip.

    Attributes:
        inputs: keyword arguments of the model's `forward`, each with one entry a row: `input_ids`, `attention_mask`
            and, where the tokenizer makes them, `token_type_ids`, all (rows, longest) int64; or `pixel_values` (rows,
            channels, height, width) float32.
        labels: (rows,) or (rows, …) int64, or (rows,) float32 for regression; for language modelling (rows, longest)
            int64, the tokens themselves where the loss counts and -100 elsewhere.
        example_of_row: (rows,) int64, non-decreasing: the example that each row belongs to; each of 0 … n-1 occurs.
            None: row i is example i.
        weights: (rows,) float32, what each row's loss counts in the loss of its example. None: the example's loss is
            the mean over its rows. Without `example_of_row` there are none.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    example_of_row: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        """Examples, not rows."""
        return len(self.labels) if self.example_of_row is None else int(self.example_of_row[-1]) + 1

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return self._each(lambda tensor: tensor.to(device))

    def example(self, index: int) -> Batch:
        """One example alone, with all its rows."""
        if self.example_of_row is None:
            return self._each(lambda tensor: tensor[index : index + 1])
        rows = self.example_of_row == index
        return replace(
            self._each(lambda tensor: tensor[rows]), example_of_row=torch.zeros_like(self.example_of_row[rows])
        )

    def row_weights(self) -> Tensor:
        """(rows,) float32: `weights`, or an equal share for each row of an example."""
        if self.weights is not None:
            return self.weights
        if self.example_of_row is None:
            return torch.ones(len(self.labels), device=self.labels.device)
        return 1.0 / torch.bincount(self.example_of_row)[self.example_of_row]

    def by_example(self, losses: Tensor) -> Tensor:
        """(n,): each example's loss, `Σ weight · loss` over its rows.

        A row's loss must be a function of that row alone, padding left out: whatever else it depends on could move
        with another example, and the clip would not bound it.

        Args:
            losses: (rows,), one loss a row.
        """
        if self.example_of_row is None:
            return losses
        return losses.new_zeros(len(self)).index_add(0, self.example_of_row, losses * self.row_weights())

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            {name: function(tensor) for name, tensor in self.inputs.items()},
            function(self.labels),
            None if self.example_of_row is None else function(self.example_of_row),
            None if self.weights is None else function(self.weights),
        )


@dataclass(frozen=True, eq=False)
class Records(ABC):
    """The records of one data set, in the order of their source.

    Attributes:
        labels: (n,) int64, positions in the task's label names; or float32, numbers to predict.
        digests: (n, 32) uint8, the SHA-256 of each record as its source gave it, label included.
    """

    labels: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens (text) or patches (images) of each record; of its longest row where it has several."""

    @property
    def row_counts(self) -> np.ndarray:
        """(n,) int64: rows of the model's input that each record makes, at least one."""
        return np.broadcast_to(np.int64(1), len(self))

    @abstractmethod
    def subset(self, indices: np.ndarray) -> Records:
        """The records at `indices`, in that order; shares the stored tokens or pixels."""

    @abstractmethod
    def batch(self, indices: np.ndarray) -> Batch:
        """The records at `indices` as one batch, in that order; at least one."""

    def micro_batches(self, indices: np.ndarray, tokens: int) -> Iterator[Batch]:
        """Cut the records at `indices` into batches of similar length, as `micro_batch_indices` says."""
        return map(self.batch, self.micro_batch_indices(indices, tokens))

    def micro_batch_indices(
        self, indices: np.ndarray, tokens: int, most_rows: int | None = None
    ) -> Iterator[np.ndarray]:
        """The records at `indices`, cut into those of each micro-batch.

        Records are sorted by length (equal lengths keep their order) and cut where `cheapest_cuts` says. A batch keeps
        (rows × longest length) within `tokens` and has at most `most_rows` rows. It holds at least one record, even if
        that one is larger: all rows of a record run in one pass. Every index comes out as often as it went in; no index
        gives no batch.
        """
        order = np.asarray(indices, dtype=np.int64)
        order = order[np.argsort(self.lengths[order], kind="stable")]
        start = 0
        for end in cheapest_cuts(self.lengths[order], tokens, self.row_counts[order], most_rows):
            yield order[start:end]
            start = end

    def passes(self, tokens: int) -> list[np.ndarray]:
        """`micro_batch_indices` of all records: a test set is cut once, and not at each evaluation."""
        if tokens not in self._passes:
            self._passes[tokens] = list(self.micro_batch_indices(np.arange(len(self)), tokens))
        return self._passes[tokens]

    @cached_property
    def _passes(self) -> dict[int, list[np.ndarray]]:
        return {}

    def tags(self) -> tuple[np.ndarray, np.ndarray]:
        """What each record is known again by, in whichever file it comes.

        Returns:
            (m, 32) uint8, digests of all records, those of one record together; (n,) int64, how many each record has.
        """
        return self.digests, np.ones(len(self), dtype=np.int64)

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over the records as their source gave them, in order.

        It depends on no tokenizer, image processor or `max_length`, so that the same data has the same fingerprint
        under every base model. It depends on the columns that the task reads, on the labels' names, and on the order.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self.digests.tobytes()).hexdigest()


def cheapest_cuts(
    lengths: np.ndarray, tokens: int, row_counts: np.ndarray | None = None, most_rows: int | None = None
) -> list[int]:
    """Where to cut sorted records so that the passes over them cost least.

    A pass over records `i … j-1` costs its padded tokens `(r_i + … + r_{j-1}) · lengths[j-1]`, with `r` rows a record,
    plus a fixed `tokens / 16`, about what starting a pass costs beside its tokens: many passes waste starts, few passes
    waste padding. Dynamic programming over the last cut: `cost(j) = min_i cost(i) + (r_i + … + r_{j-1}) · lengths[j-1]
    + tokens/16`. Among equals, earlier passes are the fuller ones.

    Rows and lengths are kept apart because their product does not bound a batch: one row of 100 tokens and ten rows of
    10 make 200 tokens by themselves, but 1,100 once padded to the longest row.

    Args:
        lengths: (n,), ascending, each at least 1; of a record's longest row.
        tokens: most padded tokens in a pass; a single record may exceed it.
        row_counts: (n,), each at least 1; None: each record is one row.
        most_rows: most rows in a pass; a single record may exceed it. None for no limit.

    Returns:
        The end of each pass, ascending, the last one n; empty if n is 0.
    """
    n = len(lengths)
    rows = np.arange(n + 1) if row_counts is None else np.concatenate([[0], np.cumsum(row_counts)])
    cost, last = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for end in range(1, n + 1):
        longest = int(lengths[end - 1])
        fitting = tokens // longest if most_rows is None else min(tokens // longest, most_rows)
        first = int(np.searchsorted(rows, rows[end] - fitting))
        starts = np.arange(end - 1, min(first, end - 1) - 1, -1)
        costs = cost[starts] + (rows[end] - rows[starts]) * longest + tokens / 16
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
class Passes:
    """How records go through a model.

    Attributes:
        tokens: padded tokens or patches in one forward pass.
        device: where the model is.
    """

    tokens: int
    device: torch.device | str


class Objective(Protocol):
    """What a task minimises, and how well a model does at it."""

    @property
    def metric(self) -> str:
        """Name of the main metric among those of `evaluate`; 1 is perfect."""

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """One loss per example, `(n,)` fp32, of a model's outputs."""

    def evaluate(self, model: Any, records: Records, tokens: int, device: torch.device | str) -> dict[str, float]:
        """Metrics of a model over all records, of which there is at least one, `loss` among them.

        Args:
            tokens: padded tokens or patches in one forward pass.
        """


@dataclass(frozen=True)
class Owners:
    """Whose records are whose, as the data itself says.

    Attributes:
        names: `names[k]` is the name of owner k: a file, or a value of the column `federation.by`.
        of: (n,) int64, the owner of each record.
    """

    names: list[str]
    of: np.ndarray


@dataclass(frozen=True)
class Task:
    """What is learned: records to train on, public ones to test on, and what counts.

    Attributes:
        train: none at a server whose clients are elsewhere.
        tests: name -> public records, at an owner made-up ones (`lorica.tasks.made_up`); the first set's metrics go by
            their own names, another's as `NAME_METRIC`.
        label_names: `label_names[i]` is the name of label i; one name for a number that is predicted, none for text.
        owners: whose the training records are, where the data says so.
        groups: (n,) text, which privacy unit above the record each training record belongs to; None for the record.
        overlap: training records that are also in a test set, where that is allowed.
    """

    train: Records
    tests: dict[str, Records]
    label_names: list[str]
    objective: Objective
    owners: Owners | None = None
    groups: np.ndarray | None = None
    overlap: int = 0

    @property
    def has_classes(self) -> bool:
        """Whether `labels` are positions in `label_names`."""
        return len(self.label_names) > 1

    @property
    def test(self) -> Records:
        """The first test set."""
        return next(iter(self.tests.values()))

    def evaluate(self, model: Any, tokens: int, device: torch.device | str) -> dict[str, float]:
        """Metrics on all test sets, every module in evaluation mode meanwhile and in its own mode afterwards."""
        found: dict[str, float] = {}
        with evaluating(model):
            for index, (name, records) in enumerate(self.tests.items()):
                metrics = self.objective.evaluate(model, records, tokens, device)
                found |= metrics if index == 0 else {f"{name}_{key}": value for key, value in metrics.items()}
        return found


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within it, every module is in evaluation mode and nothing is recorded for gradients; afterwards, also after an
    error, every module has its own mode back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training
