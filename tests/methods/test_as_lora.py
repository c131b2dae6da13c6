"""AS-LoRA's choices: what they depend on, and what they cannot depend on."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from lorica.config import OptimizerConfig
from lorica.errors import UserError
from lorica.methods.as_lora import ASLoRA
from lorica.methods.exchange import Replies, Train
from lorica.methods.gauge import SCALE, fix_gauge
from lorica.methods.server import Server
from lorica.privacy.mechanism import Terms
from lorica.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lorica.testing.federation import run_rounds, tiny_federation
from tests.methods.engines import Wrapped
from tests.tiers import integration

SITES = [
    Site(f"model.layers.{layer}.{name}", f"model.layers.{layer}", 6, 5, 2, 1.0)
    for layer in range(3)
    for name in ("q", "v")
]
CLIENTS = (0, 1, 2)
TERMS = Terms(0.1, 10, 1.0, 1.0)


def make(
    rounds: int = 40,
    head: bool = True,
    optimizer: OptimizerConfig | None = None,
    privacy: Terms = TERMS,
    **options: Any,
) -> tuple[ASLoRA, Server]:
    draws = torch.Generator().manual_seed(0)
    tensors = {}
    for site in SITES:
        tensors[site.a] = torch.randn(2, 6, generator=draws)
        tensors[site.b] = torch.zeros(5, 2)
    if head:
        tensors["head.weight"] = torch.zeros(3, 5)
    method = ASLoRA(ASLoRA.Options(**options), SITES)
    server = Server(
        model=AdapterState(SITES, tensors),
        rounds=rounds,
        terms=dict.fromkeys(CLIENTS, privacy),
        optimizer=optimizer or OptimizerConfig(lr=0.5),
        local_steps=4,
        full_rates=dict.fromkeys(tensors, 0.5),
        seed=7,
    )
    return method, server


def play(method: ASLoRA, server: Server, gradients: Any, rounds: int) -> list[dict[str, str]]:
    """Rounds in which each client's update is `-a G` with `G = gradients(name, client)`; returns the factors chosen."""
    history = []
    for _ in range(rounds):
        server.round += 1
        steps = method.round(server)
        request = next(steps)
        assert isinstance(request, Train)
        names = server.model.trained(request.factors)
        updates = {client: {name: -2.0 * gradients(name, client) for name in names} for client in CLIENTS}
        energies = {
            client: {name: float(gradients(name, client).square().sum()) for name in names} for client in CLIENTS
        }
        weights = dict.fromkeys(CLIENTS, 1 / 3)
        with pytest.raises(StopIteration):
            steps.send(Replies(updates, weights, energies if request.last_step_energy else {}))
        history.append(dict(request.factors))
    return history


def constant(a: float, b: float) -> Any:
    """Every client sees the same gradient of norm `a` in each A and `b` in each B."""

    def gradient(name: str, client: int) -> torch.Tensor:
        shape = {"A": (2, 6), "B": (5, 2)}.get(name[-1], (3, 5))
        value = torch.ones(shape)
        return value / value.norm() * {"A": a, "B": b}.get(name[-1], 0.0)

    return gradient


def share_of_a(history: list[dict[str, str]]) -> float:
    choices = [factor for row in history for factor in row.values()]
    return choices.count("A") / len(choices)


def test_warm_up_alternates_and_starts_with_b() -> None:
    method, server = make(rounds=50)
    history = play(method, server, constant(1.0, 1.0), 5)
    assert [set(row.values()) for row in history] == [{"B"}, {"A"}, {"B"}, {"A"}, {"B"}]


def test_a_is_not_trained_while_b_is_zero() -> None:
    method, server = make()
    history = play(method, server, constant(1.0, 0.0), 6)
    assert all(set(row.values()) == {"B"} for row in history)


@pytest.mark.parametrize(
    ("score", "select"),
    [
        ("curvature", "significance"),
        ("energy", "softmax"),
        ("last-step-energy", "thompson"),
        *integration(
            ("curvature", "softmax"),
            ("curvature", "thompson"),
            ("energy", "significance"),
            ("energy", "thompson"),
            ("last-step-energy", "significance"),
            ("last-step-energy", "softmax"),
        ),
    ],
)
def test_the_factor_with_the_larger_gradient_is_preferred(score: str, select: str) -> None:
    for a, b, low, high in ((10.0, 0.5, 0.75, 1.0), (0.5, 10.0, 0.0, 0.25)):
        method, server = make(rounds=60, score=score, select=select)
        history = play(method, server, constant(a, b), 60)
        assert low <= share_of_a(history[20:]) <= high


