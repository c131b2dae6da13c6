"""Run what is left of a suite in several processes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice

from lorica.benchmark.results import add_result, drop_partial_line, read_results
from lorica.benchmark.suite import PlannedRun, Suite
from lorica.engines.local import prepare_local
from lorica.reporting.benchmark import BenchmarkRun
from lorica.reporting.choices import median_signal_to_noise
from lorica.reporting.run_folder import Run, bytes_sent, outcome, own_noise_epsilon, read_run, score_of
from lorica.run.divergence import Diverged
from lorica.run.folder import git_revision
from lorica.run.lock import locked
from lorica.run.rounds import train

OnResult = Callable[[BenchmarkRun, dict[str, BenchmarkRun]], None]


@dataclass(frozen=True)
class Software:
    """What the runs are computed with."""

    lorica: str
    git: str | None
    torch: str

    @classmethod
    def here(cls) -> Software:
        return cls(version("lorica"), git_revision(), version("torch"))


def run_suite(
    suite: Suite, executor: Executor, jobs: int, on_result: OnResult = lambda run, results: None
) -> dict[str, BenchmarkRun]:
    """Run everything that is not in the results yet, and append each result as soon as its run is finished.

    Args:
        executor: computes up to `jobs` runs at once.
        on_result: called with each new result, and with all results by digest.

    Returns:
        Digest -> finished run.

    Raises:
        UserError: a run cannot be started, or another process is at the same benchmark. Finished runs are kept.
    """
    with locked(suite.folder):
        drop_partial_line(suite.folder)
        results, software = read_results(suite.folder), Software.here()
        running: dict[Future[BenchmarkRun], str] = {}
        while True:
            free = (run for run in suite.due(results) if run.digest not in running.values())
            for planned in islice(free, jobs - len(running)):
                running[executor.submit(run_once, planned, software)] = planned.digest
            if not running:
                return results
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                run = future.result()
                add_result(suite.folder, run)
                results[run.digest] = run
                on_result(run, results)


def run_once(planned: PlannedRun, software: Software) -> BenchmarkRun:
    """Run one run in a temporary folder, with a ledger of its own.

    Raises:
        UserError: as `lorica.experiment.Experiment.run`, except that a run that diverges is a result without a score.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lorica-") as folder:
        privacy = planned.config.privacy.model_copy(update={"ledger": f"{folder}/ledger.sqlite"})
        config = planned.config.model_copy(update={"output": folder, "report_to": [], "privacy": privacy})
        try:
            prepared, engine = prepare_local(config)
            found = read_run(train(prepared, engine, data={}).folder)
        except Diverged:
            found = None
    return _line(planned, found, time.perf_counter() - started, software)


def _line(planned: PlannedRun, found: Run | None, seconds: float, software: Software) -> BenchmarkRun:
    """The line of a run; with `found` None, of one that diverged."""
    metrics = [] if found is None else found.metrics
    clients = [] if found is None else found.clients
    ratios = [] if found is None else [ratio for _, ratio in median_signal_to_noise(found)]
    noise = [client["noise_multiplier"] for client in clients if client.get("noise_multiplier") is not None]
    up, down = bytes_sent(metrics)
    reached = outcome(metrics)
    scores = {int(row["round"]): score for row in metrics if (score := score_of(row)) is not None}
    return BenchmarkRun(
        setting=planned.setting,
        method=planned.method,
        purpose=planned.purpose,
        rate=planned.rate,
        seed=planned.seed,
        digest=planned.digest,
        score=reached.final,
        start=reached.start,
        metric=next((str(row["metric"]) for row in metrics if "metric" in row), None),
        scores=scores,
        epsilon=max((client["epsilon"] for client in clients if client.get("epsilon") is not None), default=None),
        epsilon_own_noise=None if found is None else own_noise_epsilon(found),
        noise_multipliers=(min(noise), max(noise)) if noise else None,
        bytes_up=up,
        bytes_down=down,
        signal_to_noise=sum(ratios) / len(ratios) if ratios else None,
        seconds=round(seconds, 2),
        lorica=software.lorica,
        git=software.git,
        torch=software.torch,
    )
