"""Answers that a language model gives to prompts, decoded greedily, against those of the records."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lorica.errors import UserError
from lorica.tasks.causal.records import CausalRecords, Prompts
from lorica.tasks.records import Passes, cheapest_cuts, evaluating
from lorica.tasks.text import padded

# A minus counts where it cannot be a subtraction.
NUMBER = re.compile(r"(?:(?<![\d.])-)?\d[\d,]*(?:\.\d+)?")

Answer = Literal["text", "gsm8k"]


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
    A prompt that leaves the model no room for an answer loses its beginning. Modules are in evaluation mode meanwhile,
    as in `evaluate`.

    Args:
        model: a causal model with transformers' `generate`, or a PEFT model around one.
        records: at least one; their answers must not be cut by `max_length`.
        tokens: padded tokens, answers included, in one batch.
        answer: `text`, or `gsm8k`: the reference's number after `####` against the last number of the model's answer
            (Cobbe et al., arXiv 2110.14168; commas left out, 42 equals 42.0).

    Raises:
        UserError: a reference has no number after `####`.
    """
    questions = list(map(records.question, range(len(records))))
    wanted = references(records, tokenizer, answer)
    prompts = Prompts([prompt for prompt, _ in questions], [reference for _, reference in questions], records.pad)
    with evaluating(model):
        texts = continued(model, prompts, tokenizer, max_new_tokens, Passes(tokens, device))
    return sum(_given(text, answer) == right for text, right in zip(texts, wanted, strict=True)) / len(records)


def continued(model: Any, prompts: Prompts, tokenizer: Any, max_new_tokens: int, passes: Passes) -> list[str]:
    """What a model adds to each prompt, decoded greedily, without special tokens.

    It ends where `exact_match` says. A prompt that leaves no room for so many new tokens loses its beginning.
    """
    room = tokenizer.model_max_length - max_new_tokens
    kept = [prompt[-room:] for prompt in prompts.tokens]
    settings = _greedy(model, tokenizer, prompts.answers, max_new_tokens, prompts.pad)
    lengths = np.array([len(prompt) for prompt in kept])
    order = np.argsort(lengths, kind="stable")
    found = [""] * len(kept)
    start = 0
    for end in cheapest_cuts(lengths[order] + max_new_tokens, passes.tokens):
        rows = order[start:end]
        ids, mask = _left_padded([kept[row] for row in rows], prompts.pad)
        given = model.generate(
            input_ids=ids.to(passes.device),
            attention_mask=mask.to(passes.device),
            generation_config=settings,
            use_cache=True,
        )
        texts = tokenizer.batch_decode(given[:, ids.shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            found[row] = text
        start = end
    return found


def references(records: CausalRecords, tokenizer: Any, answer: Answer) -> list[str | Decimal]:
    """The answer of each record, as `exact_match` compares it.

    Raises:
        UserError: a reference has no number after `####`.
    """
    own = [records.question(index)[1] for index in range(len(records))]
    texts = tokenizer.batch_decode(own, skip_special_tokens=True)
    return [_reference(text, answer, index) for index, text in enumerate(texts)]


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
        raise UserError(
            "task.test",
            "gsm8k",
            problem,
            "raise task.max_length if the answer was cut off, or set task.answer_format=text",
        )
    return number


def _given(text: str, answer: Answer) -> str | Decimal | None:
    return text.strip() if answer == "text" else _last_number(text)


def _last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
