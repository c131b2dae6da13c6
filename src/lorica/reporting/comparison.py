"""Several runs of several methods, summarised by method."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from lorica.errors import UserError
from lorica.reporting.run_folder import bytes_sent, outcome, seconds_per_round


@dataclass(frozen=True)
class ComparedRun:
    """One run in a comparison: its method, its seed and the lines of its metrics.jsonl.

    `private_release` comes from its privacy.json; None if unknown.
    """

    method: str
    seed: int
    metrics: list[dict[str, Any]]
    private_release: bool | None = None


@dataclass(frozen=True)
class Summary:
    """A method over its seeds: the last evaluated round of each seed, their mean and sample standard deviation.

    `std` is None with a single seed, `start` is None if no run evaluated its initial model, and `epsilon` is None
    without DP. `epsilon` is the maximum over the seeds; bytes and seconds are means over the seeds.
    """

    method: str
    seeds: list[int]
    finals: list[float]
    final_rounds: list[int]
    mean: float
    std: float | None
    start: float | None
    epsilon: float | None
    bytes_up: float
    bytes_down: float
    seconds_per_round: float | None
    server_seconds_per_round: float | None


def by_method(results: list[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """The runs of each method, sorted by seed; methods are sorted by name.

    Raises:
        UserError: there are no runs, a run has no evaluated round after round 0, or a method has the same seed twice.
    """
    if not results:
        raise UserError("results", [], "there is nothing to compare", "give at least one finished run")
    groups: dict[str, list[ComparedRun]] = {}
    for result in sorted(results, key=lambda result: (result.method, result.seed)):
        group = groups.setdefault(result.method, [])
        label = f"{result.method}, seed {result.seed}"
        if group and group[-1].seed == result.seed:
            raise UserError("results", label, "the same method and seed appear twice", "give each run once")
        if outcome(result.metrics).final is None:
            raise UserError(
                "results", label, "no round was evaluated", "finish a round of this run, or leave the run out"
            )
        group.append(result)
    return groups


def summarise(results: list[ComparedRun]) -> list[Summary]:
    """One summary per method, sorted by the mean of the final metric, highest first.

    Raises:
        UserError: as `by_method`.
    """
    summaries = [_summary(method, group) for method, group in by_method(results).items()]
    return sorted(summaries, key=lambda summary: -summary.mean)


def comparison_content(results: list[ComparedRun]) -> dict[str, Any]:
    """A comparison for scripts: each method over its seeds, highest mean first.

    Raises:
        UserError: as `by_method`.
    """
    return {
        "methods": [asdict(summary) for summary in summarise(results)],
        "not_private_runs": sum(result.private_release is False for result in results),
    }


def _summary(method: str, group: list[ComparedRun]) -> Summary:
    outcomes = [outcome(result.metrics) for result in group]
    finals = [float(each.final) for each in outcomes if each.final is not None]
    starts = [each.start for each in outcomes if each.start is not None]
    epsilons = [row["epsilon"] for result in group for row in result.metrics if row.get("epsilon") is not None]
    traffic = [bytes_sent(result.metrics) for result in group]
    return Summary(
        method=method,
        seeds=[result.seed for result in group],
        finals=finals,
        final_rounds=[each.final_round for each in outcomes if each.final_round is not None],
        mean=statistics.fmean(finals),
        std=statistics.stdev(finals) if len(finals) > 1 else None,
        start=statistics.fmean(starts) if starts else None,
        epsilon=max(epsilons, default=None),
        bytes_up=statistics.fmean(up for up, _ in traffic),
        bytes_down=statistics.fmean(down for _, down in traffic),
        seconds_per_round=_mean_seconds(group, "seconds"),
        server_seconds_per_round=_mean_seconds(group, "server_seconds"),
    )


def _mean_seconds(group: list[ComparedRun], key: str) -> float | None:
    times = [seconds_per_round(result.metrics, key) for result in group]
    known = [seconds for seconds in times if seconds is not None]
    return statistics.fmean(known) if known else None
