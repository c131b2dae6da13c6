"""What the benchmarks share: interleaved timing, peak memory, a description of the machine."""

from __future__ import annotations

import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from lorica.adapters.loading import has_bf16


class Clock(StrEnum):
    """`wall`: time that passes. `cpu`: time of the processor; with one thread, what others run does not count."""

    wall = "wall"
    cpu = "cpu"

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter() if self is Clock.wall else time.process_time()


def interleaved(steps: Mapping[str, Callable[[], None]], repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` times, in rounds of one call of each, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = clock.now()
            step()
            if repeat:
                seconds[name].append(clock.now() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of what was measured in the same round: a machine that is slow for a while cancels out."""
    return statistics.median(above / below for above, below in zip(numerator, denominator, strict=True))


def memory(field: str) -> int | None:
    """Bytes of this process's memory, from Linux: `VmRSS` is what it holds now, `VmHWM` the most it ever held."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[field].removesuffix("kB")) * 1024


def machine(clock: Clock) -> str:
    """One line on where and how the numbers arose."""
    kind = next(iter(_models()), platform.processor() or platform.machine())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "opacus"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    features = f"{torch.backends.cpu.get_cpu_capability()}, bf16 instructions: {'yes' if has_bf16() else 'no'}"
    return (
        f"{kind}, {os.cpu_count()} cores, {features}, threads: {torch.get_num_threads()}, {clock.value} clock, "
        f"load {load}; {packages}"
    )


def begin(threads: int, *packages: str) -> Console:
    """Set the threads of PyTorch, and print the machine and the versions of some more packages by the wall clock.

    What `kill` sends unwinds like Ctrl-C from now on, so that nothing is left running.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(threads)
    console = Console()
    console.print(", ".join([machine(Clock.wall), *(f"{name} {version(name)}" for name in packages)]))
    return console


def verdict(met: bool) -> str:
    """For the end of a bar's line."""
    return "[green]met[/green]" if met else "[red]not met[/red]"


def _models() -> list[str]:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
