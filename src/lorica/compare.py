"""A resumable sweep over methods and seeds, with all other settings equal."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorica.config import ExperimentConfig, load
from lorica.experiment import Experiment
from lorica.files import write_atomically
from lorica.reporting.comparison import ComparedRun
from lorica.reporting.html import write_comparison
from lorica.run.result import Result
from lorica.run.rounds import OnStart
from lorica.run.variants import Variant

LONGEST_LABEL = 120
"""Characters of a variant's label in the name of its folder; a longer one ends in a hash."""


def compare(
    config: ExperimentConfig,
    variants: list[Variant],
    seeds: list[int],
    on_run: Callable[[str, int, int, int], None] = lambda label, seed, index, count: None,
    on_start: OnStart = lambda prepared, federation, finished_rounds: None,
    on_round: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> tuple[Path, list[ComparedRun]]:
    """Run every variant with every seed. Finished runs are kept; an interrupted one is resumed.

    All runs share the configuration except for a variant's own method and options. A seed gives every method the same
    partition, initialisation and client order. The page is rewritten after every run.

    Returns:
        The path of the comparison page, and one `ComparedRun` per run.
    """
    folder = config.folder.with_name(f"{config.name}-comparison")
    runs = [(variant, seed) for seed in seeds for variant in variants]
    configs = {(variant.label, seed): _single(variant, seed, folder) for variant, seed in runs}
    runs_done: list[ComparedRun] = []
    page = folder / "comparison.html"
    for index, (variant, seed) in enumerate(runs, start=1):
        on_run(variant.label, seed, index, len(runs))
        finished: Result = Experiment(configs[variant.label, seed]).run(on_start, on_round)
        runs_done.append(ComparedRun(variant.label, seed, finished.metrics, finished.privacy["private_release"]))
        page = write_comparison(folder, runs_done)
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    return page, runs_done


def _single(variant: Variant, seed: int, folder: Path) -> ExperimentConfig:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", variant.label)
    if len(name) > LONGEST_LABEL:
        name = f"{name[:LONGEST_LABEL]}-{hashlib.sha256(variant.label.encode()).hexdigest()[:8]}"
    name += f"-seed{seed}"
    return load(variant.config.model_dump() | {"name": name, "seed": seed, "output": str(folder)})
