"""Language modelling and instruction tuning: the loss, and how well a model does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.errors import UserError
from lorica.tasks.causal import IGNORED, CausalRecords
from lorica.tasks.records import Batch, Records, cheapest_cuts, evaluating
from lorica.tasks.text import padded

# A minus counts where it cannot be a subtraction.
NUMBER = re.compile(r"(?:(?<![\d.])-)?\d[\d,]*(?:\.\d+)?")

Answer = Literal["text", "gsm8k"]


@dataclass(frozen=True)
class LanguageModelling:
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
        for batch in records.micro_batches(np.arange(len(records)), tokens):
            batch = batch.to(device)
            logits = model(**batch.inputs).logits
            values, learned = _token_losses(logits, batch.labels)
            total += values.sum(dtype=torch.float64)
            count += learned.sum()
            right += (logits[:, :-1][learned].argmax(dim=-1) == batch.labels[:, 1:][learned]).sum()
    loss = total / count
    return {"token_accuracy": (right / count).item(), "perplexity": loss.exp().item(), "loss": loss.item()}


def exact_match(
    model: Any,
    records: CausalRecords,
    tokenizer: Any,
    max_new_tokens: int,
    tokens: int,
    device: torch.device | str,
    answer: Answer = "text",
) -> float:
    """Share of the records to whose prompt the model gives the record's answer, decoded greedily.

    A record's answer is its last learned turn, and its prompt all that comes before. The model's answer ends at its or
    the tokenizer's end-of-text token, at a special token that closes one of the records' answers (a chat template's end
    of turn), or after `max_new_tokens`. Answers are compared as decoded without special tokens and stripped of blanks.
    Modules are in evaluation mode meanwhile, as in `evaluate`.

    Args:
        model: a causal model with transformers' `generate`, or a PEFT model around one.
        records: at least one; their answers must not be cut by `max_length`.
        tokens: padded tokens, answers included, in one batch.
        answer: `text`, or `gsm8k`: the reference's number after `####` against the last number of the model's answer
            (Cobbe et al., arXiv 2110.14168; commas left out, 42 equals 42.0).

    Raises:
        UserError: a reference has no number after `####`.
    """
    questions = [records.question(index) for index in range(len(records))]
    references = tokenizer.batch_decode([reference for _, reference in questions], skip_special_tokens=True)
    wanted = [_reference(text, answer, index) for index, text in enumerate(references)]
    settings = _greedy(model, tokenizer, [reference for _, reference in questions], max_new_tokens, records.pad)
    lengths = np.array([len(prompt) for prompt, _ in questions])
    order = np.argsort(lengths, kind="stable")
    matches = start = 0
    with evaluating(model):
        for end in cheapest_cuts(lengths[order] + max_new_tokens, tokens):
            rows = order[start:end]
            ids, mask = _left_padded([questions[row][0] for row in rows], records.pad)
            given = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings, use_cache=True
            )
            texts = tokenizer.batch_decode(given[:, ids.shape[1] :], skip_special_tokens=True)
            matches += sum(_given(text, answer) == wanted[row] for row, text in zip(rows, texts, strict=True))
            start = end
    return matches / len(records)


def _greedy(model: Any, tokenizer: Any, references: list[np.ndarray], max_new_tokens: int, pad: int) -> Any:
    """Plain greedy decoding, without what the model's own generation settings add to it."""
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    for reference in references:
        stops.update([token for token in reference.tolist() if token in tokenizer.all_special_ids][-1:])
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad,
        eos_token_id=sorted(stops) or None,
    )


def _left_padded(prompts: list[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """(n, longest) int64 tokens that all end in the last column, where the answers go on, and their mask."""
    sizes = np.array([len(prompt) for prompt in prompts])
    mask = np.arange(sizes.max()) >= sizes.max() - sizes[:, None]
    ids = padded(np.concatenate(prompts), np.arange(sizes.sum()), mask, pad)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def _reference(reference: str, answer: Answer, index: int) -> str | Decimal:
    if answer == "text":
        return reference.strip()
    number = _last_number(reference.rpartition("####")[2]) if "####" in reference else None
    if number is None:
        problem = f"record {index} (counted from 0) has no number after #### in its answer"
        raise UserError("task.test", "gsm8k", problem, "raise task.max_length if it was cut off, or compare texts")
    return number


def _given(text: str, answer: Answer) -> str | Decimal | None:
    return text.strip() if answer == "text" else _last_number(text)


def _last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
