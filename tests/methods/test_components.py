"""Components: each runs and resumes with each method that takes it, and is refused with its reason elsewhere."""

from __future__ import annotations

import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.aggregation.averaging import RoundAverage
from lorica.aggregation.kalman import KalmanFilter
from lorica.aggregation.robust import median
from lorica.aggregation.scaffold import Scaffold
from lorica.aggregation.server_optimizers import FedAdam, FedAvgM, ServerAverage
from lorica.aggregation.shrinkage import Shrinkage
from lorica.config import ExperimentConfig, load
from lorica.errors import UserError
from lorica.local.step import LocalStep
from lorica.methods.base import make_method
from lorica.methods.components import COMPONENTS, check_components, chosen_components
from lorica.testing.checks import CLIENTS, PARTICIPANTS, ROUNDS
from lorica.testing.federation import PRIVACY, Adapter, checkpoint_of, resume, run_rounds, tiny_federation
from tests.methods.conftest import METHODS, REGISTRY, Recordings
from tests.methods.engines import assert_honest_pass_and_large_do_not, assert_same_model

SHARED = PRIVACY.model_copy(update={"noise_against": "sums"})
COMPONENT: dict[str, tuple[list[str], Any]] = {
    # It changes no method, which only trains fewer tensors.
    "frozen_head": (["model.head=freeze"], None),
    "client_ranks": (["lora.client_ranks=[4, 2, 1, 4, 2, 1]"], lambda: {"ranks": {0: 2, 1: 1, 2: 2}}),
    "fedprox": (["local.fedprox=0.1"], lambda: {"local": LocalStep(proximal=0.1)}),
    "scaffold": (["local.scaffold=true"], lambda: {"scaffold": Scaffold(CLIENTS)}),
    "scaled_gd": (["local.scaled_gd=true"], lambda: {"local": LocalStep(damping=0.1)}),
    "flat_lora": (["local.flat_lora=0.05"], lambda: {"local": LocalStep(perturbation=0.05)}),
    "secure_sum": (["federation.secure_sum=true"], lambda: {"secure_sum": True}),
    "shared_noise": (
        [
            "privacy.noise_against=sums",
            "federation.secure_sum=true",
            "federation.min_clients=3",
            "federation.local_steps=1",
        ],
        lambda: {"secure_sum": True, "privacy": SHARED, "min_clients": PARTICIPANTS, "steps": 1},
    ),
    "robust": (["server.aggregate=median"], lambda: {"aggregate": median}),
    "server_optimizer": (["server.optimizer=fedavgm"], lambda: {"optimize": FedAvgM(1.0, 0.9)}),
    "server_lr": (["server.lr=0.5"], lambda: {"optimize": ServerAverage(0.5)}),
    "shrinkage": (["server.denoise=shrinkage"], lambda: {"denoise": Shrinkage()}),
    "kalman": (["server.denoise=kalman"], lambda: {"denoise": KalmanFilter()}),
    "average": (["server.average=0.9"], lambda: {"average": RoundAverage(0.9)}),
}
COMPOSED = [component for component in COMPONENTS if component != "frozen_head"]
ACCEPTED = [
    (name, component)
    for name in METHODS
    for component in COMPOSED
    if component not in REGISTRY[name].refuses
    and not (component == "shared_noise" and "secure_sum" in REGISTRY[name].refuses)
]
REFUSED = [(name, component) for name in METHODS for component in COMPONENTS if component in REGISTRY[name].refuses]


OFTEN = {
    pairs[index % len(pairs)]
    for index, pairs in enumerate([[pair for pair in ACCEPTED if pair[1] == component] for component in COMPOSED])
}
"""One pair for each component, spread over the methods."""
STATEFUL = {"client_ranks", "scaffold", "secure_sum", "server_optimizer"}


def by_tier(pairs: list[tuple[str, str]]) -> list[Any]:
    """Of the pairs of `OFTEN`, those with a component of `STATEFUL` run by default; the other pairs are slow."""

    def tier(pair: tuple[str, str]) -> Any:
        if pair not in OFTEN:
            return pytest.mark.slow
        return [] if pair[1] in STATEFUL else pytest.mark.integration

    return [pytest.param(*pair, marks=tier(pair)) for pair in pairs]


@cache
def config(name: str, *overrides: str) -> ExperimentConfig:
    return load(None, [f"method.name={name}", *overrides])


def check(some: ExperimentConfig) -> None:
    check_components(some, make_method(some.method, []))


def test_every_component_is_known_by_its_key() -> None:
    assert COMPONENT.keys() == COMPONENTS.keys()
    for component, (overrides, _) in COMPONENT.items():
        # Noise is shared in secure sums only.
        needed = ["secure_sum"] if component == "shared_noise" else []
        assert list(chosen_components(config("ffa-lora", *overrides))) == [*needed, component]
        assert overrides[0].startswith(COMPONENTS[component][0])
    assert chosen_components(config("ffa-lora")) == {}
    assert all(component in COMPONENTS for method in REGISTRY.values() for component in method.refuses)


