"""The same federation with Lorica, and with PEFT and Opacus in Flower's simulation: time, memory and throughput.

    python benchmarks/flower_opacus.py

Both fine-tune the embedded digits' base model with LoRA factors A and B of query and value, and the head: DP-SGD with
the same clip norm, noise, batch and steps at every client, every client in each round, and the mean of the adapters.
Lorica is `lorica run` with its default, local engine. The other is `flower_opacus_app.py`, by `flwr run` on a SuperLink
that simulates the clients with Ray, with Flower's default resources.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import psutil
import tomli_w
import typer
from federation import SAMPLE_SECONDS, Memory, held
from measuring import begin
from rich.table import Table

from lorica.engines.flower.launch import simulation
from lorica.engines.flower.processes import environment, run_app, stop

RECORDS = 1437
APP = "flower_opacus_app"
CLIP_NORM, NOISE_MULTIPLIER, RATE = 1.0, 1.0, 0.5


class Size(NamedTuple):
    """Of the experiment."""

    clients: int
    rounds: int
    steps: int
    threads: int

    @property
    def batch(self) -> int:
        """A quarter of a client's records, rounded up."""
        return math.ceil(RECORDS / self.clients / 4)

    @property
    def lorica_records(self) -> float:
        """Expected number of records in a round. Which are in a batch, and how many, is secret."""
        return self.steps * self.clients * self.batch

    @property
    def opacus_records(self) -> float:
        """As `lorica_records`. Opacus samples with the rate 1/(number of whole batches, rounded up)."""
        own = [len(part) for part in np.array_split(np.arange(RECORDS), self.clients)]
        return self.steps * sum(count / math.ceil(count / self.batch) for count in own)


class Measured(NamedTuple):
    """Of one way.

    Attributes:
        records: expected in a round.
        start_up: seconds from the command to the first round.
        seconds: of each round.
        memory: at the peak, of all processes that train or serve.
    """

    records: float
    start_up: float
    seconds: list[float]
    memory: Memory

    @property
    def round(self) -> float:
        """Mean seconds of a round: without the first, which warms up, and the last, which may also export."""
        return statistics.mean(self.seconds[1:-1])

    @property
    def records_per_second(self) -> float:
        return self.records / self.round


class Watched:
    """The peak memory of a process and its children, sampled in a thread."""

    def __init__(self) -> None:
        self.peak = Memory(0, 0)
        self._over = threading.Event()

    @contextmanager
    def family_of(self, process: psutil.Process) -> Iterator[None]:
        watcher = threading.Thread(target=self._watch, args=[process], daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            watcher.join()

    def _watch(self, process: psutil.Process) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            try:
                family = {process, *process.children(recursive=True)}
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, held(family))


def measure_lorica(folder: Path, size: Size) -> Measured:
    """`lorica run` with secure noise and a ledger."""
    overrides = [
        "name=measured",
        f"output={folder}",
        "method.name=fed-avg",
        f"federation.clients={size.clients}",
        "federation.partition=iid",
        "federation.weights=uniform",
        f"federation.rounds={size.rounds}",
        f"federation.evaluate_every={size.rounds}",
        f"federation.local_steps={size.steps}",
        f"federation.batch_size={size.batch}",
        f"optimizer.lr={RATE}",
        f"model.threads={size.threads}",
        "privacy.epsilon=null",
        f"privacy.noise_multiplier={NOISE_MULTIPLIER}",
        f"privacy.clip_norm={CLIP_NORM}",
        f"privacy.ledger={folder / 'ledger.sqlite'}",
    ]
    log, watched = folder / "run.log", Watched()
    around = environment(folder / "flwr") | {"LORICA_HOME": str(folder / "lorica")}
    started = time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["lorica", "run", *overrides], env=around, stdout=output, stderr=output, start_new_session=True
        )
    try:
        with watched.family_of(psutil.Process(process.pid)):
            process.wait()
    finally:
        stop(process)
    if process.returncode != 0:
        sys.exit(f"the run failed: {log.read_text(errors='replace')[-2000:]}")
    metrics = folder / "measured" / "metrics.jsonl"
    rounds = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [found["seconds"] for found in rounds if found["round"] > 0]
    # The file's last line is written when the last round ends, and between rounds there is nothing that takes long.
    return Measured(size.lorica_records, metrics.stat().st_mtime - sum(seconds) - started, seconds, watched.peak)


