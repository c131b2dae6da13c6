"""What a benchmark's runs say: the best rate of each method, its plateau, its result, its difference to the reference.

Nothing here is chosen on the seeds of a result, and the score of a run is that of its last round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from lorica.config import Strict

Purpose = Literal["tuning", "result"]
PLATEAU = 0.02
"""A rate belongs to the plateau if its score is at most this much below the best one."""


class BenchmarkRun(Strict):
    """One finished run: a line of results.jsonl."""

    setting: str
    method: str
    purpose: Purpose
    rate: float
    """`optimizer.lr`."""
    seed: int
    digest: str
    """Identifies the run's configuration (`lorica.benchmark.suite.digest_of`)."""
    score: float | None
    """The main metric on the public test set after the last round; None if the run diverged."""
    start: float | None
    """The same of the initial model."""
    metric: str | None
    scores: dict[int, float]
    """Round -> main metric, for the evaluated rounds."""
    epsilon: float | None
    """The largest ε of a client; None without privacy, or if the run diverged."""
    epsilon_own_noise: float | None
    """The same against a server that sees single replies, if the clients share the noise."""
    noise_multipliers: tuple[float, float] | None
    """The smallest and the largest noise multiplier of a client."""
    bytes_up: int
    bytes_down: int
    """Sent by and to all clients, over all rounds."""
    signal_to_noise: float | None
    """Of the choices of factors: the mean over rounds of the median over choices; None if there were no scores."""
    seconds: float
    lorica: str
    git: str | None
    torch: str


def best_rate(scores: Mapping[float, Sequence[float | None]]) -> float | None:
    """The rate with the highest mean score; the smaller one if two are equal, None if every rate diverged.

    Args:
        scores: rate -> score on each tuning seed; None for a run that diverged, which rules the rate out.
    """
    means = _means(scores)
    return max(means, key=lambda rate: (means[rate], -rate), default=None)


def plateau(scores: Mapping[float, Sequence[float | None]]) -> int:
    """Number of rates whose mean score is at most `PLATEAU` below the best one. A wide plateau spares tuning.

    >>> plateau({0.1: [0.80], 0.3: [0.88], 1.0: [0.87], 3.0: [None]})
    2
    """
    means = _means(scores)
    return sum(mean >= max(means.values()) - PLATEAU for mean in means.values())


def _means(scores: Mapping[float, Sequence[float | None]]) -> dict[float, float]:
    """Rate -> mean score, for the rates at which no run diverged."""
    whole = {rate: [score for score in found if score is not None] for rate, found in scores.items()}
    return {rate: statistics.fmean(found) for rate, found in whole.items() if found and len(found) == len(scores[rate])}
