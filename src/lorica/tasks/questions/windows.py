"""Windows over contexts that are longer than a model's input, and where the answer is in each.

Devlin et al., arXiv 1810.04805, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# Each with its first character's place in the context.
Answers = list[tuple[str, int]]


@dataclass(frozen=True)
class Frame:
    """The special tokens around and between a pair of texts, with the token types of everything.

    Attributes:
        special: (token ids, token types) before the question, between the two and after the context.
        types: token type of the question and of the context.
    """

    special: tuple[tuple[list[int], list[int]], ...]
    types: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """What a tokenizer of transformers puts around a pair."""
        encoded = tokenizer("a", "b", return_token_type_ids=True)
        texts = encoded.sequence_ids(0)
        edges = [0, texts.index(0), _last(texts, 0), texts.index(1), _last(texts, 1), len(texts)]
        ids, types = encoded["input_ids"], encoded["token_type_ids"]
        special = tuple((ids[start:end], types[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True))
        return cls(special, (types[edges[1]], types[edges[3]]))

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return sum(len(ids) for ids, _ in self.special)

    def context_place(self, question: int) -> int:
        """Where the context begins in a window, after so many tokens of question."""
        return len(self.special[0][0]) + question + len(self.special[1][0])

    def tokens(self, question: list[int], context: list[int]) -> np.ndarray:
        """A window's tokens, int32."""
        before, between, after = (ids for ids, _ in self.special)
        return np.array([*before, *question, *between, *context, *after], dtype=np.int32)

    def token_types(self, question: int, context: int) -> np.ndarray:
        """The types of a window's tokens, int8, for so many tokens of question and of context."""
        before, between, after = (types for _, types in self.special)
        first, second = self.types
        return np.array([*before, *[first] * question, *between, *[second] * context, *after], dtype=np.int8)


def _last(values: list[int | None], value: int) -> int:
    """One past the last place of a value."""
    return len(values) - values[::-1].index(value)


def window_cuts(count: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First and end of each window over `count` tokens, `room` at a time, that share `stride`."""
    cuts = [(0, min(room, count))]
    while cuts[-1][1] < count:
        first = cuts[-1][1] - stride
        cuts.append((first, min(first + room, count)))
    return cuts


def answer_span(offsets: np.ndarray, answers: Answers) -> tuple[int, int] | None:
    """First and last token that hold a character of the first answer."""
    if not answers:
        return None
    text, start = answers[0]
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else None
