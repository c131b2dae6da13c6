"""Tokenised texts for causal models, and which of their tokens are learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lorica.tasks.records import Batch
from lorica.tasks.text import TokenRecords, laid_out, padded

# The value that transformers leaves out of a loss.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Prompts:
    """Texts for a model to go on with.

    Attributes:
        tokens: int32, of each.
        answers: int32, tokens of answers as they may end: a special token that ends one ends the model's too.
        pad: the token id that stands in padded, masked places.
    """

    tokens: list[np.ndarray]
    answers: list[np.ndarray]
    pad: int


@dataclass(frozen=True, eq=False)
class CausalRecords(TokenRecords):
    """Tokenised texts and which of their tokens are learned.

    `labels` is zero everywhere: there are no classes.

    Attributes:
        learned: bool, parallel to `tokens`: the tokens that the loss counts. Never a record's first, which nothing
            predicts, and at least one of each record.
    """

    learned: np.ndarray

    def batch(self, indices: np.ndarray) -> Batch:
        """Padded on the right; the labels are the tokens themselves where they are learned, and `IGNORED` elsewhere."""
        mask, places = laid_out(self.starts[indices], self.sizes[indices])
        ids = padded(self.tokens, places, mask, self.pad)
        learned = padded(self.learned, places, mask, 0).astype(bool)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        return Batch(inputs, torch.from_numpy(np.where(learned, ids, IGNORED)))

    def question(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before the last run of learned tokens, and that run: a prompt, and the answer to it."""
        here = slice(self.starts[index], self.starts[index] + self.sizes[index])
        tokens, places = self.tokens[here], np.flatnonzero(self.learned[here])
        breaks = np.flatnonzero(np.diff(places) > 1)
        start = places[breaks[-1] + 1] if len(breaks) else places[0]
        return tokens[:start], tokens[start : places[-1] + 1]