def test_probability_follows_the_formula() -> None:
    """Ratio 2 at t = 30 after a warm-up of 10: 0.717; from t = 55: 0.966 (methods.md 1.4)."""
    method, _ = make(select="softmax")
    for group in method.groups:
        method.blocks[group, "A"].gain, method.blocks[group, "B"].gain = 2.0, 1.0
        assert method._probability_of_a(group, 20) == pytest.approx(0.717, abs=1e-3)
        assert method._probability_of_a(group, 45) == pytest.approx(0.966, abs=1e-3)
        method.blocks[group, "A"].gain = 10.0
        assert method._probability_of_a(group, 20) == pytest.approx(0.907, abs=1e-3)


def test_a_layer_alternates_until_its_gains_differ_significantly() -> None:
    """The standard deviation of the difference is 0.5; the two gains differ by 0.9, 1.1 and -1.1."""
    method, _ = make(deviations=2.0)
    group = next(iter(method.groups))
    a, b = method.blocks[group, "A"], method.blocks[group, "B"]
    a.variance, b.variance = 0.09, 0.16
    for gain, chosen in ((1.9, {"A": "B", "B": "A"}), (2.1, {"A": "A", "B": "A"}), (-0.1, {"A": "B", "B": "B"})):
        a.gain, b.gain = gain, 1.0
        for latest in ("A", "B"):
            method.latest[group] = latest
            assert method._probability_of_a(group, 5) == float(chosen[latest] == "A")


def test_layers_alternate_under_noise_that_hides_their_gradients() -> None:
    """Pure noise of the declared variance: four deviations are not reached in 200 rounds."""
    draws = torch.Generator().manual_seed(3)

    def noise(name: str, client: int) -> torch.Tensor:
        shape = {"A": (2, 6), "B": (5, 2)}.get(name[-1], (3, 5))
        # Four local steps with noise of 1·1/10 each, averaged.
        return 0.1 / 2 * torch.randn(shape, generator=draws)

    method, server = make(rounds=200, deviations=4.0)
    history = play(method, server, noise, 200)
    changes = [one[SITES[0].name] != other[SITES[0].name] for one, other in itertools.pairwise(history)]
    assert all(changes)


@pytest.mark.parametrize(("staleness", "longest"), [(0.25, 4), (0.5, 1), (0.0, 40)])
def test_a_factor_with_a_small_gain_is_tried_again(staleness: float, longest: int) -> None:
    """Gains of 100 and 0.25 differ by two deviations or less after n rounds at rest if 2 · staleness · √n ≥ 1."""
    method, server = make(rounds=60, staleness=staleness)
    factors = [row[SITES[0].name] for row in play(method, server, constant(10.0, 0.5), 60)][20:]
    assert max(len(list(same)) for _, same in itertools.groupby(factors)) == longest


def test_thompson_is_the_normal_probability_and_keeps_its_floor() -> None:
    method, _ = make(select="thompson", floor=0.1)
    group = next(iter(method.groups))
    a, b = method.blocks[group, "A"], method.blocks[group, "B"]
    a.gain, b.gain, a.variance, b.variance = 1.0, 0.5, 0.09, 0.16
    expected = 0.5 * (1 + math.erf(1.0 / math.sqrt(2)))
    assert method._probability_of_a(group, 5) == pytest.approx(expected)
    b.gain = 100.0
    assert method._probability_of_a(group, 5) == 0.1


