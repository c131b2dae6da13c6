"""A generated package: what is in it, that it is found through its entry point, and that its tests pass and fail."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lorica.errors import UserError
from lorica.templates.new_method import class_name, write_package

ROOT = Path(__file__).parent.parent
COMMAND, RUFF = (Path(sys.executable).parent / name for name in ("lorica", "ruff"))
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
NAME, PACKAGE, CLASS = "toy-lora", "lorica_toy_lora", "ToyLoRA"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(NAME, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `sys.path` with the package installed in it, built by its backend where that is at hand."""
    folder = tmp_path_factory.mktemp("site")
    if importlib.util.find_spec("hatchling") is not None:
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, str(package)], check=True)
        return folder
    settings = tomllib.loads((package / "pyproject.toml").read_text())
    project = settings["project"]
    for source in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(package / source, folder / Path(source).name)
    info = folder / f"{PACKAGE}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = project["entry-points"]["lorica.methods"]
    (info / "entry_points.txt").write_text(
        "[lorica.methods]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
    )
    return folder


def run(command: list[object], site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "150", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Toy",
        "toy_lora",
        "toy lora",
        "-toy",
        "toy-",
        "toy--lora",
        "2toy",
        "toy/lora",
        "..",
        "tøy",
        "toy\n",
        41 * "t",
    ],
)
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower-case") as caught:
        write_package(name, tmp_path / "new")
    assert (caught.value.key, caught.value.value) == ("NAME", name)
    assert list(tmp_path.iterdir()) == [tmp_path / "lorica-home"]


def test_a_registered_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is installed"):
        write_package("ffa-lora", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / f"lorica-{NAME}" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(UserError, match=f"lorica-{NAME} exists"):
        write_package(NAME, tmp_path)
    assert list(kept.parent.iterdir()) == [kept]
    assert kept.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_package(NAME, tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("toy-lora", "ToyLoRA"), ("none", "NoneLoRA"), ("method", "MethodLoRA"), ("my-lora-2", "MyLoRA2")],
)
def test_class_names_are_no_keyword_and_no_import(name: str, expected: str, tmp_path: Path) -> None:
    assert class_name(name) == expected
    made = write_package(name, tmp_path) / "src" / f"lorica_{name.replace('-', '_')}" / "method.py"
    tree = ast.parse(made.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == [expected]
    assert expected not in imported


def test_the_files_are_valid_and_say_the_same_name(package: Path) -> None:
    files = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*") if path.is_file()}
    sources = {f"src/{PACKAGE}/__init__.py", f"src/{PACKAGE}/method.py", "tests/test_method.py"}
    assert set(files) == sources | {"pyproject.toml", "README.md"}
    for path in sources:
        ast.parse(files[path])
    assert not any(re.search(r"\{\{|\}\}|\{%", text) for text in files.values())
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["entry-points"] == {"lorica.methods": {NAME: f"{PACKAGE}.method:{CLASS}"}}
    assert [requirement.split(">")[0] for requirement in project["dependencies"]] == ["lorica"]
    heading, _, row = re.findall(r"^\|.*\|$", files["README.md"], flags=re.M)
    assert heading == "| method | trains | sends | aggregation | under DP | paper |"
    assert row.startswith(f"| `{NAME}` |")
    assert row.count("|") == heading.count("|")


def test_the_files_pass_the_house_lint(package: Path) -> None:
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    lint = ["check", "--select", ",".join(ruff["lint"]["select"]), "--ignore", ",".join(ruff["lint"]["ignore"])]
    for command in (lint, ["format", "--check"]):
        options = ["--isolated", "--no-cache", "--line-length", str(ruff["line-length"])]
        done = subprocess.run([RUFF, *command, *options], cwd=package, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.integration
def test_it_is_found_through_its_entry_point_and_its_tests_pass(package: Path, site: Path, tmp_path: Path) -> None:
    listed = run([COMMAND, "methods"], site, tmp_path)
    assert re.search(rf"^ {NAME} +B +B +exact +one +sound; noise linear +0000\.00000", listed.stdout, flags=re.M)
    taken = run([COMMAND, "new-method", NAME], site, tmp_path)
    assert taken.returncode == 2
    assert "installed" in taken.stdout
    done = run([*PYTEST, package / "tests"], site, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


@pytest.mark.integration
def test_its_tests_fail_when_the_method_is_wrong(package: Path, site: Path, tmp_path: Path) -> None:
    """A method that averages both factors and calls that exact, with another scale and an option without its bound."""
    shutil.copytree(site, tmp_path / "site")
    method = tmp_path / "site" / PACKAGE / "method.py"
    text = method.read_text()
    for right, wrong in (('Train("B")', 'Train("AB")'), ("self.options.scale_a *", "2 *"), ("gt=0", "gt=-1")):
        assert right in text
        text = text.replace(right, wrong)
    method.write_text(text)
    done = run([*PYTEST, "-k", "not private_run", package / "tests"], tmp_path / "site", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for failing in (
        "what_holds_for_every_method",
        "about.exact is set",
        "scale_a_multiplies_a_alone",
        "refused[options0]",
    ):
        assert failing in done.stdout
    assert "3 failed, 2 passed" in done.stdout


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    done = run([COMMAND, "new-method", NAME, "--folder", "made"], tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"pip install -e made/lorica-{NAME}" in done.stdout
    assert (tmp_path / "made" / f"lorica-{NAME}" / "pyproject.toml").is_file()
    again = run([COMMAND, "new-method", NAME, "--folder", "made"], tmp_path, tmp_path)
    assert again.returncode == 2
    assert len(again.stdout.strip().splitlines()) == 1
