"""From start and end scores of tokens back to answers in words."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lorica.tasks.questions.records import QuestionRecords, Texts
from lorica.tasks.records import Passes, Records


def all_answers(
    model: Any, records: Records, passes: Passes, null_threshold: float | None, max_answer: int
) -> list[str]:
    """The answer to each question, as `lorica.tasks.questions.objective.evaluate` finds it; records keep texts."""
    assert isinstance(records, QuestionRecords)
    assert records.texts is not None
    found = [""] * len(records)
    for indices in records.micro_batch_indices(np.arange(len(records)), passes.tokens):
        outputs = model(**records.batch(indices).to(passes.device).inputs)
        given = predicted_answers(outputs, records, records.texts, indices, null_threshold, max_answer)
        for index, answer in zip(indices, given, strict=True):
            found[index] = answer
    return found


def predicted_answers(
    outputs: Any,
    records: QuestionRecords,
    texts: Texts,
    indices: np.ndarray,
    null_threshold: float | None,
    max_answer: int,
) -> list[str]:
    """The answer to each question of a batch."""
    windows = records.windows(indices)
    starts, ends = outputs.start_logits.float(), outputs.end_logits.float()
    columns = torch.arange(starts.shape[1], device=starts.device)
    place = torch.from_numpy(texts.places[windows]).to(starts.device)[:, None]
    count = torch.from_numpy(texts.counts[windows]).to(starts.device)[:, None]
    outside = (columns < place) | (columns >= place + count)
    in_reach = F.pad(ends.masked_fill(outside, -math.inf), (0, max_answer - 1), value=-math.inf)
    # spans[w, s, l] is the score of the span of l + 1 tokens from s on.
    spans = starts.masked_fill(outside, -math.inf)[:, :, None] + in_reach.unfold(1, max_answer, 1)
    best, where = (value.cpu().numpy() for value in spans.flatten(1).max(1))
    nulls = (starts[:, 0] + ends[:, 0]).cpu().numpy()

    predictions = []
    for index, (start, end) in zip(indices, pairwise(np.cumsum([0, *records.row_counts[indices]])), strict=True):
        row = start + int(np.argmax(best[start:end]))
        null = nulls[start:end].min()
        if not np.isfinite(best[row]) or (null_threshold is not None and not null - best[row] <= null_threshold):
            predictions.append("")
            continue
        question = records.questions[index]
        first, extra = divmod(int(where[row]), max_answer)
        token = texts.context_starts[question] + texts.firsts[windows[row]] + first - texts.places[windows[row]]
        begin, stop = texts.offsets[token, 0], texts.offsets[token + extra, 1]
        predictions.append(texts.contexts[question][begin:stop].strip())
    return predictions