def measure_flower(folder: Path, size: Size) -> Measured:
    """PEFT and Opacus in Flower's simulation; its log goes to this terminal."""
    app, times, watched = folder / "app", folder / "times.json", Watched()
    write_app(app, size, times)
    started = time.time()
    with simulation(folder) as (superlink, around), watched.family_of(psutil.Process(superlink.pid)):
        run_app(app, "simulation", around, size.clients)
    found = json.loads(times.read_text())
    if not found["learned"]:
        sys.exit("no client of the Flower app has trained: see its log above")
    return Measured(
        size.opacus_records, times.stat().st_mtime - sum(found["seconds"]) - started, found["seconds"], watched.peak
    )


def write_app(app: Path, size: Size, times: Path) -> None:
    """The Flower app `flower_opacus_app.py` as a folder that `flwr run` takes."""
    app.mkdir()
    shutil.copy(Path(__file__).parent / f"{APP}.py", app)
    settings: dict[str, Any] = {
        "clients": size.clients,
        "rounds": size.rounds,
        "steps": size.steps,
        "batch": size.batch,
        "threads": size.threads,
        "lr": RATE,
        "clip-norm": CLIP_NORM,
        "noise-multiplier": NOISE_MULTIPLIER,
        "times": str(times),
    }
    components = {"serverapp": f"{APP}:server", "clientapp": f"{APP}:client"}
    (app / "LICENSE").write_text("Apache-2.0\n")
    content = {
        "project": {"name": "peft-opacus", "version": "1.0.0", "license": {"file": "LICENSE"}},
        "tool": {"flwr": {"app": {"publisher": "lorica", "components": components, "config": settings}}},
    }
    (app / "pyproject.toml").write_text(tomli_w.dumps(content))


def table(size: Size, measured: dict[str, Measured]) -> Table:
    title = f"{size.clients} clients, {size.steps} steps with a batch of {size.batch}"
    result = Table("way", "start-up", "round", "records per second", "MiB", "PSS", title=title)
    for name, found in measured.items():
        memory = [f"{value / 2**20:,.0f}" for value in found.memory]
        result.add_row(name, f"{found.start_up:.1f}", f"{found.round:.2f}", f"{found.records_per_second:,.0f}", *memory)
    return result


def main(
    clients: Annotated[list[int] | None, typer.Option(help="Default: 6 and 100.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="The first and the last are not in the mean.")] = 6,
    steps: Annotated[int, typer.Option(help="Of every client in a round.")] = 3,
    threads: Annotated[int, typer.Option(help="Of every process that trains.")] = 1,
    quick: Annotated[bool, typer.Option(help="The smallest sizes; they measure nothing.")] = False,
) -> None:
    """Run both ways one after another for each number of clients, and print them side by side."""
    console = begin(threads, "flwr", "ray")
    sizes = [Size(number, rounds, steps, threads) for number in clients or [6, 100]]
    tables = []
    for size in [Size(2, 3, 1, threads)] if quick else sizes:
        with tempfile.TemporaryDirectory(prefix="lorica-benchmark-", ignore_cleanup_errors=True) as scratch:
            measured = {}
            for name, way in {"Lorica": measure_lorica, "PEFT + Opacus in Flower": measure_flower}.items():
                folder = Path(scratch) / name.split()[0]
                folder.mkdir()
                measured[name] = way(folder, size)
        ours, theirs = measured.values()
        tables.append((table(size, measured), ours.records_per_second / theirs.records_per_second))
    for shown, faster in tables:
        console.print(shown)
        console.print(f"Lorica's records per second are {faster:.2f} x those of the other way")
    console.print("Seconds, by the wall clock; memory of all processes at its peak, sampled every second.")


if __name__ == "__main__":
    typer.run(main)
