"""The next tokens: the loss, and how well a model does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.tasks.causal.answers import Answer, exact_match
from lorica.tasks.causal.records import IGNORED, CausalRecords
from lorica.tasks.records import Batch, Records, evaluating


@dataclass(frozen=True)
class NextTokenObjective:
    """The next tokens, of completions and the assistant's turns.

    Attributes:
        tokenizer: for decoding.
        answer_tokens: decode so many tokens and compare answers (`exact_match`); None does not decode.
        answer_format: how answers are compared.
    """

    tokenizer: Any
    answer_tokens: int | None
    answer_format: Answer

    @property
    def metric(self) -> str:
        return "token_accuracy" if self.answer_tokens is None else "exact_match"

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return losses(outputs, batch)

    def evaluate(self, model: Any, records: Records, tokens: int, device: torch.device | str) -> dict[str, float]:
        assert isinstance(records, CausalRecords)
        found = evaluate(model, records, tokens, device)
        if self.answer_tokens is None:
            return found
        settings = (self.tokenizer, self.answer_tokens, tokens, device, self.answer_format)
        return found | {"exact_match": exact_match(model, records, *settings)}


def losses(outputs: Any, batch: Batch) -> Tensor:
    """Mean cross entropy of each record's learned tokens, in nats, in fp32 whatever the logits' precision.

    `L_i = 1/|T_i| Σ_{t ∈ T_i} -log p(x_t | x_<t)`. A mean and not a sum: the gradient's norm then hardly depends on how
    long a record is, so that one clip norm fits short and long ones and the long ones do not fill the sum.

    Args:
        outputs: of the model; `logits` is (n, t, vocabulary), where position s predicts token s + 1.
        batch: labels (n, t), at least one of each row's from the second on not -100.

    Returns:
        (n,) float32.
    """
    values, learned = _token_losses(outputs.logits, batch.labels)
    return batch.by_example(values.sum(1) / learned.sum(1))


def _token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, t - 1) float32 cross entropies, zero where nothing is learned, and (n, t - 1) bool, where something is."""
    targets = labels[:, 1:]
    learned = targets != IGNORED
    # Chosen before they are made fp32: a prompt's logits would take as much memory again.
    found = F.cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="none")
    return torch.zeros(learned.shape, device=found.device).masked_scatter(learned, found), learned


def evaluate(model: Any, records: CausalRecords, tokens: int, device: torch.device | str) -> dict[str, float]:
    """Mean cross entropy of all learned tokens (nats; long records weigh more), its exponential, the perplexity, and
    the share of these tokens that the model puts first.

    Every module is in evaluation mode meanwhile and gets its previous mode back, also after an error.

    Args:
        model: called as `model(**batch.inputs).logits`, (n, t, vocabulary).
        records: at least one.
        tokens: padded tokens in one forward pass.
    """
    with evaluating(model):
        total = torch.zeros((), dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        for indices in records.passes(tokens):
            batch = records.batch(indices).to(device)
            logits = model(**batch.inputs).logits
            values, learned = _token_losses(logits, batch.labels)
            total += values.sum(dtype=torch.float64)
            count += learned.sum()
            right += (logits[:, :-1][learned].argmax(dim=-1) == batch.labels[:, 1:][learned]).sum()
    loss = total / count
    return {"token_accuracy": (right / count).item(), "perplexity": loss.exp().item(), "loss": loss.item()}
