"""A suite: the file that says what a benchmark runs, and the runs that follow from it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from lorica.config import DEFAULT_CONFIG, ExperimentConfig, Strict, load, validate
from lorica.errors import UserError
from lorica.methods.base import find_method, make_method
from lorica.reporting.benchmark import Benchmark, BenchmarkRun, Entry, Purpose, best_rate
from lorica.run.setup import check_method
from lorica.run.variants import parse_variant
from lorica.strict_yaml import read_yaml_file

Rate = float
Rates = Annotated[list[Annotated[Rate, Field(gt=0, le=1e6)]], Field(min_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]
SET_BY_SUITE = {
    "optimizer.lr": "remove it, and set rates of the suite",
    "seed": "remove it, and set seeds and tuning_seeds of the suite",
    "name": "remove it, and set name of the suite",
    "privacy.ledger": "remove it",
}
"""Key of an experiment that every run has its own value of -> what to do instead."""


def _each_once(values: list[float] | None) -> list[float] | None:
    if values is not None and len(set(values)) < len(values):
        raise ValueError("a value appears twice")
    return values


def _check_apart(tuning_seeds: list[int], seeds: list[int]) -> None:
    both = sorted(set(seeds) & set(tuning_seeds))
    if both:
        raise ValueError(f"{both[0]} is also a tuning seed")


class Sweep(Strict):
    """Settings, and the methods that run in all of them."""

    settings: dict[str, dict[str, list[str]]] = Field(min_length=1)
    """Axis -> name of a value -> overrides. Every combination of the axes' values is a setting, named by its values."""
    methods: dict[str, str] | None = Field(default=None, min_length=1)
    """Methods of this sweep; None for those of the suite."""
    rates: Rates | None = None
    """Learning rates of this sweep; None for those of the suite. Another clip norm needs other rates."""
    tuning_seeds: Seeds | None = None
    """Tuning seeds of this sweep; None for those of the suite."""
    seeds: Seeds | None = None
    """Seeds of the results of this sweep; None for those of the suite."""

    _each_once = field_validator("rates", "tuning_seeds", "seeds")(_each_once)


class SuiteConfig(Strict):
    """The content of a suite file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the folder of the results."""
    experiment: str | None = None
    """The experiment that all runs start from, relative to the suite file; by default the embedded digits."""
    overrides: list[str] = Field(default_factory=list)
    """`section.key=value` for all runs."""
    methods: dict[str, str] = Field(default_factory=dict)
    """Name in tables -> method with options, as for `lorica compare --methods`, for sweeps without their own."""
    rates: Rates
    """Learning rates, the same for every method."""
    tuning_seeds: Seeds
    """Seeds on which the rate is chosen."""
    seeds: Seeds
    """Seeds of the results; none of them is a tuning seed."""
    reference: str
    """The method that the others are compared with, by its name in tables."""
    sweeps: list[Sweep] = Field(min_length=1)
    """In order of priority."""

    _each_once = field_validator("rates", "tuning_seeds", "seeds")(_each_once)

    @field_validator("seeds")
    @classmethod
    def _not_tuned_on(cls, seeds: list[int], info: ValidationInfo) -> list[int]:
        _check_apart(info.data.get("tuning_seeds", []), seeds)
        return seeds

    @field_validator("sweeps")
    @classmethod
    def _with_methods(cls, sweeps: list[Sweep], info: ValidationInfo) -> list[Sweep]:
        reference = info.data.get("reference")
        for sweep in sweeps:
            methods = sweep.methods or info.data.get("methods")
            if not methods:
                raise ValueError("a sweep has no methods; set methods of the sweep or of the suite")
            if reference not in methods:
                raise ValueError(f"every sweep needs the reference method, {reference!r}")
            tuned = sweep.tuning_seeds or info.data.get("tuning_seeds", [])
            _check_apart(tuned, sweep.seeds or info.data.get("seeds", []))
        return sweeps


