"""Memory and time of preparing texts, at several sizes: peak resident memory must not grow like Python objects would.

Every size runs in a process of its own, once with an empty cache and once with the cache that the first left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from measuring import Clock, machine, memory
from rich.console import Console
from rich.table import Table

WORDS = 13
"""Mean length of SST-2's sentences."""


def prepare(train: Path, test: Path, base: str) -> None:
    """Load a task and print what that took; runs in the child."""
    import lorica.experiment  # noqa: F401 - its imports are not what is measured
    from lorica.config import TaskConfig
    from lorica.tasks.loading import load_task

    before, start = memory("VmRSS"), time.perf_counter()
    task = load_task(TaskConfig(type="text-classification", train=str(train), test=str(test)), base)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
    batch = next(iter(task.train.micro_batches(np.arange(0, len(task.train), max(1, len(task.train) // 128)), 10**6)))
    print(json.dumps({"before": before, "peak": peak, "seconds": seconds, "examples": len(batch)}))


def main(
    base: Annotated[str, typer.Option(help="Folder with a tokenizer, such as all-MiniLM-L6-v2's.")],
    sizes: Annotated[str, typer.Option(help="Comma-separated numbers of records.")] = "10000,100000,1000000",
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print a table: records, seconds and peak memory, without and with the cache."""
    if child:
        train, test = child.split(",")
        prepare(Path(train), Path(test), base)
        return
    table = Table(title="Preparing texts of 13 words on average (JSONL)")
    for heading in ("records", "file", "cache", "seconds", "peak memory", "more than before"):
        table.add_column(heading, justify="right")
    draws = np.random.default_rng(0)
    words = np.array([f"word{index}" for index in range(5000)])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORICA_HOME"] = str(Path(folder) / "home")
        test = _write(Path(folder) / "test.jsonl", 100, draws, words)
        for size in map(int, sizes.split(",")):
            train = _write(Path(folder) / f"{size}.jsonl", size, draws, words)
            for cache in ("empty", "full"):
                command = [sys.executable, __file__, "--base", base, "--child", f"{train},{test}"]
                found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                row = (f"{size:,}", f"{train.stat().st_size / 2**20:.0f} MiB", cache, f"{found['seconds']:.1f}")
                peak, more = (found["peak"], found["peak"] - found["before"])
                table.add_row(*row, f"{peak / 2**20:,.0f} MiB", f"{more / 2**20:,.0f} MiB")
    console = Console(width=120)
    console.print(table)
    console.print(machine(Clock.wall))


def _write(path: Path, size: int, draws: np.random.Generator, words: np.ndarray) -> Path:
    with path.open("w") as file:
        for index, length in enumerate(draws.integers(3, 2 * WORDS - 2, size)):
            text = " ".join(draws.choice(words, length))
            file.write(json.dumps({"text": text, "label": index % 2}) + "\n")
    return path


if __name__ == "__main__":
    typer.run(main)
