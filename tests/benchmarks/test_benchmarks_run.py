"""The benchmarks still run and print their bars, at sizes that measure nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "bars"),
    [
        ("dp_step.py", ["--model", "vit", "--batch", "4", "--layers", "1", "--repeats", "1"], 2),
        (
            "round.py",
            ["--rounds", "1", "--steps", "1", "--batch", "4", "--records", "60", "--clients", "2", "--no-ablations"],
            1,
        ),
        (
            "aggregation.py",
            ["--shapes", "roberta-large", "--width", "32", "--ranks", "2", "--repeats", "1", "--plot", os.devnull],
            2,
        ),
        ("scale.py", ["--clients", "4,6", "--rounds", "2", "--participants", "3", "--rows", "100"], 2),
        # It fails if the four ways do not end with the same adapter.
        ("federation.py", ["--quick"], 2),
        # It fails if a client of the Flower app has not trained.
        ("flower_opacus.py", ["--quick"], 0),
    ],
)
def test_a_benchmark_runs_and_prints_its_bars(script: str, arguments: list[str], bars: int) -> None:
    command = [sys.executable, BENCHMARKS / script, *arguments, "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("bar")]
    assert len(lines) == bars