@dataclass(frozen=True)
class PlannedRun:
    """One run of a benchmark.

    Attributes:
        digest: identifies the run, whatever its setting and method are called (`digest_of`).
    """

    setting: str
    method: str
    purpose: Purpose
    rate: float
    seed: int
    config: ExperimentConfig
    digest: str


@dataclass(frozen=True, eq=False)
class Cell:
    """One method in one setting.

    Attributes:
        group: the setting's name without its ε.
        config: the experiment, at whatever rate and seed.
        refusal: why the method cannot run in this setting; None if it can.
    """

    setting: str
    group: str
    method: str
    config: ExperimentConfig
    refusal: str | None
    rates: list[float]
    tuning_seeds: list[int]
    seeds: list[int]

    @cached_property
    def tuning(self) -> dict[Rate, list[PlannedRun]]:
        """Rate -> its run on each tuning seed."""
        return {rate: [self._run(rate, seed, "tuning") for seed in self.tuning_seeds] for rate in self.rates}

    @cached_property
    def results(self) -> dict[Rate, list[PlannedRun]]:
        """Rate -> its run on each seed of the results, if it turns out to be the best rate."""
        return {rate: [self._run(rate, seed, "result") for seed in self.seeds] for rate in self.rates}

    def entry(self, finished: Mapping[str, BenchmarkRun]) -> Entry:
        """What is finished of this cell.

        Args:
            finished: digest -> finished run.
        """
        tuning = {
            rate: [finished[run.digest] for run in runs if run.digest in finished] for rate, runs in self.tuning.items()
        }
        rate = None
        if all(len(runs) == len(self.tuning_seeds) for runs in tuning.values()):
            rate = best_rate({rate: [run.score for run in runs] for rate, runs in tuning.items()})
        results = [] if rate is None else [run for run in self.results[rate] if run.digest in finished]
        return Entry(
            setting=self.setting,
            group=self.group,
            method=self.method,
            target=self.config.privacy.epsilon,
            refusal=self.refusal,
            rate=rate,
            tuning=tuning,
            results=[finished[run.digest] for run in results],
            planned_tuning=len(self.rates) * len(self.tuning_seeds),
            planned_results=len(self.seeds),
        )

    def _run(self, rate: Rate, seed: int, purpose: Purpose) -> PlannedRun:
        optimizer = self.config.optimizer.model_copy(update={"lr": rate})
        config = self.config.model_copy(update={"seed": seed, "optimizer": optimizer})
        return PlannedRun(self.setting, self.method, purpose, rate, seed, config, digest_of(config))


@dataclass(frozen=True)
class Suite:
    """A suite with all its cells.

    Attributes:
        path, text: the suite file and its content.
        overrides: those of the command line, for all runs.
        folder: where the results are.
        settings: name of a setting -> its cells, both in order of priority.
    """

    path: Path
    text: str
    config: SuiteConfig
    overrides: list[str]
    folder: Path
    settings: dict[str, list[Cell]]

    def only(self, text: str) -> Suite:
        """The suite with the settings whose name contains the text.

        Raises:
            UserError: there are none.
        """
        chosen = {name: cells for name, cells in self.settings.items() if text in name}
        if not chosen:
            remedy = f"choose a part of one of: {'; '.join(self.settings)}"
            raise UserError("--settings", text, "no setting has this in its name", remedy)
        return replace(self, settings=chosen)

    def with_results(self, results: Mapping[str, BenchmarkRun]) -> Benchmark:
        """The suite with its results.

        Args:
            results: digest -> finished run.
        """
        return Benchmark(
            name=self.config.name,
            reference=self.config.reference,
            entries=[cell.entry(results) for cells in self.settings.values() for cell in cells],
            command=shlex.join(["lorica", "benchmark", str(self.path), *self.overrides]),
            suite=self.text,
        )

    def due(self, results: Mapping[str, BenchmarkRun]) -> Iterator[PlannedRun]:
        """The runs that can be started now, in order: settings one after another, tuned first, then seed by seed.

        Partial results then compare all methods, over fewer seeds.

        Args:
            results: digest -> finished run.
        """
        for cells in self.settings.values():
            able = [cell for cell in cells if cell.refusal is None]
            for cell in able:
                for runs in zip(*cell.tuning.values(), strict=True):
                    yield from (run for run in runs if run.digest not in results)
            best = [(cell, rate) for cell in able if (rate := cell.entry(results).rate) is not None]
            for place in range(len(cells[0].seeds)):
                found = (cell.results[rate][place] for cell, rate in best)
                yield from (run for run in found if run.digest not in results)


