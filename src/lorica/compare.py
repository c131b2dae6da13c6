"""A resumable sweep over methods and seeds, each run with the same everything else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorica.config import ExperimentConfig, load
from lorica.experiment import Experiment
from lorica.files import write_atomically
from lorica.reporting.comparison import Result
from lorica.reporting.html import write_comparison
from lorica.run.result import Result as RunResult
from lorica.run.rounds import OnStart
from lorica.run.variants import Variant


def compare(
    config: ExperimentConfig,
    variants: list[Variant],
    seeds: list[int],
    on_run: Callable[[str, int, int, int], None] = lambda label, seed, index, count: None,
    on_start: OnStart = lambda prepared, federation, finished_rounds: None,
    on_round: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> tuple[Path, list[Result]]:
    """Run every method with every seed; finished runs are kept, an interrupted one is resumed.

    All runs share steps, noise, head policy, data and tuning, but for what a variant's own keys say; a seed sets
    partition, initialisation and client order alike for every method. The page is rewritten after every run.

    Returns:
        the comparison's page, and one result a run.
    """
    folder = config.folder.with_name(f"{config.name}-comparison")
    runs = [(variant, seed) for seed in seeds for variant in variants]
    configs = {(variant.label, seed): _single(variant, seed, folder) for variant, seed in runs}
    results: list[Result] = []
    page = folder / "comparison.html"
    for index, (variant, seed) in enumerate(runs, start=1):
        on_run(variant.label, seed, index, len(runs))
        finished: RunResult = Experiment(configs[variant.label, seed]).run(on_start, on_round)
        results.append(Result(variant.label, seed, finished.metrics, finished.privacy["private_release"]))
        page = write_comparison(folder, results)
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    return page, results


def _single(variant: Variant, seed: int, folder: Path) -> ExperimentConfig:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", variant.label) + f"-seed{seed}"
    return load(variant.config.model_dump() | {"name": name, "seed": seed, "output": str(folder)})
