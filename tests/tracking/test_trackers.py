"""Runs that report to the real trackers, offline: what they get, and that it is theirs alone to fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import lorica
from lorica import registry
from lorica.adapters.base_files import resolve_base
from lorica.config import load
from lorica.engines.flower.server import for_nodes
from lorica.errors import UserError
from lorica.privacy.ledger_file import read_ledger
from lorica.registry import TRACKERS
from lorica.tasks.loading import load_tests
from lorica.tracking.base import TrackedRun
from lorica.tracking.public import public_metrics, public_settings
from tests.reports import draw_nothing
from tests.small import SMALLEST

SMALL = [*SMALLEST, "federation.rounds=4"]
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
INSTALLED = [name for name, package in PACKAGES.items() if find_spec(package) is not None]
pytestmark = pytest.mark.usefixtures("checked_once")


def experiment(folder: Path, some_digits: list[str], *overrides: str) -> lorica.Experiment:
    places = [f"output={folder}", f"privacy.ledger={folder}/ledger.sqlite"]
    return lorica.Experiment.load(overrides=[*SMALL, *some_digits, *places, *overrides])


def stopped_after(round_number: int) -> Callable[[dict[str, Any]], None]:
    def stop(row: dict[str, Any]) -> None:
        if row["round"] == round_number:
            raise KeyboardInterrupt

    return stop


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, some_digits: list[str]) -> Iterator[lorica.Experiment]:
    """A run that reports to all installed trackers, was stopped after round 2, and resumed."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        patched.setenv("WANDB_MODE", "offline")
        # Files, because a new database takes seconds.
        patched.setenv("MLFLOW_TRACKING_URI", f"{folder}/mlruns")
        patched.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patched.setenv("TRACKIO_DIR", str(folder / "trackio"))
        run = experiment(folder, some_digits, f"report_to={INSTALLED}")
        with pytest.raises(KeyboardInterrupt):
            run.run(on_round=stopped_after(2))
        run.run()
        yield run


