"""Running a suite: resuming it, several processes, and that a run is that of `lorica run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorica.benchmark.results import RESULTS, read_results
from lorica.benchmark.runner import Software, run_once, run_suite
from lorica.benchmark.suite import PlannedRun, Suite
from lorica.errors import UserError
from lorica.experiment import Experiment
from lorica.reporting.benchmark import BenchmarkRun
from lorica.run.workers import worker_processes
from tests.benchmark.suites import Scored, cells, small_suite, write_suite

pytestmark = pytest.mark.usefixtures("checked_once")
HERE = Software("0.1.0", "abc", "2.13.0")
TINY = [
    "federation.clients=2",
    "federation.partition=iid",
    "federation.rounds=2",
    "federation.local_steps=1",
    "federation.batch_size=16",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.5",
    "privacy.noise=reproducible",
]
ONE_SETTING: dict[str, Any] = {
    "rates": [0.3, 1],
    "sweeps": [
        {
            "settings": {"head": {"frozen head": ["model.head=freeze"]}},
            "methods": {"as-lora": "as-lora", "ffa-lora": "ffa-lora"},
        }
    ],
}


def scored(planned: PlannedRun) -> float:
    return 0.5 + planned.rate / 10 + planned.seed / 1000


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_run_is_a_line_and_is_never_repeated(tmp_path: Path, jobs: int) -> None:
    suite, executor = small_suite(tmp_path), Scored(scored)
    shown: list[BenchmarkRun] = []
    results = run_suite(suite, executor, jobs, lambda run, results: shown.append(run))
    assert len(executor.asked) == len(results) == suite.with_results({}).planned == 32
    assert [run.digest for run in shown] == list(results)
    assert read_results(suite.folder) == results
    before = (suite.folder / RESULTS).read_bytes()
    again = Scored(scored)
    assert run_suite(suite, again, jobs) == results
    assert again.asked == []
    assert (suite.folder / RESULTS).read_bytes() == before


@pytest.mark.parametrize("kept", [0, 40, -1])
def test_a_line_that_a_kill_cut_off_is_run_again(tmp_path: Path, kept: int) -> None:
    """Of the 20th line so many bytes are left; with -1, all but the line break."""
    suite = small_suite(tmp_path)
    whole = run_suite(suite, Scored(scored), 1)
    path = suite.folder / RESULTS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:19]) + lines[19][:kept])
    assert list(read_results(suite.folder)) == list(whole)[:19]
    rest = Scored(scored)
    assert run_suite(suite, rest, 1) == whole
    assert [planned.digest for planned in rest.asked] == list(whole)[19:]
    assert path.read_bytes() == b"".join(lines)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    run_suite(suite, Scored(scored), 1)
    path = suite.folder / RESULTS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace('"rate"', '"rat"'), *lines[3:]]))
    with pytest.raises(UserError, match="line 3 is not a result"):
        run_suite(suite, Scored(scored), 1)


def test_the_later_of_two_lines_of_a_run_counts(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    first = next(iter(run_suite(suite, Scored(scored), 1).values()))
    with (suite.folder / RESULTS).open("a") as file:
        file.write(first.model_copy(update={"score": 0.25}).model_dump_json() + "\n")
    assert read_results(suite.folder)[first.digest].score == 0.25


def test_two_commands_do_not_work_at_one_benchmark(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)

    def second(run: BenchmarkRun, results: dict[str, BenchmarkRun]) -> None:
        run_suite(suite, Scored(scored), 1)

    with pytest.raises(UserError, match="is in use by"):
        run_suite(suite, Scored(scored), 1, second)


def test_an_error_keeps_what_is_finished(tmp_path: Path) -> None:
    """A worker that was killed breaks the pool; `worker_processes` says so."""

    class Killed(Scored):
        def submit(self, *arguments: Any) -> Future[BenchmarkRun]:  # type: ignore[override]
            future = super().submit(*arguments)
            if len(self.asked) == 4:
                future = Future()
                future.set_exception(BrokenProcessPool())
            return future

    suite = small_suite(tmp_path)
    with pytest.raises(BrokenProcessPool):
        run_suite(suite, Killed(scored), 1)
    assert len(read_results(suite.folder)) == 3


@pytest.fixture
def tiny(tmp_path: Path, some_digits: list[str]) -> Suite:
    return small_suite(tmp_path, overrides=[*TINY, *some_digits], **ONE_SETTING)


@pytest.mark.integration
@pytest.mark.usefixtures("without_report")
def test_a_run_is_that_of_lorica_run(tiny: Suite, tmp_path: Path) -> None:
    planned = tiny.settings["frozen head"][0].results[1][1]
    line = run_once(planned, HERE)
    alone = planned.config.model_copy(update={"name": "alone", "output": str(tmp_path)})
    ledger = alone.privacy.model_copy(update={"ledger": str(tmp_path / "ledger.sqlite")})
    result = Experiment(alone.model_copy(update={"privacy": ledger})).run()
    assert (line.score, line.start, line.metric) == (result.score, result.starting_score, "accuracy")
    assert line.scores == {row["round"]: row["score"] for row in result.metrics}
    assert line.epsilon == result.epsilon
    assert line.noise_multipliers == (1.5, 1.5)
    assert line.bytes_up == sum(sum(row.get("bytes_up", {}).values()) for row in result.metrics) > 0
    assert line.bytes_down == sum(sum(row.get("bytes_down", {}).values()) for row in result.metrics) > 0
    assert (line.purpose, line.rate, line.seed, line.digest) == ("result", 1.0, 1, planned.digest)
    assert line.signal_to_noise is None
    assert (line.lorica, line.git, line.torch) == ("0.1.0", "abc", "2.13.0")


@pytest.mark.integration
def test_a_score_has_its_signal_to_noise_and_shared_noise_both_epsilons(
    tmp_path: Path, some_digits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As-LoRA scores from the third round on."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    shared = ["privacy.noise_against=sums", "federation.secure_sum=true", "federation.min_clients=3"]
    changes = ["federation.clients=3", "federation.rounds=4", *shared]
    suite = small_suite(tmp_path, *changes, overrides=[*TINY, *some_digits], **ONE_SETTING)
    line = run_once(cells(suite)[0].tuning[1][0], HERE)
    assert line.signal_to_noise is not None
    assert line.signal_to_noise > 0
    assert line.epsilon is not None
    assert line.epsilon_own_noise is not None
    assert line.epsilon_own_noise > line.epsilon
    assert list(folder.iterdir()) == []


def test_a_run_that_diverges_is_a_result_without_a_score(tmp_path: Path, some_digits: list[str]) -> None:
    without_noise = [one for one in TINY if not one.startswith("privacy")]
    changes = ["privacy=none", "federation.weights=records", "federation.rounds=4", "federation.local_steps=4"]
    overrides = [*without_noise, *some_digits, *changes, "server.lr=1e6"]
    sweep = {"settings": {"head": {"trained head": []}}, "methods": {"fed-avg": "fed-avg"}}
    suite = small_suite(tmp_path, overrides=overrides, rates=[1e6], reference="fed-avg", sweeps=[sweep])
    line = run_once(cells(suite)[0].tuning[1e6][0], HERE)
    assert line.score is None
    assert line.seed == 100


@pytest.mark.integration
def test_two_processes_give_the_lines_of_one(tmp_path: Path, some_digits: list[str]) -> None:
    found = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        suite = small_suite(folder, overrides=[*TINY, *some_digits], **ONE_SETTING)
        with worker_processes(jobs) as executor:
            results = run_suite(suite, executor, jobs)
        found.append({digest: run.model_copy(update={"seconds": 0}) for digest, run in results.items()})
    assert found[0] == found[1]
    assert len(found[0]) == 2 * (2 + 2)


@pytest.mark.integration
@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGKILL])
def test_the_command_resumes_after_it_was_stopped(tmp_path: Path, some_digits: list[str], signalled: int) -> None:
    """However the command ends, so do its workers; what they were at is repeated."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    path = write_suite(tmp_path, overrides=[*TINY, *some_digits, "federation.rounds=10"], **ONE_SETTING)
    command = [sys.executable, "-m", "lorica", "benchmark", str(path), "--jobs", "2"]
    environment = os.environ | {"TMPDIR": str(temporary)}

    def start() -> subprocess.Popen[bytes]:
        # In a session of its own, as a terminal would start it: Ctrl-C is not ignored.
        return subprocess.Popen(command, env=environment, start_new_session=True)

    process = start()
    results = tmp_path / "small" / RESULTS
    deadline = time.monotonic() + 300
    while not (results.is_file() and len(list(temporary.iterdir())) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, signalled)
    assert process.wait(60) == (130 if signalled == signal.SIGINT else -signal.SIGKILL)
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    before = results.read_bytes()
    assert start().wait(300) == 0
    assert results.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert len(results.read_bytes().splitlines()) == 8
    assert (tmp_path / "small/benchmark.html").is_file()
