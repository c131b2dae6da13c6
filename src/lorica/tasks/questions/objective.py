"""The place of an answer: the loss, and how well a model does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.tasks.questions.answers import predicted_answers
from lorica.tasks.questions.metrics import exact_match, f1
from lorica.tasks.questions.records import QuestionRecords
from lorica.tasks.records import Batch, Records, evaluating


@dataclass(frozen=True)
class SpanObjective:
    """The place of an answer; F1 is the main metric. The arguments are those of `evaluate`."""

    null_threshold: float | None
    max_answer: int
    metric: str = "f1"

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return losses(outputs, batch)

    def evaluate(self, model: Any, records: Records, tokens: int, device: torch.device | str) -> dict[str, float]:
        assert isinstance(records, QuestionRecords)
        return evaluate(model, records, tokens, device, self.null_threshold, self.max_answer)


def losses(outputs: Any, batch: Batch) -> Tensor:
    """Mean over a question's windows of `(CE(start) + CE(end)) / 2`, in nats and fp32.

    The softmax runs over all tokens of a window, the question's too, as in transformers' question answering models, but
    not over padding, which those leave in: how much padding a window has depends on the questions beside it, and so
    would the gradient that is clipped. On a window without padding this is transformers' own loss.

    Args:
        outputs: `start_logits` and `end_logits`, (windows, longest).

    Returns:
        (questions,) float32.
    """
    padding = batch.inputs["attention_mask"] == 0

    def cross_entropy(logits: Tensor, positions: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().masked_fill(padding, -math.inf), positions, reduction="none")

    starts, ends = batch.labels.unbind(1)
    return batch.by_example((cross_entropy(outputs.start_logits, starts) + cross_entropy(outputs.end_logits, ends)) / 2)


def evaluate(
    model: Any,
    records: QuestionRecords,
    tokens: int,
    device: torch.device | str,
    null_threshold: float | None,
    max_answer: int = 30,
) -> dict[str, float]:
    """Exact match and F1 (shares) and mean loss (nats) of a model over all records, of which there is at least one.

    The answer is the span of context of greatest `start + end` logit, over all windows and all spans of at most
    `max_answer` tokens. It is the official BERT scripts' answer without their detour over the n best starts and ends,
    which may miss it. With a `null_threshold`, it is "" where [CLS] scores higher than the span by more than that, the
    least score of [CLS] over the windows taken: a window without the answer says nothing about the others. It is also
    "" where the logits are not finite.

    Every module is in evaluation mode meanwhile and gets its previous mode back, also after an error.

    Args:
        model: called as `model(**batch.inputs)`; gives `start_logits` and `end_logits`.
        tokens: padded tokens in one forward pass.
        null_threshold: how much more [CLS] has to score (v2.0; 0 where nothing else is known). None where every
            question has an answer (v1.1).
        max_answer: in tokens.

    Raises:
        ValueError: the records keep no texts.
    """
    if records.texts is None:
        raise ValueError("training records have no texts, which evaluation needs")
    total = dict.fromkeys(("exact_match", "f1"), 0.0)
    with evaluating(model):
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for indices in records.passes(tokens):
            batch = records.batch(indices).to(device)
            outputs = model(**batch.inputs)
            loss += losses(outputs, batch).sum(dtype=torch.float64)
            predictions = predicted_answers(outputs, records, records.texts, indices, null_threshold, max_answer)
            for index, prediction in zip(indices, predictions, strict=True):
                answers = records.texts.answers[records.questions[index]]
                total["exact_match"] += exact_match(prediction, answers)
                total["f1"] += f1(prediction, answers)
    return {name: value / len(records) for name, value in (total | {"loss": loss.item()}).items()}