@pytest.mark.parametrize(("name", "component"), by_tier(ACCEPTED))
def test_an_accepted_component_changes_the_run_and_resumes(
    name: str, component: str, tmp_path: Path, recordings: Recordings
) -> None:
    overrides, make = COMPONENT[component]
    check(config(name, *overrides))
    settings = {"clients": CLIENTS, "participants": PARTICIPANTS, "rounds": ROUNDS, "weighting": "records"}
    plain = recordings(name).adapters[3]
    if (name, component) == ("deer", "fedprox"):
        # A single step is taken at the round's start, where FedProx does not pull; half of DEeR's four is two.
        settings["steps"] = 4
        plain = Adapter.of(run_rounds(tiny_federation("deer", tmp_path / "plain", **settings)).server.model)
    settings |= make()
    whole = run_rounds(tiny_federation(REGISTRY[name], tmp_path / "whole", **settings), 2)
    checkpoint = deepcopy(checkpoint_of(whole))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    whole.round()
    other = whole.server.evaluated
    pairs = [(value, other[key]) for key, value in plain.tensors.items()]
    for key, pair in plain.merged.items():
        pairs += list(zip(pair, whole.server.model.merged[key], strict=True))
    assert any(x.shape != y.shape or not torch.equal(x, y) for x, y in pairs)
    assert all(torch.isfinite(y).all() for _, y in pairs)
    rest = run_rounds(resume(tiny_federation(REGISTRY[name], tmp_path / "half", **settings), checkpoint), 1)
    assert_same_model(whole, rest)
    assert all(torch.equal(value, rest.server.evaluated[key]) for key, value in other.items())
    if component in ("scaled_gd", "fedprox", "scaffold"):
        # A sketch has two factors in it, and the bound of each allows for the largest that preconditioning makes of it.
        assert_honest_pass_and_large_do_not(whole, 10_000 if name == "fed-power" else 100)


@pytest.mark.parametrize(("name", "component"), REFUSED)
def test_a_refused_component_is_named_with_its_reason(name: str, component: str) -> None:
    kind = REGISTRY[name]
    with pytest.raises(UserError) as error:
        check_components(config("ffa-lora", *COMPONENT[component][0]), kind(kind.Options(), []))
    assert COMPONENTS[component][0] in str(error.value)
    assert REGISTRY[name].refuses[component] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["server.denoise=kalman", "optimizer.name=adamw"], "optimizer.name"),
        (["server.optimizer=fedadam", "optimizer.name=adamw"], "optimizer.name"),
        (["server.denoise=shrinkage", "optimizer.weight_decay=0.1"], "optimizer.weight_decay"),
        (["server.denoise=shrinkage", "local.scaled_gd=true"], "local.scaled_gd"),
        (["server.denoise=kalman", "local.fedprox=0.1"], "local.fedprox"),
        (["server.optimizer=fedadam", "local.scaffold=true"], "local.scaffold"),
        (["server.optimizer=fedadam", "server.denoise=kalman"], "server.denoise"),
        (["local.scaffold=true", "optimizer.momentum=0.9"], "local.scaffold"),
        (["model.precision=nf4", "local.flat_lora=0.05"], "model.precision"),
        (["server.aggregate=median", "server.denoise=kalman"], "server.denoise"),
        (["server.aggregate=krum", "server.optimizer=fedadam"], "server.optimizer"),
        (["server.aggregate=median", "local.scaffold=true"], "local.scaffold"),
    ],
)
def test_components_that_do_not_fit_each_other_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        check(config("ffa-lora", *overrides))


def test_a_robust_aggregate_needs_all_ranks_of_all_clients() -> None:
    with pytest.raises(UserError, match=r"lora\.client_ranks"):
        check(config("fed-rac-lora", "server.aggregate=median", "lora.client_ranks=halving"))


@pytest.mark.parametrize("name", [name for name in METHODS if REGISTRY[name].merges])
def test_quantised_weights_are_not_merged_into(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.precision = 'int8'"):
        check(config(name, "model.precision=int8"))


def test_fedadam_is_refused_where_the_noise_is_shaped() -> None:
    with pytest.raises(UserError, match="fedadam"):
        check(config("la-lora", "server.optimizer=fedadam"))


def test_fedadam_runs_and_resumes(tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        return {"optimize": FedAdam(0.01, 0.9, 0.99, 1e-3)}

    whole = run_rounds(tiny_federation("ro-lora", tmp_path / "whole", {"gauge": "none"}, **make()), 2)
    checkpoint = deepcopy(checkpoint_of(whole))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    run_rounds(whole, 2)
    rest = resume(tiny_federation("ro-lora", tmp_path / "half", {"gauge": "none"}, **make()), checkpoint)
    assert_same_model(whole, run_rounds(rest, 2))


def test_server_momentum_keeps_one_factor_rounds_exact(tmp_path: Path) -> None:
    """The idle factor does not move on stale momentum."""
    some = tiny_federation("ro-lora", tmp_path, {"gauge": "none"}, optimize=FedAvgM(1.0, 0.9))
    for _ in range(4):
        before = dict(some.server.model.tensors)
        some.round()
        trained = set(some.engine.requests[-1][0].work.trained)
        for key, value in some.server.model.tensors.items():
            assert (key in trained) != torch.equal(value, before[key])


def test_the_average_over_rounds_is_evaluated_and_training_goes_on_from_the_last_model(tmp_path: Path) -> None:
    plain = tiny_federation("ffa-lora", tmp_path / "a")
    averaged = tiny_federation("ffa-lora", tmp_path / "b", average=RoundAverage(0.5))
    history = []
    for _ in range(3):
        plain.round()
        averaged.round()
        history.append(dict(plain.server.model.tensors))
    for key, value in averaged.server.model.tensors.items():
        assert torch.equal(value, plain.server.model.tensors[key])
        expected = sum(weight * past[key] for weight, past in zip((0.25, 0.5, 1.0), history, strict=True)) / 1.75
        torch.testing.assert_close(averaged.server.evaluated[key], expected)
