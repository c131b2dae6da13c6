"""What a federation costs beside its training: start-up, seconds per round and memory, of four ways to run the same.

    python benchmarks/federation.py

The local engine, Flower's simulation, and SuperLink and SuperNodes on loopback (examples/federation/loopback.py), cold
and warm: without and with the process that keeps the base model between messages. Each way is a `lorica run` of the
embedded digits in one Parquet file per client, with research noise, so that all four must end with the same adapter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple

import psutil
import safetensors.torch
import torch
import typer
from measuring import begin, verdict
from rich.table import Table
from torch import Tensor

from lorica.engines.flower.processes import environment, stop
from lorica.messages import OWNER

SAMPLE_SECONDS = 1.0
END_SECONDS = 15.0
BAR = 2.0


class Size(NamedTuple):
    """Of the experiment."""

    clients: int
    rounds: int
    local_steps: int
    threads: int


class Memory(NamedTuple):
    """Bytes that processes hold.

    Attributes:
        alone: as on a machine of their own: a page that several of them share counts once.
        proportional: a page counts by their part of all processes of this machine that share it (PSS).
    """

    alone: int
    proportional: int


class Measured(NamedTuple):
    """Of one way.

    Attributes:
        before: seconds to start SuperLink and nodes, one after another; None where the command starts all itself.
        start_up: seconds from the command to the start of the first round.
        seconds: of each round.
        memory: at the peak, of one node or, where all is one machine's, of everything.
        adapter: what the run ends with.
    """

    before: float | None
    start_up: float
    seconds: list[float]
    memory: Memory
    adapter: dict[str, Tensor]

    @property
    def round(self) -> float:
        """Mean seconds of a round: without the first, which warms up, and the last, which also delivers the adapter."""
        return statistics.mean(self.seconds[1:-1])


def loopback() -> ModuleType:
    """The example, which is no package."""
    path = Path(__file__).parent.parent / "examples" / "federation" / "loopback.py"
    spec = importlib.util.spec_from_file_location("loopback", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_on_one_machine(folder: Path, size: Size, *overrides: str) -> Measured:
    """The local engine, or Flower's simulation; memory is that of the command and all that it starts."""
    files = [str(file) for file in loopback().divide_digits(folder, size.clients)]
    data = [
        f"task.train={json.dumps(files)}",
        "federation.partition=files",
        f"privacy.ledger={folder / 'ledger.sqlite'}",
    ]
    around = environment(folder / "flwr") | {"LORICA_HOME": str(folder / "lorica")}
    return _measure(folder, size, [*data, *overrides], around, None, None)


def measure_federation(folder: Path, size: Size, worker: bool) -> Measured:
    """Real SuperLink and SuperNodes; memory is that of the first node."""
    example = loopback()
    example.divide_digits(folder, size.clients)
    overrides = ["engine=flower", "flower.superlink=loopback", f"task.train={OWNER}"]
    policy = example.POLICY | {"noise": ["secure", "reproducible"]}
    started = time.perf_counter()
    with _no_worker_left(folder), example.Loopback(folder) as running:
        for owner in range(size.clients):
            running.register(owner, policy)
        nodes = [running.start_node(owner, worker=worker) for owner in range(size.clients)]
        before = time.perf_counter() - started

        def members() -> set[psutil.Process]:
            return _family(nodes[0]) | _workers(folder / "owner-0")

        return _measure(folder, size, overrides, environment(running.home), members, before)


def held(processes: set[psutil.Process]) -> Memory:
    """What processes hold now, from Linux."""
    private, proportional = 0, 0
    files: dict[str, int] = {}
    for process in processes:
        # Some live for one message.
        with suppress(psutil.NoSuchProcess):
            for found in process.memory_maps():
                proportional += found.pss
                if found.path.startswith("/"):
                    private += found.private_dirty
                    files[found.path] = max(files.get(found.path, 0), found.rss - found.private_dirty)
                else:
                    private += found.rss
    return Memory(private + sum(files.values()), proportional)


def same(adapters: list[dict[str, Tensor]]) -> bool:
    """Whether all are equal bit for bit, and have learned something."""
    first, *others = adapters
    equal = all(
        first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
        for other in others
    )
    return equal and any(bool(value.any()) for name, value in first.items() if "lora_B" in name)