def test_gain_is_the_trapezoid_score_and_its_average() -> None:
    """Hand computation over three activations of one block: Q alone, then (Q + X)/2, then the EMA."""
    method, server = make(rounds=100, ema=0.8, gauge="none")
    block = method.blocks["model.layers.0", "B"]
    draws = torch.Generator().manual_seed(1)
    rounds = [
        {client: {name: torch.randn(5, 2, generator=draws) for name in block.names} for client in CLIENTS}
        for _ in range(3)
    ]
    flat = [
        torch.stack([torch.cat([g[c][n].flatten() for n in block.names]) for c in CLIENTS]).double() for g in rounds
    ]
    means = [value.mean(0) for value in flat]
    q = [
        ((value.sum(0) ** 2).sum() - (value**2).sum()) / (3 * 2)  # methods.md 2.2, uniform weights
        for value in flat
    ]
    scores = [(q[i] + means[i] @ means[i + 1]) / 2 for i in range(2)]
    weights = dict.fromkeys(CLIENTS, 1 / 3)
    choice = dict.fromkeys(method.groups, "")
    choice["model.layers.0"] = "B"
    expected = [2.0 * q[0], 2.0 * scores[0], 0.8 * 2.0 * scores[0] + 0.2 * 2.0 * scores[1]]
    for index, gradients in enumerate(rounds):
        server.round = 10 * index + 1
        updates = {c: {name: -2.0 * value for name, value in gradients[c].items()} for c in CLIENTS}
        method._score(server, Replies(updates, weights, {}), choice)
        assert block.gain == pytest.approx(float(expected[index]), rel=1e-5)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_with_a_gauge_gain_is_the_score_of_dense_gradients(factor: str) -> None:
    """Two activations in different bases, from gradients with respect to the weight: `(Q + X)/2` of their projections.

    `γ G P s` has the energies of the factors' gradients, so all of it is computed from `γ s G P`, without a factor.
    """
    method, server = make(rounds=100, gauge="orthonormal")
    group = method.groups["model.layers.0"]
    draws = torch.Generator().manual_seed(2)
    choice = dict.fromkeys(method.groups, "")
    choice["model.layers.0"] = factor
    projected = []
    for index in range(2):
        for site in SITES:
            server.model.assign(
                {site.a: torch.randn(2, 6, generator=draws), site.b: torch.randn(5, 2, generator=draws)}
            )
        fix_gauge(method.options, server.model, dict.fromkeys([site.name for site in SITES], factor))
        updates: dict[int, dict[str, torch.Tensor]] = {client: {} for client in CLIENTS}
        flat = {client: [] for client in CLIENTS}
        for site in group:
            b, a = server.model.tensors[site.b], server.model.tensors[site.a]
            rows = (a if factor == "B" else b.T).double()
            projector = torch.linalg.pinv(rows) @ rows
            for client in CLIENTS:
                dense = torch.randn(5, 6, generator=draws)
                name, gradient = (site.b, dense @ a.T) if factor == "B" else (site.a, b.T @ dense)
                updates[client][name] = -2.0 * gradient
                kept = dense.double() @ projector if factor == "B" else projector @ dense.double()
                flat[client].append(SCALE * kept.flatten())
        projected.append(torch.stack([torch.cat(flat[client]) for client in CLIENTS]))
        server.round = 10 * index + 1
        method._score(server, Replies(updates, dict.fromkeys(CLIENTS, 1 / 3), {}), choice)
        if index == 0:
            q = float(((projected[0].sum(0) ** 2).sum() - (projected[0] ** 2).sum()) / 6)
            assert method.blocks["model.layers.0", factor].gain == pytest.approx(2 * q, abs=1e-5)
    x = float(projected[0].mean(0) @ projected[1].mean(0))
    assert method.blocks["model.layers.0", factor].gain == pytest.approx(q + x, abs=1e-5)


@pytest.mark.parametrize("gauge", ["orthonormal", "none"])
def test_a_checkpoint_holds_all_that_later_scores_depend_on(gauge: str, tmp_path: Path) -> None:
    """Through files, after each factor's second activation; then both play the same rounds."""

    def gradients(seed: int) -> Any:
        draws = torch.Generator().manual_seed(seed)
        return lambda name, client: torch.randn({"A": (2, 6), "B": (5, 2)}.get(name[-1], (3, 5)), generator=draws)

    def state(method: ASLoRA) -> dict[str, list[Any]]:
        return {f"{key}": [block.gain, block.variance, block.energy] for key, block in method.blocks.items()}

    method, server = make(gauge=gauge)
    play(method, server, gradients(0), 5)
    model = server.model
    save_checkpoint(tmp_path, Checkpoint(5, dict(model.tensors), {}, method.state_dict(), {}))
    found = load_checkpoint(tmp_path)
    assert found is not None
    other, again = make(gauge=gauge)
    again.round = found.round
    again.model.assign(found.adapter)
    other.load_state_dict(found.method)
    assert state(other) == state(method)
    assert play(method, server, gradients(1), 6) == play(other, again, gradients(1), 6)
    assert state(other) == state(method)
    assert all(torch.equal(value, again.model.tensors[name]) for name, value in model.tensors.items())


def test_signal_to_noise_is_recorded_for_each_choice_under_known_noise() -> None:
    method, server = make(select="thompson")
    play(method, server, constant(1.0, 1.0), 4)
    assert method.decisions()["signal_to_noise"] == {}
    for group in method.groups:
        a, b = method.blocks[group, "A"], method.blocks[group, "B"]
        a.gain, b.gain, a.variance, b.variance = 1.0, 2.5, 0.09, 0.16
    play(method, server, constant(1.0, 1.0), 1)
    assert method.decisions()["signal_to_noise"] == pytest.approx(dict.fromkeys(method.groups, 3.0))
    unknown = (
        make(optimizer=OptimizerConfig(name="adamw", lr=0.5)),
        make(privacy=Terms(0.1, 10, 1.0, 0.0)),
    )
    for method, server in unknown:
        play(method, server, constant(1.0, 1.0), 6)
        assert method.decisions()["probability_a"].keys() == method.groups.keys()
        assert method.decisions()["signal_to_noise"] == {}


