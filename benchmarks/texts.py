"""Made-up token sequences with the lengths of SST-2."""

from __future__ import annotations

import numpy as np

# Of 10,000 sentences of SST-2's training set (67,349), how many have 3, 4, 5, … tokens under the tokenizer of BERT
# (uncased), the two special ones included. Mean 13.3.
SHORTEST = 3
HISTOGRAM = (
    294, 790, 900, 794, 705, 617, 551, 485, 438, 393, 358, 317, 290, 264, 247, 225, 204, 191, 168, 164, 155, 135, 122,
    120, 109, 103, 93, 80, 73, 66, 67, 59, 50, 45, 42, 36, 29, 30, 29, 23, 22, 19, 13, 12, 13, 11, 8, 6, 7, 6, 5, 3, 3,
    3, 2, 1, 1, 0, 0, 1, 1,
)  # fmt: skip


def draw_lengths(count: int, draws: np.random.Generator) -> np.ndarray:
    """Lengths of `count` texts in tokens, (count,) int64."""
    shares = np.array(HISTOGRAM) / sum(HISTOGRAM)
    return SHORTEST + draws.choice(len(HISTOGRAM), count, p=shares)
