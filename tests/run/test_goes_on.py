"""Runs that go on: one process at a time, the same data, whole files, finite numbers."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

import lorica
from lorica.adapters.base_files import resolve_base
from lorica.config import ExperimentConfig, load
from lorica.errors import UserError
from lorica.files import to_json
from lorica.reporting.checksums import COVERED, write_checksums
from lorica.reporting.html import write_report
from lorica.run.data import check_fingerprints, fingerprints, write_fingerprints
from lorica.run.divergence import Diverged, check_finite, check_metrics
from lorica.run.folder import keep_rounds
from lorica.run.lock import LOCK, locked
from lorica.run.result import Result
from tests.tiers import integration

SMALL = [
    "federation.clients=2",
    "federation.partition=iid",
    "federation.rounds=3",
    "federation.local_steps=1",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.5",
    "privacy.noise=reproducible",
]


def overrides(folder: Path, some_digits: list[str], *more: str) -> list[str]:
    return [*SMALL, *some_digits, f"output={folder}", f"privacy.ledger={folder}/ledger", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, some_digits: list[str]) -> Result:
    """An uninterrupted run."""
    return lorica.Experiment.load(overrides=overrides(tmp_path_factory.mktemp("whole"), some_digits)).run()


@pytest.fixture
def finished(tmp_path: Path, whole: Result, some_digits: list[str]) -> Iterator[lorica.Experiment]:
    """The same run, whose folder and ledger are restored after the test."""
    saved = shutil.copytree(whole.folder.parent, tmp_path / "saved")
    yield lorica.Experiment.load(overrides=overrides(whole.folder.parent, some_digits))
    shutil.rmtree(whole.folder.parent)
    shutil.copytree(saved, whole.folder.parent)


@pytest.fixture
def original(tmp_path: Path, whole: Result) -> Result:
    """A copy of the uninterrupted run, to compare with."""
    folder = shutil.copytree(whole.folder, tmp_path / "original")
    return replace(whole, folder=folder, adapter=folder / "adapter")


def assert_as_uninterrupted(result: Result, whole: Result) -> None:
    mine, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (result, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert [row["accuracy"] for row in result.metrics] == [row["accuracy"] for row in whole.metrics]
    assert [row["steps"] for row in result.privacy["clients"]] == [row["steps"] for row in whole.privacy["clients"]]
    names = {path.name for path in whole.folder.iterdir()}
    assert {path.name for path in result.folder.iterdir()} == names
    assert {"report.html", "accuracy.png", "checksums.json", "data.json"} <= names


def hold(folder: Path, ready: Any) -> None:
    with locked(folder):
        ready.set()
        signal.pause()


@pytest.mark.integration
def test_a_second_process_is_told_who_runs_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed"])
    ready = context.Event()
    other = context.Process(target=hold, args=(folder, ready))
    other.start()
    assert ready.wait(120)
    with pytest.raises(UserError, match=rf"is in use by process {other.pid} on .+ since 2"), locked(folder):
        pass
    other.kill()
    other.join()
    with locked(folder), pytest.raises(UserError, match="is in use by process"), locked(folder):
        pass
    assert not (folder / LOCK).exists()


def test_the_lock_leaves_nothing_behind_and_readers_need_none(tmp_path: Path, finished: lorica.Experiment) -> None:
    with locked(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with locked(finished.config.folder):
        write_report(finished.config.folder)


@pytest.mark.parametrize(
    "lost", ["report.html", "adapter", *integration("accuracy.png", "checksums.json", "privacy.json")]
)
def test_what_is_missing_of_a_finished_run_is_written(finished: lorica.Experiment, original: Result, lost: str) -> None:
    """As if it had been killed before it wrote that."""
    path = finished.config.folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if lost in ("privacy.json", "adapter"):
        (finished.config.folder / "report.html").unlink()
    assert_as_uninterrupted(finished.run(), original)


@pytest.mark.integration
def test_an_empty_folder_or_one_with_unfinished_files_only_is_free(
    tmp_path: Path, some_digits: list[str], whole: Result
) -> None:
    experiment = lorica.Experiment.load(overrides=overrides(tmp_path, some_digits))
    experiment.config.folder.mkdir(parents=True)
    (experiment.config.folder / ".config.yaml.abc.incomplete").write_text("name: dig")
    assert_as_uninterrupted(experiment.run(), whole)


class Stop(Exception):
    pass


def stop_after(number: int) -> Callable[[dict[str, Any]], None]:
    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == number:
            raise Stop

    return stop


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[:middle],
            "zeroed": bytes(len(content)),
            "another byte": content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :],
        }[how]
    )


HOW = ["empty", "truncated", "zeroed", "another byte"]


@pytest.mark.parametrize("how", HOW)
def test_damage_of_a_finished_run_is_one_error_that_names_the_file(finished: lorica.Experiment, how: str) -> None:
    folder = finished.config.folder
    names = [name for name in (*COVERED, "checksums.json", "data.json") if (folder / name).exists()]
    for name in [*names, *(f"adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json"))]:
        path = folder / name
        content = path.read_bytes()
        damage(path, how)
        # A wrong checksum cannot be told from a wrong file.
        named = r"\.jsonl? = .*damaged" if name == "checksums.json" else path.name
        with pytest.raises(UserError, match=named):
            finished.run()
        path.write_bytes(content)
    assert finished.run().metrics


@pytest.mark.integration
def test_the_remedies_for_a_damaged_finished_run_work(finished: lorica.Experiment, original: Result) -> None:
    folder = finished.config.folder
    damage(folder / "privacy.json", "truncated")
    damage(folder / "adapter" / "adapter_model.safetensors", "zeroed")
    with pytest.raises(UserError, match="Delete it and run again"):
        finished.run()
    (folder / "privacy.json").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged|does not match its checksum"):
        lorica.load_adapter(folder / "adapter")
    assert_as_uninterrupted(finished.run(), original)


@pytest.mark.integration
@pytest.mark.usefixtures("without_report")
def test_each_damaged_checkpoint_can_be_deleted_as_advised_even_in_the_next_round(
    tmp_path: Path, some_digits: list[str], whole: Result
) -> None:
    """Clients have stored replies of round 3 when the checkpoint of round 2 is found damaged."""
    experiment = lorica.Experiment.load(overrides=overrides(tmp_path, some_digits))
    with pytest.raises(Stop):
        experiment.run(on_round=stop_after(2))
    saved = shutil.copytree(experiment.config.folder, tmp_path / "saved")
    with pytest.raises(Stop):
        experiment.run(on_round=stop_after(3))
    shutil.rmtree(experiment.config.folder)
    shutil.copytree(saved, experiment.config.folder)
    latest = experiment.config.folder / "checkpoint" / "round-000002"
    for name, how in [("state.json", "another byte"), ("state.safetensors", "zeroed"), ("state.json", "empty")]:
        content = (latest / name).read_bytes()
        damage(latest / name, how)
        with pytest.raises(UserError, match=f"is damaged.*Delete {latest}"):
            experiment.run()
        (latest / name).write_bytes(content)
    shutil.rmtree(latest)
    result = experiment.run()
    mine, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (result, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert [row["steps"] for row in result.privacy["clients"]] == [3, 3]


@pytest.mark.usefixtures("without_report")
def test_a_folder_set_back_too_far_is_a_clear_error(finished: lorica.Experiment) -> None:
    folder = finished.config.folder
    shutil.rmtree(folder / "checkpoint")
    (folder / "checksums.json").unlink()
    (folder / "metrics.jsonl").unlink()
    (folder / "decisions.jsonl").unlink()
    with pytest.raises(UserError, match=r"does not allow this run to go on \(client 0: round 1 is over.*Set name"):
        finished.run()


def test_rounds_are_kept_up_to_the_checkpoint_or_the_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"round": number}) + "\n" for number in range(4)]
    path.write_text("".join(lines) + '{"rou')
    keep_rounds(path, 0, 2)
    assert path.read_text() == "".join(lines[:3])
    for wrong in ("", lines[0], lines[0] + lines[2], lines[0] + "[]\n" + lines[2], "\0" * 40):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"metrics\.jsonl.*damaged.*delete it"):
            keep_rounds(path, 0, 2)
    path.write_text(lines[2])
    keep_rounds(path, 0, 2)
    path.write_text('{"rou')
    keep_rounds(path, 0, -1)
    assert path.read_text() == ""


def of_files(train: Path, test: Path, *more: str) -> ExperimentConfig:
    task = [f"task.train={train}", f"task.test={{one: {test}}}", "task.type=text-classification"]
    return load(overrides=[*task, *more])


def test_changed_data_are_named_and_files_that_are_gone_are_not(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text,label\na,b\n")
    test.write_text("text,label\nc,d\n")
    config = of_files(train, test)
    write_fingerprints(tmp_path, "run", fingerprints(config))
    check_fingerprints(tmp_path, config, fingerprints(config))
    for path, key in ((train, r"task\.train"), (test, r"task\.test\.one")):
        content = path.read_text()
        path.write_text(content + "e,f\n")
        with pytest.raises(UserError, match=rf"^{key} = .*{path.name}.*have changed since run.*Set name to a new run"):
            check_fingerprints(tmp_path, config, fingerprints(config))
        path.unlink()
        check_fingerprints(tmp_path, config, fingerprints(config))
        path.write_text(content)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_changed_image_that_a_table_names_is_a_change_of_the_data(tmp_path: Path, kind: str) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8), len(name)).save(tmp_path / name)
    path = tmp_path / f"table.{kind}"
    rows = [{"image": "a.png", "label": "x"}, {"image": "b.png", "label": "y"}]
    if kind == "csv":
        path.write_text("image,label\na.png,x\nb.png,y\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    config = load(overrides=[f"task.train={path}", f"task.test={path}"])
    before = fingerprints(config)
    assert fingerprints(config) == before
    Image.new("L", (8, 8), 200).save(tmp_path / "b.png")
    assert fingerprints(config)["task.train"] != before["task.train"]
    (tmp_path / "b.png").unlink()
    assert fingerprints(config)["task.train"] != before["task.train"]


def test_changed_models_are_named(tmp_path: Path, whole: Result) -> None:
    base = shutil.copytree(Path(resolve_base("lorica:glyph-vit")), tmp_path / "base")
    start = shutil.copytree(whole.adapter, tmp_path / "start")
    data = tmp_path / "data.csv"
    data.write_text("text,label\na,b\n")
    config = of_files(data, data, f"model.base={base}", f"lora.start={start}")
    write_fingerprints(tmp_path, "run", fingerprints(config))
    for path, key in ((base / "config.json", r"model\.base"), (start / "adapter_model.safetensors", r"lora\.start")):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        with pytest.raises(UserError, match=rf"^{key} = .*have changed since run"):
            check_fingerprints(tmp_path, config, fingerprints(config))
        path.write_bytes(content)
    check_fingerprints(tmp_path, config, fingerprints(config))


def test_a_fingerprint_cannot_be_guessed_without_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = tmp_path / "train.csv"
    train.write_text("text,label\na,b\n")
    config = of_files(train, train)
    first = fingerprints(config)
    write_fingerprints(tmp_path, "run", first)
    monkeypatch.setenv("LORICA_HOME", str(tmp_path / "another"))
    assert fingerprints(config)["task.train"] != first["task.train"]
    # Nothing can be compared with another key.
    train.write_text("text,label\nother,b\n")
    check_fingerprints(tmp_path, config, fingerprints(config))


def test_a_stopped_run_does_not_go_on_with_other_records(
    tmp_path: Path, some_digits: list[str], without_report: None
) -> None:
    for place in some_digits:
        source = Path(place.partition("=")[2])
        shutil.copy(source, tmp_path / source.name)
    own = [f"task.{split}={tmp_path / split}.parquet" for split in ("train", "test")]
    experiment = lorica.Experiment.load(overrides=overrides(tmp_path / "out", own))
    with pytest.raises(Stop):
        experiment.run(on_round=stop_after(1))
    table = parquet.read_table(tmp_path / "train.parquet")
    parquet.write_table(table.slice(0, table.num_rows - 1), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"task\.train.*have changed since run"):
        experiment.run()
    place = experiment.config.folder / "environment.json"
    environment = place.read_text()
    # Under another id, the ledger would seem to have charged nothing.
    place.write_text(json.dumps(json.loads(environment) | {"run": "another"}))
    (experiment.config.folder / "data.json").rename(tmp_path / "data.json")
    stored = json.loads((tmp_path / "data.json").read_text())
    (experiment.config.folder / "data.json").write_text(json.dumps(stored | {"files": {}}))
    with pytest.raises(UserError, match=r"environment\.json.*id of its run"):
        experiment.run()
    place.write_text(environment)
    # The ledger knows it too.
    (experiment.config.folder / "data.json").unlink()
    with pytest.raises(UserError, match=r"training data have changed since run"):
        experiment.run()


def test_a_run_that_diverges_stops_and_leaves_no_adapter(tmp_path: Path, some_digits: list[str]) -> None:
    """With learning rates inside their bounds, without noise."""
    small = [one for one in SMALL if not one.startswith("privacy")]
    some = [*small, *some_digits, f"output={tmp_path}", "privacy=none"]
    rates = ["optimizer.lr=1e6", "server.lr=1e6", "method.name=fed-avg"]
    experiment = lorica.Experiment.load(overrides=[*some, *rates, "federation.local_steps=4"])
    for _ in range(2):
        with pytest.raises(
            Diverged, match=r"^optimizer\.lr = 1000000\.0: the run diverged in round \d.*Lower optimizer"
        ):
            experiment.run()
        assert not (experiment.config.folder / "adapter").exists()
        for path in experiment.config.folder.glob("*.json*"):
            assert not {"NaN", "Infinity"} & set(path.read_text().replace(":", " ").replace(",", " ").split()), path


def test_numbers_that_are_not_finite_are_named() -> None:
    check_finite(0.1, 2, {"x": torch.ones(2)}, {"y": (torch.ones(2, 1), torch.ones(1, 2))})
    with pytest.raises(Diverged, match="in round 2: x is not finite"):
        check_finite(0.1, 2, {"x": torch.tensor([1.0, np.inf])}, {})
    with pytest.raises(Diverged, match="y is not finite"):
        check_finite(0.1, 2, {}, {"y": (torch.ones(2, 1), torch.full((1, 2), np.nan))})
    with pytest.raises(Diverged, match="the loss on the test set is nan"):
        check_metrics(0.1, 2, {"accuracy": 0.1, "loss": np.nan})
    assert json.loads(to_json({"a": [np.inf, 1.5], "b": {"c": float("nan")}})) == {"a": [None, 1.5], "b": {"c": None}}


def test_checksums_cover_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    write_checksums(tmp_path)
    assert set(json.loads((tmp_path / "checksums.json").read_text())) == {"config.yaml"}
