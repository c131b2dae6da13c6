"""The gauge of methods that train one factor: the product stays, the resting factor is orthonormal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.adapters.algebra import with_orthonormal_columns, with_orthonormal_rows
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from lorica.config import load
from lorica.errors import UserError
from lorica.methods.base import make_method
from lorica.methods.components import NEW_BASIS, check_components
from lorica.methods.gauge import SCALE, GaugeOptions, fix_gauge, start_with, trainable
from lorica.testing.checks import CHECKS, record
from lorica.testing.federation import UNCLIPPED, dense, run_rounds, tiny_federation
from tests.methods.conftest import REGISTRY
from tests.tiers import integration

GAUGED = [name for name, kind in REGISTRY.items() if issubclass(kind.Options, GaugeOptions)]
ORTHONORMAL, NONE = GaugeOptions(gauge="orthonormal"), GaugeOptions(gauge="none")


def random_state(d_out: int = 6, d_in: int = 5, rank: int = 2, seed: int = 0) -> tuple[Site, AdapterState]:
    draws = torch.Generator().manual_seed(seed)
    site = Site("layers.0.q", "layers.0", d_in, d_out, rank, 1.0)
    tensors = {site.a: torch.randn(rank, d_in, generator=draws), site.b: torch.randn(d_out, rank, generator=draws)}
    return site, AdapterState([site], tensors)


def gram(rows: Tensor) -> Tensor:
    return rows.double() @ rows.double().T


DEGENERATE = {
    "independent": lambda b: b,
    "two equal columns": lambda b: torch.cat([b[:, :1], b[:, :1], b[:, 2:]], dim=1),
    "a zero column": lambda b: b * torch.tensor([1.0, 0.0, 1.0]),
    "rank one": lambda b: b[:, :1] @ torch.tensor([[1.0, -2.0, 0.5]]),
    "zero": torch.zeros_like,
    "huge and tiny": lambda b: b * torch.tensor([1e12, 1.0, 1e-12]),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_the_product_stays_and_one_factor_is_orthonormal(kind: str) -> None:
    """Whatever the rank of the factor is, and without NaN."""
    draws = torch.Generator().manual_seed(1)
    b, a = DEGENERATE[kind](torch.randn(7, 3, generator=draws)), torch.randn(3, 5, generator=draws)
    product = b.double() @ a.double()
    for made, rows in (
        (with_orthonormal_columns((b, a), SCALE), lambda pair: pair[0].T),
        ([x.T for x in reversed(with_orthonormal_rows((a.T, b.T), SCALE))], lambda pair: pair[0].T),
    ):
        torch.testing.assert_close(
            made[0].double() @ made[1].double(), product, rtol=0, atol=1e-6 * float(product.norm())
        )
        torch.testing.assert_close(gram(rows(made)), SCALE**2 * torch.eye(3).double(), rtol=0, atol=1e-6)


def test_rank_one_is_a_normalised_vector() -> None:
    b, a = with_orthonormal_columns((torch.tensor([[3.0], [-4.0]]), torch.tensor([[2.0, 1.0]])), 1.0)
    torch.testing.assert_close(b, torch.tensor([[0.6], [-0.8]]))
    torch.testing.assert_close(a, torch.tensor([[10.0, 5.0]]))


def test_more_vectors_than_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="3 vectors of 2 numbers"):
        with_orthonormal_columns((torch.ones(2, 3), torch.ones(3, 4)), 1.0)
    method = make_method(load(None, ["method.name=ro-lora"]).method, [random_state(d_out=3, rank=4)[0]])
    config = load()
    with pytest.raises(UserError, match=r"lora\.r = 4.* at most 3.*method\.gauge=none"):
        method.check(config.optimizer, 3, 1)
    loose = make_method(load(None, ["method.name=ro-lora", "method.gauge=none"]).method, method.sites)
    loose.check(config.optimizer, 3, 1)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_the_factor_that_rests_is_the_orthonormal_one(factor: str) -> None:
    site, model = random_state()
    before = dense(model, site)
    fix_gauge(ORTHONORMAL, model, {site.name: factor})
    rows = model.tensors[site.b].T if factor == "A" else model.tensors[site.a]
    torch.testing.assert_close(gram(rows), torch.eye(2).double() / 3, rtol=0, atol=1e-6)
    torch.testing.assert_close(dense(model, site), before, rtol=1e-5, atol=1e-6)
    assert set(model.versions.values()) == {1}
    # It is not changed, and so not sent, again.
    fix_gauge(ORTHONORMAL, model, {site.name: factor})
    assert set(model.versions.values()) == {1}


@pytest.mark.parametrize(("options", "factor"), [(NONE, "A"), (NONE, "B"), (ORTHONORMAL, "")])
def test_no_gauge_and_frozen_layers_change_nothing(options: GaugeOptions, factor: str) -> None:
    site, model = random_state()
    fix_gauge(options, model, {site.name: factor})
    assert set(model.versions.values()) == {0}


def test_while_b_is_zero_the_basis_of_a_is_fixed() -> None:
    site, model = random_state()
    model.assign({site.b: torch.zeros(6, 2)})
    start = model.tensors[site.a]
    fix_gauge(ORTHONORMAL, model, {site.name: "A"})
    assert torch.equal(model.tensors[site.a], start)
    fix_gauge(ORTHONORMAL, model, {site.name: "B"})
    torch.testing.assert_close(gram(model.tensors[site.a]), torch.eye(2).double() / 3, rtol=0, atol=1e-6)
    assert not model.tensors[site.b].any()


@pytest.mark.parametrize(("factor", "trained"), [("A", 5), ("B", 6)])
def test_noise_reaches_the_weight_with_a_gain_that_does_not_depend_on_the_factors(factor: str, trained: int) -> None:
    """`E ‖noise in the weight‖² = s² v r d`, however large the factors have become. Without the gauge it is not."""
    variance, trials = 0.3, 4000
    draws = torch.Generator().manual_seed(2)
    energies = []
    for options in (ORTHONORMAL, NONE):
        site, model = random_state(seed=3)
        model.assign({site.b: 10 * model.tensors[site.b], site.a: 0.1 * model.tensors[site.a]})
        fix_gauge(options, model, {site.name: factor})
        b, a = model.tensors[site.b], model.tensors[site.a]
        noise = variance**0.5 * torch.randn(trials, *(a if factor == "A" else b).shape, generator=draws)
        in_weight = b @ noise if factor == "A" else noise @ a
        energies.append(float(in_weight.square().sum((1, 2)).mean()))
    expected = variance * 2 * trained / 3
    assert energies[0] == pytest.approx(expected, rel=0.05)
    assert not 0.5 < energies[1] / expected < 2


def test_the_gauge_is_an_option_of_methods_that_train_one_factor() -> None:
    assert GAUGED == ["as-lora", "random-lora", "ro-lora"]


@pytest.mark.parametrize("name", GAUGED)
def test_state_in_an_old_basis_is_refused_with_a_gauge_only(name: str) -> None:
    components = {
        "server.optimizer=fedavgm": "server_optimizer",
        "server.denoise=kalman": "kalman",
        "server.average=0.9": "average",
    }
    for override, component in components.items():
        gauged = load(None, [f"method.name={name}", "method.gauge=orthonormal", override])
        with pytest.raises(UserError) as error:
            check_components(gauged, make_method(gauged.method, []))
        assert NEW_BASIS[component] in str(error.value)
        assert "method.gauge=orthonormal" in str(error.value)
        plain = load(None, [f"method.name={name}", "method.gauge=none", override])
        check_components(plain, make_method(plain.method, []))


@pytest.mark.parametrize("name", GAUGED)
@pytest.mark.parametrize("gauge", ["orthonormal", "none"])
def test_ranks_that_differ_between_clients_are_refused(name: str, gauge: str) -> None:
    config = load(None, [f"method.name={name}", f"method.gauge={gauge}", "lora.client_ranks=halving"])
    with pytest.raises(UserError, match=r"lora\.client_ranks"):
        check_components(config, make_method(config.method, []))


OTHERS = [
    ("as-lora", {"gauge": "none"}),
    ("as-lora", {"score": "last-step-energy"}),
    ("random-lora", {"first": "A"}),
    *integration(
        ("random-lora", {"gauge": "none"}),
        ("ro-lora", {"gauge": "none"}),
        ("as-lora", {"score": "energy", "select": "thompson", "freeze": True}),
        ("as-lora", {"select": "softmax"}),
        ("as-lora", {"first": "A"}),
        ("ro-lora", {"first": "A"}),
    ),
]


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_what_holds_for_every_method_holds_for_the_other_options(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    recording = record(name, tmp_path, options)
    for check in ("messages", "clients", "resume", "exactness", "sums"):
        CHECKS[check](recording)


def test_the_resting_factor_travels_where_its_basis_changed(tmp_path: Path) -> None:
    """Round 1 changes A's basis and trains B; round 2 changes B's basis, and with it A."""
    some = run_rounds(tiny_federation("ro-lora", tmp_path), 3)
    sites = some.server.model.sites
    for requests in some.engine.requests[1:]:
        assert {site.a for site in sites} | {site.b for site in sites} <= set(requests[0].tensors)
    plain = run_rounds(tiny_federation("ro-lora", tmp_path / "plain", {"gauge": "none"}), 3)
    assert not {site.a for site in sites} & set(plain.engine.requests[1][0].tensors)


def test_the_step_does_not_depend_on_the_scale_of_the_factors(tmp_path: Path) -> None:
    """Without noise, `W ← W - η γ² s² G P` with P the projector on A's row space, also for an A 30 times as large."""
    found = []
    for scale in (1.0, 30.0):
        some = tiny_federation(
            "ro-lora", tmp_path / str(scale), privacy=UNCLIPPED, clients=1, batch_size=20, steps=1, seed=1
        )
        sites = some.server.model.sites
        some.server.model.assign({site.a: scale * some.server.model.tensors[site.a] for site in sites})
        some.round()
        found.append([dense(some.server.model, site) for site in sites])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(one.norm()))
    assert max(one.norm() for one in found[0]) > 1e-5