def load_suite(path: Path, overrides: list[str] | None = None) -> Suite:
    """Read a suite file and check every experiment in it.

    Args:
        overrides: `section.key=value` for all runs, such as `model.base=FOLDER` or `output=FOLDER`.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    overrides = overrides or []
    config = validate(SuiteConfig, read_yaml_file(path, "suite"))
    source = DEFAULT_CONFIG if config.experiment is None else path.expanduser().parent / config.experiment
    base = [*config.overrides, *overrides]
    found: dict[str, list[Cell]] = {}
    for sweep in config.sweeps:
        for values in itertools.product(*(axis.items() for axis in sweep.settings.values())):
            name = ", ".join(value for value, _ in values)
            if name in found:
                raise UserError("sweeps.settings", name, "two settings have this name", "rename a value of one of them")
            own = [override for _, chosen in values for override in chosen]
            experiment = _experiment(source, [*base, *own], config.name)
            group = ", ".join(value for value, chosen in values if not _is_epsilon(chosen))
            methods = sweep.methods or config.methods
            found[name] = [_cell(config, sweep, experiment, (name, group), method) for method in methods.items()]
    folder = Path(load(source, base).output).expanduser() / config.name
    return Suite(path, path.expanduser().read_text(encoding="utf-8-sig"), config, overrides, folder, found)


def digest_of(config: ExperimentConfig) -> str:
    """What identifies a run: 16 hexadecimal digits of the SHA-256 of its configuration.

    Left out are its name, its folders, and keys with their default value, so that a key that a later version of Lorica
    adds changes no digest.
    """
    content = config.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"name": True, "output": True, "report_to": True, "privacy": {"ledger"}},
    )
    _, options = find_method(config.method)
    content["method"] = options.model_dump(mode="json", exclude_defaults=True) | {"name": config.method.name}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _check_keys(overrides: list[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if key in SET_BY_SUITE:
            raise UserError(key, override, f"every run of a suite has its own {key}", SET_BY_SUITE[key])


def _experiment(source: Path, overrides: list[str], name: str) -> ExperimentConfig:
    _check_keys(overrides)
    config = load(source, overrides)
    # One thread, however many runs share the machine: the result of a run must not depend on it.
    model = config.model.model_copy(update={"threads": config.model.threads or 1})
    return config.model_copy(update={"name": name, "model": model})


def _check_research(config: ExperimentConfig) -> None:
    if config.engine != "local":
        raise UserError("engine", config.engine, "a benchmark runs in processes of its own", "set engine=local")
    if config.privacy.noise == "secure":
        problem = "a benchmark is research on public data: its runs must be repeatable, and would use up any budget"
        raise UserError("privacy.noise", "secure", problem, "add privacy.noise=reproducible to the suite's overrides")


def _is_epsilon(overrides: list[str]) -> bool:
    """Whether overrides set ε and nothing else."""
    return bool(overrides) and all(override.startswith("privacy.epsilon=") for override in overrides)


def _cell(
    suite: SuiteConfig, sweep: Sweep, experiment: ExperimentConfig, setting: tuple[str, str], named: tuple[str, str]
) -> Cell:
    name, method = named
    _check_keys(method.partition(":")[2].split("+"))
    config = parse_variant(method, experiment).config
    _check_research(config)
    refusal = None
    try:
        check_method(config, make_method(config.method, []))
    except UserError as error:
        refusal = str(error)
    return Cell(
        *setting,
        name,
        config,
        refusal,
        rates=sweep.rates or suite.rates,
        tuning_seeds=sweep.tuning_seeds or suite.tuning_seeds,
        seeds=sweep.seeds or suite.seeds,
    )
