"""What `pip install lorica` installs is whole: the wheel alone runs in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lorica"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("lorica-*.whl")
    return built


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    files = {path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lorica/")}
    assert packed == {path.relative_to(SOURCE.parent).as_posix() for path in files}


def test_it_runs_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Among the installed libraries, but with this Lorica before the one that is installed to be edited."""
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    pip("install", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def python(*arguments: str) -> str:
        # -P: nothing is imported from the working folder.
        command = [sys.executable, "-P", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert Path(python("-c", "import lorica; print(lorica.__file__)")).is_relative_to(installed)
    result = json.loads(python("-m", "lorica", "run", "federation.rounds=2", "--json"))
    assert result["epsilon"] <= 3
    assert result["private_release"]
    assert (empty / result["report"]).is_file()
    (prediction, *_) = python("-m", "lorica", "predict", result["adapter"], "lorica:digits/test").splitlines()
    assert set(json.loads(prediction)) == {"label", "score"}
    python("-m", "lorica", "new-method", "my-lora")
    assert (empty / "lorica-my-lora" / "pyproject.toml").is_file()
