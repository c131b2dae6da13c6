"""Paths that a person may give: impossible ones are one error, odd ones are quoted in printed commands."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lorica
from lorica import cli
from lorica.config import load
from lorica.errors import UserError
from lorica.paths import LONGEST_PATH, path_problem, user_path
from lorica.run.lock import locked

LONG_NAME = "é" * 128
LONG_PATH = "/".join(["x" * 200] * 20)
PLACES = [
    "run output=PATH",
    "run name=PATH",
    "run task.train=PATH",
    "run task.train=[PATH]",
    "run task.test=PATH",
    "run task.test={one: PATH}",
    "run privacy.ledger=PATH",
    "run model.base=PATH",
    "run lora.start=PATH",
    "run PATH",
    "compare PATH",
    "report PATH",
    "hash PATH",
    "budget PATH",
    "budget PATH --accept",
    "budget . --policy PATH",
    "flower init PATH",
    "flower keys PATH",
    "new-method my-lora --folder PATH",
]


def call(*arguments: str, code: int = 2) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli.console, "width", 200)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", [LONG_NAME, LONG_PATH], ids=["name", "path"])
@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_is_too_long_is_one_line(place: str, path: str, tmp_path: Path) -> None:
    output = call(*(part.replace("PATH", path) for part in shlex.split(place.replace("{one: PATH}", "'{one: PATH}'"))))
    assert len(output.strip().splitlines()) == 1
    assert output.startswith("error ")
    assert not re.search("Errno|Traceback", output)
    assert [file.name for file in tmp_path.iterdir() if file.name != "lorica-home"] == []


def test_what_no_file_system_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, problem in (
        ("a\0b", "null character"),
        ("\ud800", "these characters"),
        ("~nobody-of-this-name/x", "home folder"),
        ("x" * 256, "longer than 255 bytes"),
        ("x/" * LONGEST_PATH, "longer than 3,800 bytes"),
    ):
        assert problem in str(path_problem(path))
        with pytest.raises(UserError, match=f"^key = .*{problem}"):
            user_path("key", path)
    assert path_problem("x" * 255 + "/" + "ü" * 127) is None
    monkeypatch.setenv("HOME", "/home/of-this-test")
    assert user_path("key", "~/x") == Path("/home/of-this-test/x")
    with pytest.raises(UserError, match=r"^task\.test = .*null character"):
        load(overrides=['task.test={one: "a\\0b"}'])


def test_a_file_in_the_place_of_a_new_folder_is_one_line() -> None:
    Path("file").write_text("x")
    for arguments in (
        ["flower", "init", "file"],
        ["flower", "init", "file/x"],
        ["flower", "keys", "file"],
        ["new-method", "my-lora", "--folder", "file"],
        ["run", "output=file"],
        ["run", "output=file/x"],
    ):
        assert len(call(*arguments).strip().splitlines()) == 1
    assert Path("file").read_text() == "x"


def test_printed_commands_are_quoted() -> None:
    odd = "a; rm -rf [bold]x[/bold] é"
    assert f"pip install -e '{odd}/lorica-my-lora'" in call("new-method", "my-lora", "--folder", odd, code=0)
    assert f"flwr run '{odd}/app' local" in call("flower", "init", f"{odd}/app", code=0)


def test_what_the_system_says_about_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(folder: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(folder / "metrics.jsonl"))

    monkeypatch.setattr("lorica.reporting.html.write_report", denied)
    output = call("report", "runs/x")
    assert output.startswith("error file = 'runs/x/metrics.jsonl': cannot be used (Permission denied). Check the path")
    assert len(output.strip().splitlines()) == 1


def test_a_current_folder_that_is_gone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match="run folder cannot be created"), locked(Path("runs/x")):
        pass
    os.chdir(tmp_path)


def test_long_labels_of_a_comparison_become_names_of_folders() -> None:
    from lorica.compare import _single
    from lorica.run.variants import Variant

    config = lorica.Experiment.load().config
    labels = [f"as-lora:{'server.lr=0.5+' * 30}server.denoise={way}" for way in ("none", "kalman")]
    names = {_single(Variant(label, config), 12, Path("out")).name for label in labels}
    assert len(names) == 2
    assert all(len(name) < 150 for name in names)
