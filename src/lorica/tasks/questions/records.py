"""Questions as records: one question with all windows over its context is one record."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from lorica.tasks.records import Batch, Records
from lorica.tasks.text import laid_out, padded


@dataclass(frozen=True)
class Texts:
    """What turns places of tokens back into words. Only records to evaluate on have it.

    Attributes:
        contexts: of each question.
        offsets: (tokens, 2) int32, where each token of the contexts begins and ends in its own, in characters; equal
            contexts of neighbouring questions stand there once.
        context_starts: int64 offsets into `offsets`, of each question.
        answers: all that count as right, of each question; none where it has no answer.
        places: int64, where the context begins in each window.
        firsts: int64, which token of the context that is.
        counts: int64, tokens of the context in each window.
    """

    contexts: list[str]
    offsets: np.ndarray
    context_starts: np.ndarray
    answers: list[list[str]]
    places: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class QuestionRecords(Records):
    """Questions, each with the windows over its context; record i is the question `questions[i]`.

    One question is one record, the unit of privacy: it is sampled once, and all its windows share one clip, however
    long its context is. (Questions about one context are still different records. Where the context itself is what
    must not be told, make it the unit with `lorica.tasks.groups`.)

    Question k has the windows `first_windows[k] … first_windows[k] + window_counts[k] - 1`; window w is
    `tokens[starts[w] : starts[w] + sizes[w]]`. Subsets share all of that.

    Attributes:
        labels: (n,) int64, 1 where the question has an answer, 0 where it has none.
        questions: (n,) int64.
        tokens: int32, the tokens of all windows one after another.
        token_types: int8, parallel to `tokens`; None where the model takes none.
        starts: int64 offsets into `tokens`.
        sizes: int64 tokens of each window.
        positions: (windows, 2) int64, the places of the answer's first and last token in the window; (0, 0), the place
            of [CLS], where the window does not hold the whole answer or there is none.
        first_windows: int64, of each question.
        window_counts: int64, of each question.
        pad: the token id that stands in padded, masked places.
        pad_type: the token type that stands there.
        texts: None for records to train on, which keep tokens only.
    """

    questions: np.ndarray
    tokens: np.ndarray
    token_types: np.ndarray | None
    starts: np.ndarray
    sizes: np.ndarray
    positions: np.ndarray
    first_windows: np.ndarray
    window_counts: np.ndarray
    pad: int
    pad_type: int
    texts: Texts | None

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(np.maximum.reduceat(self.sizes, self.first_windows)[self.questions])

    @property
    def row_counts(self) -> np.ndarray:
        return np.asarray(self.window_counts[self.questions])

    def subset(self, indices: np.ndarray) -> QuestionRecords:
        return replace(
            self, labels=self.labels[indices], digests=self.digests[indices], questions=self.questions[indices]
        )

    def windows(self, indices: np.ndarray) -> np.ndarray:
        """Which windows the records at `indices` have, one record after another."""
        counts = self.row_counts[indices]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray(np.repeat(self.first_windows[self.questions[indices]], counts) + within)

    def batch(self, indices: np.ndarray) -> Batch:
        windows = self.windows(indices)
        mask, places = laid_out(self.starts[windows], self.sizes[windows])
        inputs = {"input_ids": padded(self.tokens, places, mask, self.pad)}
        if self.token_types is not None:
            inputs["token_type_ids"] = padded(self.token_types, places, mask, self.pad_type)
        inputs["attention_mask"] = mask.astype(np.int64)
        return Batch(
            {name: torch.from_numpy(array) for name, array in inputs.items()},
            torch.from_numpy(self.positions[windows]),
            torch.from_numpy(np.repeat(np.arange(len(indices)), self.row_counts[indices])),
        )
