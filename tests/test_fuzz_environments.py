"""Environments that people have: whatever is set, a command answers, and prints no traceback.

`LORICA_FUZZ_SEED` chooses other combinations.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzzing import draws_of

# None: not set.
VARIABLES: dict[str, list[str | None]] = {
    "LC_ALL": [None, "C", "POSIX", "C.UTF-8", "de_DE.ISO-8859-1", "tr_TR.UTF-8", "nonsense"],
    "LANG": [None, "C", "en_US.UTF-8", "ja_JP.SJIS"],
    "PYTHONIOENCODING": [None, "ascii", "ascii:strict", "cp1252", "latin-1", "utf-16", "utf-8:surrogateescape"],
    "PYTHONUTF8": [None, "0", "1"],
    "PYTHONCOERCECLOCALE": [None, "0"],
    "PYTHONOPTIMIZE": [None, "1"],
    "PYTHONWARNINGS": [None, "always"],
    "PYTHONDONTWRITEBYTECODE": [None, "1"],
    "MPLBACKEND": [None, "", "TkAgg", "nonsense", "module://matplotlib_inline.backend_inline"],
    "MPLCONFIGDIR": [None, "", "/dev/null", "/absent/x"],
    "HOME": [None, "", "/dev/null", "/absent/x", "READ-ONLY"],
    "XDG_CACHE_HOME": [None, "/dev/null", "/absent/x"],
    "TMPDIR": [None, "", "/dev/null", "/absent/x", "a folder of ümlauts"],
    "http_proxy": [None, "http://127.0.0.1:9", "nonsense"],
    "HTTPS_PROXY": [None, "http://127.0.0.1:9", "socks5://127.0.0.1:9"],
    "no_proxy": [None, "", "*"],
    "HF_HUB_OFFLINE": ["1", "true", "yes"],
    "HF_HOME": [None, "/dev/null", "/absent/x"],
    "HF_TOKEN": [None, "nonsense"],
    "COLUMNS": [None, "0", "1", "-7", "20", "80", "100000", "many"],
    "LINES": [None, "0", "many"],
    "TERM": [None, "", "dumb", "nonsense", "xterm-256color"],
    "NO_COLOR": [None, "", "1"],
    "FORCE_COLOR": [None, "1"],
    "TTY_COMPATIBLE": [None, "1"],
    "OMP_NUM_THREADS": ["1", "0", "many", "1,2"],
    "CUDA_VISIBLE_DEVICES": [None, "", "-1", "many"],
    "TOKENIZERS_PARALLELISM": [None, "true", "many"],
    "TZ": [None, "nonsense", "Asia/Kathmandu"],
    "USER": [None, ""],
}
TINY = [
    "federation.clients=2",
    "federation.partition=iid",
    "federation.rounds=1",
    "federation.local_steps=1",
    "federation.batch_size=16",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.5",
]


def without_current_folder() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


CIRCUMSTANCES: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "strict umask": lambda: os.umask(0o777),
    "no current folder": without_current_folder,
    "no standard input": lambda: os.close(0),
    "no standard error": lambda: os.close(2),
    "a session of its own": os.setsid,
}


def combination(number: int) -> tuple[dict[str, str | None], str]:
    """Some variables, and a circumstance in every second one."""
    draws = draws_of("environment", number)
    names = draws.sample(sorted(VARIABLES), draws.randint(2, 8))
    circumstance = draws.choice(sorted(CIRCUMSTANCES)) if number % 2 else "none"
    return {name: draws.choice(VARIABLES[name]) for name in names}, circumstance


def answer(folder: Path, command: list[str], number: int) -> None:
    changes, circumstance = combination(number)
    (folder / "READ-ONLY").mkdir(mode=0o500, exist_ok=True)
    usual = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LORICA_HOME": str(folder / "home")}
    around: dict[str, Any] = dict(os.environ) | usual | changes
    own = {name: str(folder / value) if value == "READ-ONLY" else value for name, value in around.items()}
    done = subprocess.run(
        [sys.executable, "-m", "lorica", *command],
        cwd=folder,
        env={name: value for name, value in own.items() if value is not None},
        capture_output=True,
        preexec_fn=CIRCUMSTANCES[circumstance],
        timeout=300,
        check=False,
    )
    output = (done.stdout + done.stderr).decode("utf-16" if changes.get("PYTHONIOENCODING") == "utf-16" else "latin-1")
    case = f"{number}: {changes}, {circumstance}: {command[0]} exits with {done.returncode}\n{output}"
    assert "Traceback" not in output, case
    # What cannot be written, or a folder that is gone, is one error, before anything has run.
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() if line.startswith("error ")]
    expected = command[0] == "run" or (command[0] == "methods" and circumstance == "no current folder")
    refused = expected and done.returncode == 2 and len(lines) == 1
    assert done.returncode == 0 or refused, case
    assert command[0] != "run" or refused or list(folder.rglob("report.html")), case


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_help_answers_in_any_environment(tmp_path: Path, count: int) -> None:
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        answer(folder, ["--help"], number)


@pytest.mark.integration
@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_methods_and_a_run_answer_in_any_environment(tmp_path: Path, some_digits: list[str], count: int) -> None:
    for number in range(count):
        for command in (["methods"], ["run", *TINY, *some_digits, f"output={tmp_path / str(number) / 'runs'}"]):
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            answer(folder, command, number)
