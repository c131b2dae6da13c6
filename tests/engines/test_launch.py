"""The app that Lorica writes for Flower, as Flower's own commands take it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from lorica.config import load
from lorica.engines.flower.launch import with_absolute_paths
from lorica.engines.flower.processes import environment
from lorica.errors import UserError

COMMANDS = Path(sys.executable).parent


def init(folder: Path, *overrides: str, code: int = 0) -> str:
    command = [COMMANDS / "lorica", "flower", "init", "app", *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.integration
@pytest.mark.parametrize("name", ["digits-as-lora", "A_name.that-Flower-would_refuse-for-its-length"])
def test_flower_builds_the_app_and_its_configuration_is_the_experiment(tmp_path: Path, name: str) -> None:
    output = init(tmp_path, f"name={name}", "method.name=fedask", "federation.clients=5")
    assert "flwr run app local --stream" in output
    assert "num-supernodes=5" in output
    command = [COMMANDS / "flwr", "build", "--app", "app"]
    subprocess.run(command, cwd=tmp_path, env=environment(tmp_path / "flwr"), check=True, capture_output=True)
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as content:
        assert {"pyproject.toml", "README.md", "policy.yaml", "LICENSE"} <= set(content.namelist())
        app = tomllib.loads(content.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    experiment = load(json.loads(app["config"]["experiment"]))
    overrides = [f"name={name}", "method.name=fedask", "federation.clients=5", "engine=flower"]
    assert experiment == load(None, [*overrides, f"output={tmp_path / 'runs'}"])
    for component in app["components"].values():
        module, attribute = component.split(":")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute)


def test_an_app_for_a_superlink_is_run_there(tmp_path: Path) -> None:
    assert "flwr run app hospital --stream" in init(tmp_path, "flower.superlink=hospital")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "notes.txt").write_text("mine")
    assert "is not empty" in init(tmp_path, code=2)
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["notes.txt"]


def test_local_paths_hold_wherever_flower_runs_and_other_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "base").mkdir()
    overrides = ["task.train=[a.csv,'part-*.csv',org/set]", "task.test=lorica:digits/test", "model.base=base"]
    overrides += ["privacy.ledger=own.sqlite"]
    config = with_absolute_paths(load(None, overrides))
    assert config.task.train == [str(tmp_path / "a.csv"), str(tmp_path / "part-*.csv"), "org/set"]
    assert config.task.test == "lorica:digits/test"
    assert config.model.base == str(tmp_path / "base")
    assert config.privacy.ledger == str(tmp_path / "own.sqlite")
    assert config.output == str(tmp_path / "runs")


def test_without_flower_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"lorica\[flower\]"):
        environment()
