"""A resumable sweep over methods and seeds, each run with the same everything else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorica.config import ExperimentConfig, load
from lorica.errors import UserError
from lorica.experiment import Experiment
from lorica.files import write_atomically
from lorica.methods.base import registry
from lorica.reporting.comparison import Result
from lorica.reporting.html import write_comparison
from lorica.run.result import Result as RunResult
from lorica.run.rounds import OnStart


@dataclass(frozen=True)
class Variant:
    """A method in a comparison, with its options; `label` is how tables and plots call it.

    Attributes:
        overrides: `section.key=value` of the experiment, for this variant alone.
    """

    label: str
    method: dict[str, Any]
    overrides: tuple[str, ...] = ()


def parse_variant(label: str, config: ExperimentConfig) -> Variant:
    """`as-lora`, or with options `as-lora:score=energy+server.denoise=kalman`.

    A key with a dot is one of the experiment, such as those of `local` and `server`; one without is the method's own.
    Options in the configuration's own `method` section hold for that method only.

    Raises:
        UserError: no such method, or an option not of the form `key=value`.
    """
    name, _, text = label.partition(":")
    if name not in registry():
        raise UserError("--methods", name, "no such method", f"choose among: {', '.join(registry())}")
    options = dict(config.method.options) if name == config.method.name else {}
    overrides = []
    for option in filter(None, text.split("+")):
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError("--methods", label, f"{option!r} is not key=value", "write as-lora:score=energy")
        if "." in key:
            overrides.append(option)
        else:
            options[key] = yaml.safe_load(value)
    return Variant(label, {"name": name, **options}, tuple(overrides))


def compare(
    config: ExperimentConfig,
    labels: list[str],
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
    variants = [parse_variant(label, config) for label in labels]
    runs = [(variant, seed) for seed in seeds for variant in variants]
    configs = {(variant.label, seed): _single(config, variant, seed, folder) for variant, seed in runs}
    results: list[Result] = []
    page = folder / "comparison.html"
    for index, (variant, seed) in enumerate(runs, start=1):
        on_run(variant.label, seed, index, len(runs))
        finished: RunResult = Experiment(configs[variant.label, seed]).run(on_start, on_round)
        results.append(Result(variant.label, seed, finished.metrics, finished.privacy["private_release"]))
        page = write_comparison(folder, results)
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    return page, results


def _single(config: ExperimentConfig, variant: Variant, seed: int, folder: Path) -> ExperimentConfig:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", variant.label) + f"-seed{seed}"
    changes = {"name": name, "seed": seed, "output": str(folder), "method": variant.method}
    return load(config.model_dump() | changes, list(variant.overrides))