@pytest.mark.parametrize("name", GAUGED)
def test_a_can_be_the_first_factor(name: str, tmp_path: Path) -> None:
    """The roles are exchanged: B is random and orthonormal, A is zero, so the model starts as it is and trains A."""
    some = tiny_federation(name, tmp_path, {"first": "A"})
    sites, tensors = some.server.model.sites, some.server.model.tensors
    starts = [tensors[site.b] for site in sites]
    for site, b in zip(sites, starts, strict=True):
        torch.testing.assert_close(gram(b.T), torch.eye(site.rank).double() / 3, rtol=0, atol=1e-6)
        assert not dense(some.server.model, site).any()
    assert not torch.equal(starts[0], starts[1])
    run_rounds(some, 2)
    assert set(some.engine.requests[0][0].work.trained) >= {site.a for site in sites}
    assert not set(some.engine.requests[0][0].work.trained) & {site.b for site in sites}
    assert all(dense(some.server.model, site).any() for site in sites)
    if name != "random-lora":
        assert set(some.engine.requests[1][0].work.trained) >= {site.b for site in sites}


def test_an_adapter_that_was_trained_before_keeps_its_product() -> None:
    _, model = random_state()
    start_with(GaugeOptions(first="A"), model, seed=0)
    assert set(model.versions.values()) == {0}


def test_a_first_factor_of_more_columns_than_rows_is_refused() -> None:
    options = ["method.name=ro-lora", "method.gauge=none", "method.first=A"]
    method = make_method(load(None, options).method, [random_state(d_out=3, rank=4)[0]])
    with pytest.raises(UserError, match=r"lora\.r = 4.*method\.first=A.* at most 3.*method\.first=B"):
        method.check(load().optimizer, 3, 1)


def test_a_factor_that_has_no_gradient_is_not_trained() -> None:
    site, model = random_state()
    assert [trainable(factor, model, [site]) for factor in ("A", "B", "")] == ["A", "B", ""]
    model.assign({site.b: torch.zeros(6, 2)})
    assert [trainable(factor, model, [site]) for factor in ("A", "B", "")] == ["B", "B", ""]
    model.assign({site.b: torch.ones(6, 2), site.a: torch.zeros(2, 5)})
    assert [trainable(factor, model, [site]) for factor in ("A", "B", "")] == ["A", "A", ""]
