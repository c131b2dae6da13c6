"""Suites and results for these tests, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from lorica.benchmark.suite import Cell, PlannedRun, Suite, load_suite
from lorica.reporting.benchmark import BenchmarkRun

Score = Callable[[PlannedRun], float | None]
CONTENT: dict[str, Any] = {
    "name": "small",
    "overrides": ["privacy.noise=reproducible", "federation.rounds=2", "federation.local_steps=1"],
    "rates": [0.3, 1],
    "tuning_seeds": [100],
    "seeds": [0, 1],
    "reference": "as-lora",
    "sweeps": [
        {
            "settings": {
                "rank": {"rank 1": ["lora.r=1"], "rank 4": ["lora.r=4"]},
                "epsilon": {"ε = 1": ["privacy.epsilon=1"], "ε = 3": ["privacy.epsilon=3"]},
            },
            "methods": {"as-lora": "as-lora", "B only": "ffa-lora:orthonormal_a=true"},
        }
    ],
}


def write_suite(folder: Path, **changes: Any) -> Path:
    """A suite file with the content of `CONTENT`, with these keys changed; results go below the same folder."""
    content = CONTENT | changes
    content["overrides"] = [f"output={folder}", *content["overrides"]]
    path = folder / "suite.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def small_suite(folder: Path, *overrides: str, **changes: Any) -> Suite:
    return load_suite(write_suite(folder, **changes), list(overrides))


def cells(suite: Suite) -> list[Cell]:
    return [cell for found in suite.settings.values() for cell in found]


def result(planned: PlannedRun, score: float | None) -> BenchmarkRun:
    """The line of a run, with this score and otherwise made-up values."""
    return BenchmarkRun(
        setting=planned.setting,
        method=planned.method,
        purpose=planned.purpose,
        rate=planned.rate,
        seed=planned.seed,
        digest=planned.digest,
        score=score,
        start=0.5,
        metric="accuracy",
        scores={} if score is None else {2: score},
        epsilon=planned.config.privacy.epsilon,
        epsilon_own_noise=None,
        noise_multipliers=(1.0, 2.0),
        bytes_up=2_000_000,
        bytes_down=3_000_000,
        signal_to_noise=0.7 if "as-lora" in planned.method else None,
        seconds=20.0,
        lorica="0.1.0",
        git="abc",
        torch="2.13.0",
    )


def finished(suite: Suite, score: Score, most: int = 10**6) -> dict[str, BenchmarkRun]:
    """Digest -> result of the suite's first runs in the order in which they become due."""
    found: dict[str, BenchmarkRun] = {}
    while len(found) < most and (planned := next(suite.due(found), None)) is not None:
        found[planned.digest] = result(planned, score(planned))
    return found


class Scored(Executor):
    """Gives a score instead of training, and keeps what was asked for, in order."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self.asked: list[PlannedRun] = []

    def submit(self, function: Any, planned: PlannedRun, software: Any) -> Future[BenchmarkRun]:  # type: ignore[override]
        self.asked.append(planned)
        future: Future[BenchmarkRun] = Future()
        future.set_result(result(planned, self._score(planned)))
        return future