def test_choices_depend_on_uploads_and_public_numbers_alone(tmp_path: Path) -> None:
    """Other private records, same uploads: the same choices. The method never touches a client."""
    some = run_rounds(tiny_federation("as-lora", tmp_path / "a"), 3)
    replies = [dict(exchange) for exchange in some.engine.replies]

    class Replay(Wrapped):
        def __init__(self, engine: Any) -> None:
            super().__init__(engine)
            self.asked: list[Any] = []

        def exchange(self, requests: Any) -> Any:
            self.asked.append({client: request.work.trained for client, request in requests.items()})
            return replies[len(self.asked) - 1]

    other = tiny_federation("as-lora", tmp_path / "b")
    other.engine = Replay(other.engine)
    run_rounds(other, 3)
    asked = [
        {client: request.work.trained for client, request in exchange.items()} for exchange in some.engine.requests
    ]
    assert other.engine.asked == asked


@pytest.mark.parametrize(("granularity", "groups"), [("layer", 3), ("module", 6), ("tied", 1)])
def test_granularity_says_what_decides_together(granularity: str, groups: int) -> None:
    method, server = make(rounds=60, granularity=granularity, select="softmax")
    assert len(method.groups) == groups
    history = play(method, server, constant(1.0, 1.0), 60)
    per_round = [
        len({tuple(row[site.name] for site in members) for members in method.groups.values()}) for row in history
    ]
    if granularity == "tied":
        assert all(len(set(row.values())) == 1 for row in history)
    else:
        assert max(per_round) > 1
    if granularity == "layer":
        assert all(
            row[f"model.layers.{layer}.q"] == row[f"model.layers.{layer}.v"] for row in history for layer in range(3)
        )


@pytest.mark.parametrize("select", ["significance", "thompson"])
def test_freeze_trains_neither_factor_of_a_layer_that_only_loses(select: str) -> None:
    method, server = make(rounds=60, select=select, freeze=True)
    server.round = 30
    for (group, _), block in method.blocks.items():
        block.gain, block.variance = (-1.0, 0.01) if group == "model.layers.1" else (1.0, 0.01)
    for site in SITES:
        server.model.assign({site.b: torch.ones(5, 2)})
    choice = method._choose(server)
    assert choice["model.layers.1"] == ""
    assert choice["model.layers.0"]
    assert choice["model.layers.2"]


def test_something_is_always_trained() -> None:
    method, server = make(rounds=60, head=False, select="thompson", freeze=True)
    server.round = 30
    for block in method.blocks.values():
        block.gain, block.variance = -1.0, 0.01
    for site in SITES:
        server.model.assign({site.b: torch.ones(5, 2)})
    assert any(method._choose(server).values())


def test_inactive_blocks_become_less_certain() -> None:
    method, server = make(rounds=60, select="thompson")
    play(method, server, constant(1.0, 1.0), 4)
    before = {key: block.variance for key, block in method.blocks.items()}
    (row,) = play(method, server, constant(1.0, 1.0), 1)
    for (group, factor), block in method.blocks.items():
        if row[method.groups[group][0].name] != factor:
            assert block.variance > before[group, factor]


def test_last_step_energy_uploads_one_number_a_tensor_and_the_default_nothing(tmp_path: Path) -> None:
    def sent(score: str) -> set[str]:
        some = tiny_federation("as-lora", tmp_path / score, options={"score": score})
        some.round()
        return set(some.engine.replies[-1][0]) - set(some.engine.requests[-1][0].work.trained)

    assert sent("curvature") == sent("energy") == set()
    some = tiny_federation("as-lora", tmp_path / "again", options={"score": "last-step-energy"})
    some.round()
    trained = some.engine.requests[-1][0].work.trained
    assert sent("last-step-energy") == {f"energy:{name}" for name in trained}
    assert all(value.numel() == 1 for name, value in some.engine.replies[-1][0].items() if name.startswith("energy:"))


def test_adam_refuses_scores_that_need_the_noise_variance() -> None:
    adam = OptimizerConfig(name="adamw")
    softmax = {"select": "softmax"}
    make(**softmax)[0].check(adam, 3, 4)
    for options, clients in ((softmax | {"score": "energy"}, 3), ({"select": "thompson"}, 3), ({}, 3), (softmax, 1)):
        with pytest.raises(UserError, match="adamw"):
            make(**options)[0].check(adam, clients, 4)
    with pytest.raises(UserError, match="significance"):
        make(select="softmax", freeze=True)[0].check(OptimizerConfig(), 3, 4)