def expected(run: lorica.Experiment) -> dict[str, list[tuple[int, float]]]:
    """Name -> (round, value) of each public metric, by metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (run.config.folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("accuracy", "loss", "epsilon", "seconds", "server_seconds"):
            if name in row:
                found.setdefault(name, []).append((row["round"], row[name]))
        for name in ("participants", "missing"):
            if name in row:
                found.setdefault(name, []).append((row["round"], len(row[name])))
        for name in ("bytes_up", "bytes_down"):
            if name in row:
                found.setdefault(name, []).append((row["round"], sum(row[name].values())))
    return found


def assert_reported(found: Mapping[str, list[tuple[int, float]]], run: lorica.Experiment) -> None:
    wanted = expected(run)
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points]), name
    assert [step for step, _ in found["accuracy"]] == [0, 1, 2, 3, 4]


@pytest.mark.integration
def test_tensorboard_has_each_round_once(tracked: lorica.Experiment) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked.config.folder / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert_reported({name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}, tracked)
    (text,) = events.Tensors("configuration/text_summary")
    assert b"| method.name | as-lora |" in text.tensor_proto.string_val[0]


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    content, place, record = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        room = 2**15 - place % 2**15
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if room < 7 or kind == 0:
            place += room
            continue
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last part.
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.integration
def test_wandb_has_each_round_once_in_one_run(tracked: lorica.Experiment) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    identity = json.loads((tracked.config.folder / "environment.json").read_text())["run"]
    files = sorted((tracked.config.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    found: dict[str, list[tuple[int, float]]] = {}
    for record in map(Record.FromString, (record for file in files for record in wandb_records(file))):
        assert record.WhichOneof("record_type") not in ("stats", "output", "output_raw"), "only what `log` gets"
        for item in record.history.item:
            name = item.key or item.nested_key[0]
            if not name.startswith("_"):
                found.setdefault(name, []).append((record.history.step.num, float(item.value_json)))
    assert_reported(found, tracked)


@pytest.mark.integration
def test_mlflow_has_each_round_once_in_one_run(tracked: lorica.Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(f"{tracked.config.folder.parent}/mlruns")
    place = client.get_experiment_by_name("lorica")
    assert place is not None
    (run,) = client.search_runs([place.experiment_id])
    assert (run.info.run_name, run.info.status) == (tracked.config.name, "FINISHED")
    assert run.data.params["privacy.noise_multiplier"] == "1.5"
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    assert_reported({name: [(one.step, one.value) for one in history] for name, history in histories.items()}, tracked)


@pytest.mark.integration
def test_trackio_has_each_round_once_in_one_run(tracked: lorica.Experiment) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("lorica")
    assert name.startswith(f"{tracked.config.name}-")
    found: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs("lorica", name):
        for key, value in row.items():
            if key not in ("step", "timestamp"):
                found.setdefault(key, []).append((row["step"], value))
    assert_reported(found, tracked)


class Recorder:
    """A tracker in memory, which may fail."""

    opened: list[TrackedRun]
    rounds: list[int]
    ended: list[bool]
    fails_in: int | None = None

    def __init__(self, run: TrackedRun) -> None:
        self.opened.append(run)

    def log(self, metrics: Mapping[str, float], round_number: int) -> None:
        if round_number == self.fails_in:
            raise ConnectionError("the tracker's server is gone")
        print("a tracker that prints")
        self.rounds.append(round_number)

    def close(self, finished: bool) -> None:
        self.ended.append(finished)


class Unusable(Recorder):
    def __init__(self, run: TrackedRun) -> None:
        raise RuntimeError("no key is configured\nUsage: …")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """The only trackers are `recorder`, `unusable`, and `absent`, whose package is not installed."""
    kind = type("Recorder", (Recorder,), {"opened": [], "rounds": [], "ended": []})
    places = {"recorder": "Kind", "unusable": "Unusable", "absent": "Absent"}
    entries = {name: EntryPoint(name, f"{__name__}:{place}", TRACKERS) for name, place in places.items()}
    entries["absent"] = EntryPoint("absent", "a_package_that_is_not_installed:Absent", TRACKERS)
    monkeypatch.setitem(globals(), "Kind", kind)
    registered = registry.registered

    def only_these(group: str) -> Mapping[str, EntryPoint]:
        return MappingProxyType(entries) if group == TRACKERS else registered(group)

    for module in ("lorica.config", "lorica.tracking.base"):
        monkeypatch.setattr(f"{module}.registered", only_these)
    return kind


no_report = pytest.mark.usefixtures("without_report")


@pytest.mark.integration
@no_report
def test_a_tracker_that_fails_is_left_and_the_run_goes_on(
    tmp_path: Path,
    some_digits: list[str],
    recorder: type[Recorder],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorder.fails_in = 2
    result = experiment(tmp_path, some_digits, "report_to=recorder").run()
    assert [row["round"] for row in result.metrics] == [0, 1, 2, 3, 4]
    assert recorder.rounds == [0, 1]
    assert recorder.ended == []
    (warning,) = [message for message in caplog.messages if "recorder" in message]
    assert "the tracker's server is gone" in warning
    assert "a tracker that prints" not in capsys.readouterr().out


@no_report
def test_a_resumed_run_goes_on_at_its_trackers_and_repeats_no_round(
    tmp_path: Path, some_digits: list[str], recorder: type[Recorder]
) -> None:
    run = experiment(tmp_path, some_digits, "report_to=[recorder]")
    with pytest.raises(KeyboardInterrupt):
        run.run(on_round=stopped_after(0))
    # No round has a checkpoint: the initial model is evaluated again.
    assert recorder.rounds == []
    with pytest.raises(KeyboardInterrupt):
        run.run(on_round=stopped_after(3))
    run.run()
    run.run()
    assert recorder.rounds == [0, 1, 2, 3, 4]
    assert recorder.ended == [False, False, True]
    assert [one.finished for one in recorder.opened] == [-1, -1, 3]
    assert len({one.id for one in recorder.opened}) == 1


@no_report
@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ("absent", r"its package is not installed \(.*\)\. Run pip install \"lorica\[absent\]\""),
        ("unusable", r"it cannot be used \(no key is configured\)\. Correct this, or remove unusable from report_to"),
        ("recorders", "no such tracker. Did you mean 'recorder'?"),
    ],
)
def test_a_tracker_that_cannot_be_used_stops_a_run_before_it_costs_anything(
    tmp_path: Path, some_digits: list[str], recorder: type[Recorder], tracker: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        experiment(tmp_path, some_digits, f"report_to=[recorder, {tracker}]").run()
    ledger = tmp_path / "ledger.sqlite"
    book = read_ledger(ledger) if ledger.is_file() else None
    assert book is None or (book.entries, book.own) == ([], [])
    assert recorder.ended == ([False] if tracker == "unusable" else [])


def test_trackers_are_told_no_path_and_nodes_no_tracker(tmp_path: Path, recorder: type[Recorder]) -> None:
    base = tmp_path / "secret-place" / "encoder"
    base.mkdir(parents=True)
    paths = {"output": tmp_path, "model.base": base, "lora.start": tmp_path / "adapter"}
    paths |= {"task.train": tmp_path / "patients.csv", "privacy.ledger": tmp_path / "ledger"}
    config = load(None, [f"{key}={path}" for key, path in paths.items()] + ["report_to=recorder"])
    settings = public_settings(config)
    assert str(tmp_path) not in json.dumps(settings)
    assert (settings["model.base"], settings["privacy.epsilon"], settings["method.name"]) == ("encoder", 3.0, "as-lora")
    default = load(None, ["report_to=recorder"])
    sent = for_nodes(default, load_tests(default.task, resolve_base(default.model.base)))
    assert sent.report_to == []


def test_public_metrics_are_numbers_without_what_names_a_client() -> None:
    row = {
        "round": 3,
        "metric": "f1",
        "f1": 0.5,
        "score": 0.5,
        "epsilon": 1.5,
        "participants": [0, 4],
        "missing": [4],
        "bytes_up": {"0": 7},
        "bytes_down": {"0": 8, "4": 9},
        "client_scores": {"0": 0.25},
    }
    assert public_metrics(row) == {
        "f1": 0.5,
        "epsilon": 1.5,
        "participants": 2,
        "missing": 1,
        "bytes_up": 7,
        "bytes_down": 17,
    }


@pytest.mark.integration
@no_report
def test_a_finished_run_with_other_trackers_is_the_same_experiment(
    tmp_path: Path, some_digits: list[str], recorder: type[Recorder]
) -> None:
    result = experiment(tmp_path, some_digits, "report_to=recorder").run()
    content = (result.folder / "metrics.jsonl").read_bytes()
    assert experiment(tmp_path, some_digits).run().metrics == result.metrics
    assert (result.folder / "metrics.jsonl").read_bytes() == content