def table(measured: dict[str, Measured]) -> Table:
    result = Table("way", "nodes", "start-up", "round", "MiB", "PSS", "of", title="Seconds; memory at its peak")
    for name, found in measured.items():
        before = "-" if found.before is None else f"{found.before:.1f}"
        memory = [f"{value / 2**20:,.0f}" for value in found.memory]
        whole = "everything" if found.before is None else "one node"
        result.add_row(name, before, f"{found.start_up:.1f}", f"{found.round:.2f}", *memory, whole)
    return result


def _measure(
    folder: Path,
    size: Size,
    overrides: list[str],
    around: dict[str, str],
    members: Callable[[], set[psutil.Process]] | None,
    before: float | None,
) -> Measured:
    """Run the experiment, and watch the memory of some processes, by default of the command and all that it starts."""
    shape = [
        f"federation.clients={size.clients}",
        "federation.weights=uniform",
        f"federation.rounds={size.rounds}",
        f"model.threads={size.threads}",
    ]
    shape += [f"federation.local_steps={size.local_steps}", f"federation.evaluate_every={size.rounds}"]
    command = ["lorica", "run", "name=measured", f"output={folder}", "privacy.noise=reproducible", *shape, *overrides]
    log, memory = folder / "run.log", Memory(0, 0)
    started = time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=around, stdout=output, stderr=output, start_new_session=True)
    try:
        while process.poll() is None:
            memory = max(memory, held(members() if members is not None else _family(process)))
            time.sleep(SAMPLE_SECONDS)
    finally:
        stop(process)
    if process.returncode != 0:
        sys.exit(f"the run failed: {log.read_text(errors='replace')[-2000:]}")
    metrics = folder / "measured" / "metrics.jsonl"
    rounds = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [found["seconds"] for found in rounds if found["round"] > 0]
    # The file's last line is written when the last round ends, and between rounds there is nothing that takes long.
    start_up = metrics.stat().st_mtime - sum(seconds) - started
    adapter = safetensors.torch.load_file(folder / "measured" / "adapter" / "adapter_model.safetensors")
    return Measured(before, start_up, seconds, memory, adapter)


@contextmanager
def _no_worker_left(folder: Path) -> Iterator[None]:
    """Workers belong to no process: they end by themselves, some time after their SuperNode."""
    try:
        yield
    finally:
        for worker in psutil.wait_procs(_workers(folder), END_SECONDS)[1]:
            with suppress(psutil.NoSuchProcess):
                worker.kill()


def _workers(folder: Path) -> set[psutil.Process]:
    """Of the nodes whose data are in a folder."""
    lines = {process: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return {
        process
        for process, line in lines.items()
        if "lorica.engines.flower.warm" in line and any(f"{folder}{os.sep}" in part for part in line)
    }


def _family(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    try:
        first = psutil.Process(process.pid)
        return {first, *first.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def main(
    rounds: Annotated[int, typer.Option(min=3, help="The first and the last are not in the mean.")] = 5,
    threads: Annotated[int, typer.Option(help="Of every process that trains.")] = 1,
    quick: Annotated[bool, typer.Option(help="The smallest sizes; they measure nothing.")] = False,
) -> None:
    """Run the four ways one after another, print them side by side, and compare their adapters."""
    console = begin(threads, "flwr")
    size = Size(1, 3, 1, threads) if quick else Size(3, rounds, 8, threads)
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="lorica-benchmark-", ignore_cleanup_errors=True) as scratch:
        ways: dict[str, Callable[[Path], Measured]] = {
            "local engine": lambda folder: measure_on_one_machine(folder, size),
            "simulation": lambda folder: measure_on_one_machine(folder, size, "engine=flower"),
            "loopback, cold": lambda folder: measure_federation(folder, size, worker=False),
            "loopback, warm": lambda folder: measure_federation(folder, size, worker=True),
        }
        for name, way in ways.items():
            folder = Path(scratch) / name.replace(", ", "-").replace(" ", "-")
            folder.mkdir()
            measured[name] = way(folder)
            console.print(f"{name}: rounds of {', '.join(f'{took:.2f}' for took in measured[name].seconds)} s")
    console.print(table(measured))
    faster = measured["loopback, cold"].round / measured["loopback, warm"].round
    console.print(
        f"bar 1: a warm round at least {BAR:.0f} x as fast as a cold one: {faster:.1f} x: {verdict(faster >= BAR)}"
    )
    equal = same([found.adapter for found in measured.values()])
    console.print(f"bar 2: all four end with the same adapter, bit for bit: {verdict(equal)}")
    if not equal:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
