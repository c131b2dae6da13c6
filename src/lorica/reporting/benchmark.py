"""What a benchmark's runs say: the best rate of each method, its plateau, its result, its difference to the reference.

Nothing here is chosen on the seeds of a result, and the score of a run is that of its last round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.stats

from lorica.config import Strict

Purpose = Literal["tuning", "result"]
PLATEAU = 0.02
"""A rate belongs to the plateau if its score is at most this much below the best one."""
CONFIDENCE, RESAMPLES = 0.95, 99_999


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


@dataclass(frozen=True)
class Entry:
    """One method in one setting, with what is finished of it.

    Attributes:
        group: the setting's name without its ε; settings of a group differ in nothing else.
        target: the ε that the noise is calibrated to; None without privacy.
        refusal: why the method cannot run in this setting; None if it can.
        rate: the best rate on the tuning seeds (`best_rate`); None until all tuning runs are finished.
        tuning: rate -> its finished tuning runs.
        results: finished runs at the best rate.
        planned_tuning, planned_results: number of runs when all are finished.
    """

    setting: str
    group: str
    method: str
    target: float | None
    refusal: str | None
    rate: float | None
    tuning: Mapping[float, Sequence[BenchmarkRun]]
    results: Sequence[BenchmarkRun]
    planned_tuning: int
    planned_results: int

    @property
    def runs(self) -> list[BenchmarkRun]:
        """All finished runs."""
        return [*(run for runs in self.tuning.values() for run in runs), *self.results]

    @property
    def planned(self) -> int:
        """Number of runs, finished or not."""
        return self.planned_tuning + self.planned_results

    @property
    def scores(self) -> list[float]:
        """The score of each seed; empty if a result has diverged, since the others would flatter the method."""
        found = [run.score for run in self.results if run.score is not None]
        return found if len(found) == len(self.results) else []

    @property
    def mean(self) -> float | None:
        """The mean score over the seeds."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def std(self) -> float | None:
        """The sample standard deviation over the seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def plateau(self) -> int:
        """`plateau` of the finished tuning runs."""
        return plateau({rate: [run.score for run in runs] for rate, runs in self.tuning.items()})


@dataclass(frozen=True)
class Difference:
    """Mean difference of two methods over the seeds that both have; the interval is None for a single seed."""

    mean: float
    interval: tuple[float, float] | None
    seeds: int


@dataclass(frozen=True)
class Benchmark:
    """A suite with its results.

    Attributes:
        reference: the method that the others are compared with.
        entries: setting by setting.
        command: what was run.
        suite: the text of the suite file.
    """

    name: str
    reference: str
    entries: Sequence[Entry]
    command: str
    suite: str

    def by_setting(self) -> dict[str, list[Entry]]:
        """Setting -> its entries."""
        return _grouped((entry.setting, entry) for entry in self.entries)

    @property
    def not_started(self) -> list[str]:
        """The settings without a finished run."""
        return [name for name, entries in self.by_setting().items() if not any(entry.runs for entry in entries)]

    def by_group(self) -> dict[str, list[Entry]]:
        """Group -> its entries, for the groups with more than one ε."""
        groups = _grouped((entry.group, entry) for entry in self.entries)
        return {name: found for name, found in groups.items() if len({entry.setting for entry in found}) > 1}

    @property
    def finished(self) -> int:
        """Number of finished runs."""
        return sum(len(entry.runs) for entry in self.entries)

    @property
    def planned(self) -> int:
        """Number of runs when all are finished; those that a method refuses are not planned."""
        return sum(entry.planned for entry in self.entries if entry.refusal is None)

    def versions(self) -> list[tuple[str, str, str, int]]:
        """Version of Lorica, commit, version of PyTorch, and the number of runs with these, most first."""
        found: dict[tuple[str, str, str], int] = {}
        for entry in self.entries:
            for run in entry.runs:
                key = (run.lorica, run.git or "no checkout", run.torch)
                found[key] = found.get(key, 0) + 1
        return [(*key, count) for key, count in sorted(found.items(), key=lambda item: -item[1])]


def leader(entries: Iterable[Entry]) -> Entry | None:
    """The entry with the highest mean; None before the first result."""
    found = [(entry.mean, entry) for entry in entries if entry.mean is not None]
    return max(found, key=lambda item: item[0])[1] if found else None


def difference(entry: Entry, reference: Entry) -> Difference | None:
    """Paired difference in score: a seed gives both methods the same split, initialisation and order of clients.

    None if they share no seed, or if a run of either diverged.
    """
    if not (entry.scores and reference.scores):
        return None
    other = {run.seed: run.score for run in reference.results}
    pairs = [(run.score, other[run.seed]) for run in entry.results if run.seed in other]
    values = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return Difference(statistics.fmean(values), interval(values), len(values)) if values else None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean; None for a single value.

    Not BCa, which is undefined where all values are equal. Of few values a bootstrap knows little: that of five normal
    ones covers the mean in 84 % of cases, and it never leaves the range of the values.
    """
    if len(values) < 2:
        return None
    found = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


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


def _grouped(pairs: Iterable[tuple[str, Entry]]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for name, entry in pairs:
        found.setdefault(name, []).append(entry)
    return found
