"""Classification and regression: their losses, and how well a model does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.tasks.metrics import OF_CLASSES, OF_NUMBERS
from lorica.tasks.records import Batch, Passes, Records


@dataclass(frozen=True)
class Classification:
    """Cross entropy on single labels.

    Attributes:
        metrics: names of `lorica.tasks.metrics.OF_CLASSES`; the first one is the main one.
    """

    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def metric(self) -> str:
        return self.metrics[0]

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy of each example, in nats, in fp32 whatever the logits' precision. `outputs.logits (n, labels)`.

        Returns:
            (n,) float32.
        """
        return batch.by_example(F.cross_entropy(outputs.logits.float(), batch.labels, reduction="none"))

    def evaluate(self, model: Any, records: Records, tokens: int, device: torch.device | str) -> dict[str, float]:
        """The metrics and the mean cross entropy (nats)."""
        predicted, loss = np.empty(len(records), dtype=np.int64), 0.0
        for places, batch, outputs in _passes(model, records, tokens, device):
            predicted[places] = outputs.logits.argmax(dim=-1).cpu().numpy()
            loss += float(self.losses(outputs, batch).sum(dtype=torch.float64))
        found = {name: OF_CLASSES[name](records.labels, predicted) for name in self.metrics}
        return found | {"loss": loss / len(records)}


@dataclass(frozen=True)
class Regression:
    """Squared error on one number.

    Attributes:
        metrics: names of `lorica.tasks.metrics.OF_NUMBERS`; the first one is the main one.
    """

    metrics: tuple[str, ...] = ("pearson", "spearman")

    @property
    def metric(self) -> str:
        return self.metrics[0]

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """`(y_i - t_i)²` of each example, fp32. `outputs.logits (n, 1)`, `batch.labels (n,)` float."""
        predicted: Tensor = outputs.logits.float()[:, 0]
        return batch.by_example((predicted - batch.labels.float()).square())

    def evaluate(self, model: Any, records: Records, tokens: int, device: torch.device | str) -> dict[str, float]:
        """The metrics and the mean squared error, as `loss`."""
        predicted = np.empty(len(records))
        for places, _, outputs in _passes(model, records, tokens, device):
            predicted[places] = outputs.logits.float()[:, 0].cpu().numpy()
        found = {name: OF_NUMBERS[name](records.labels, predicted) for name in self.metrics}
        return found | {"loss": float(np.mean((predicted - records.labels) ** 2))}


def predicted_labels(model: Any, records: Records, label_names: list[str], passes: Passes) -> list[dict[str, Any]]:
    """The likeliest label of each record, and its probability as `score`."""
    logits = _logits(model, records, passes)
    scores, best = logits.softmax(dim=1).max(dim=1)
    return [
        {"label": label_names[label], "score": score}
        for label, score in zip(best.tolist(), scores.tolist(), strict=True)
    ]


def predicted_numbers(model: Any, records: Records, passes: Passes) -> np.ndarray:
    """(n,) float32."""
    numbers: np.ndarray = _logits(model, records, passes)[:, 0].numpy()
    return numbers


def _logits(model: Any, records: Records, passes: Passes) -> Tensor:
    """(n, outputs) fp32, on the CPU, in the order of the records."""
    found: list[Tensor] = [torch.empty(0)] * len(records)
    for places, _, outputs in _passes(model, records, passes.tokens, passes.device):
        for place, row in zip(places, outputs.logits.float().cpu(), strict=True):
            found[place] = row
    return torch.stack(found)


def _passes(model: Any, records: Records, tokens: int, device: torch.device | str) -> Any:
    """For each micro-batch: the places of its records, the batch, and what the model makes of it."""
    for places in records.passes(tokens):
        batch = records.batch(places).to(device)
        yield places, batch, model(**batch.inputs)
