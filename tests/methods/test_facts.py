"""What is claimed of the methods, checked: subspaces, aggregation error, noise, rotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.adapters.state import AdapterState
from lorica.aggregation.scaffold import Scaffold
from lorica.config import OptimizerConfig
from lorica.local.step import LocalStep
from lorica.messages import Request, Training
from lorica.methods.exchange import Replies
from lorica.methods.server import Server
from lorica.privacy.mechanism import Terms
from lorica.server.federation import Federation
from lorica.testing.checks import ROUNDS, Recording
from lorica.testing.federation import UNCLIPPED, dense, tiny_federation
from tests.methods.conftest import METHODS, Recordings


def row_space(matrix: Tensor) -> Tensor:
    """Projector on the row space."""
    q = torch.linalg.qr(matrix.double().T).Q
    return q @ q.T


def outside(matrix: Tensor, projector: Tensor) -> float:
    """Share of a matrix that lies outside a row space."""
    matrix = matrix.double()
    return float((matrix - matrix @ projector).norm() / matrix.norm())


@pytest.mark.parametrize("name", METHODS)
def test_the_server_holds_its_tensors_as_a_checkpoint_gives_them_back(name: str, recordings: Recordings) -> None:
    """Products of tensors with other strides differ in the last bit, and so would a run that resumes."""
    model = recordings(name).federation.server.model
    pairs = [value for pair in model.merged.values() for value in pair]
    held = [*model.tensors.values(), *pairs]
    assert all(value.is_contiguous() for value in held)
    assert len({value.data_ptr() for value in held}) == len(held)


@pytest.mark.parametrize("name", ["fedsvd", "fedask", "ffa-lora"])
def test_methods_that_train_b_never_leave_the_row_space_of_the_first_a(name: str, recordings: Recordings) -> None:
    recording = recordings(name)
    start, *after = recording.adapters
    for site in recording.federation.server.model.sites:
        first = row_space(start.tensors[site.a])
        assert all(outside(dense(adapter, site), first) < 1e-5 for adapter in after)


@pytest.mark.parametrize("name", ["ro-lora", "as-lora", "deer", "fed-rac-lora", "galore-avg", "la-lora", "fed-sb"])
def test_methods_that_train_a_or_draw_it_anew_do_leave_it(name: str, recordings: Recordings) -> None:
    recording = recordings(name)
    for site in recording.federation.server.model.sites:
        first = row_space(recording.adapters[0].tensors[site.a])
        assert outside(dense(recording.adapters[-1], site), first) > 1e-3


def test_fedsvd_is_ffa_with_an_orthonormal_a(tmp_path: Path) -> None:
    """From a common orthonormal A₀, without noise, SGD and any rotation of the basis give the same model."""
    full = {"privacy": UNCLIPPED, "clients": 1, "batch_size": 20}
    ffa = tiny_federation("ffa-lora", tmp_path / "a", options={"orthonormal_a": True}, **full)
    svd = tiny_federation("fedsvd", tmp_path / "b", **full)
    svd.server.model.assign({site.a: ffa.server.model.tensors[site.a] for site in svd.server.model.sites})
    for _ in range(4):
        ffa.round()
        svd.round()
        for site in svd.server.model.sites:
            torch.testing.assert_close(
                dense(ffa.server.model, site), dense(svd.server.model, site), rtol=1e-3, atol=1e-5
            )


def errors(recording: Recording, round_number: int) -> list[float]:
    """Relative aggregation error `‖Σ w_k B_k A_k - B̄ Ā‖` of each site in one round, from what travelled."""
    (exchange,) = recording.exchanges[round_number - 1]
    before, after = recording.engine.models[exchange], recording.adapters[round_number]
    replies = recording.engine.replies[exchange]
    records = {client: recording.federation.plans[client].records for client in replies}
    found = []
    for site in recording.federation.server.model.sites:
        mean = torch.zeros(site.d_out, site.d_in).double()
        for client, released in replies.items():
            b, a = (before.tensors[name] + released.get(name, 0) for name in (site.b, site.a))
            mean += records[client] / sum(records.values()) * (b.double() @ a.double())
        found.append(float((mean - dense(after, site)).norm() / mean.norm()))
    return found


@pytest.mark.parametrize("name", ["ffa-lora", "ro-lora", "as-lora", "random-lora"])
def test_one_factor_rounds_have_no_aggregation_error(name: str, recordings: Recordings) -> None:
    assert all(max(errors(recordings(name), number)) < 1e-6 for number in range(1, ROUNDS + 1))


@pytest.mark.parametrize("name", ["fed-avg", "la-lora"])
def test_averaged_factors_are_inexact_where_both_moved(name: str, recordings: Recordings) -> None:
    """LA-LoRA alternates, but both factors have moved on every client by the end of a round."""
    assert min(errors(recordings(name), 2)) > 1e-3


def test_joint_training_has_the_quadratic_noise_term() -> None:
    """methods.md 0.5: `E‖E_agg‖² = d_out d_in r v_A v_B (K-1)/K²` for pure noise; one factor has only a linear term."""
    clients, d_out, d_in, rank = 4, 12, 10, 3
    v_a, v_b = 0.3, 0.5
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, d_in, generator=draws), torch.randn(d_out, rank, generator=draws)
    squares, linear = [], []
    for _ in range(3000):
        xi_a = v_a**0.5 * torch.randn(clients, rank, d_in, generator=draws)
        xi_b = v_b**0.5 * torch.randn(clients, d_out, rank, generator=draws)
        mean = torch.stack([(b + xi_b[k]) @ (a + xi_a[k]) for k in range(clients)]).mean(0)
        error = mean - (b + xi_b.mean(0)) @ (a + xi_a.mean(0))
        squares.append(float(error.square().sum()))
        linear.append(float(((b + xi_b.mean(0)) @ a - b @ a).square().sum()))
    expected = d_out * d_in * rank * v_a * v_b * (clients - 1) / clients**2
    assert np.mean(squares) == pytest.approx(expected, rel=0.02)
    assert np.mean(linear) == pytest.approx(d_out * v_b * float(a.square().sum()) / clients, rel=0.02)


def test_fedex_lora_adds_exactly_the_error_that_fedavg_makes(tmp_path: Path) -> None:
    """Same noise, same start: FedAvg's model plus its aggregation error is FedEx-LoRA's."""
    average, exact = tiny_federation("fed-avg", tmp_path / "a"), tiny_federation("fedex-lora", tmp_path / "b")
    average.round()
    exact.round()
    for site in average.server.model.sites:
        clients = list(average.engine.replies[-1].values())
        start = adapted_start(average)
        mean = sum((start[site.b] + c[site.b]).double() @ (start[site.a] + c[site.a]).double() for c in clients) / 3
        torch.testing.assert_close(dense(exact.server.model, site), mean, rtol=1e-5, atol=1e-7)
        assert (dense(average.server.model, site) - mean).norm() > 1e-4


def adapted_start(some: Federation) -> dict[str, Tensor]:
    return dict(some.engine.requests[-1][0].tensors)


def test_la_lora_moves_b_in_odd_steps_and_a_in_even_ones(tmp_path: Path) -> None:
    """Three steps: two on B, one on A. Without noise and filter, each is plain gradient descent on one factor."""
    some = tiny_federation("la-lora", tmp_path, options={"smoothing": "none"}, steps=3)
    steps: list[set[str]] = []
    active = LocalStep.active

    def spy(self: LocalStep, trained: tuple[str, ...], step: int) -> list[str]:
        names = active(self, trained, step)
        steps.append({name[-1] for name in names if name.endswith((".A", ".B"))})
        return names

    exchange = some.engine.exchange

    def spied(requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        # The server asks for the steps too, when it checks replies.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalStep, "active", spy)
            return exchange(requests)

    some.engine.exchange = spied
    some.round()
    assert steps == [{"B"}, {"A"}, {"B"}] * 3


def test_halves_of_a_deer_round_share_its_steps(tmp_path: Path) -> None:
    some = tiny_federation("deer", tmp_path, steps=5)
    some.round()
    works = [exchange[0].work for exchange in some.engine.requests]
    assert all(isinstance(work, Training) for work in works)
    assert [(work.steps, {name[-1] for name in work.trained if name[-2] == "."}) for work in works] == [
        (3, {"B"}),
        (2, {"A"}),
    ]


def test_fedask_costs_nothing_in_its_second_exchange(tmp_path: Path) -> None:
    some = tiny_federation("fedask", tmp_path)
    some.round()
    releases = some.engine.clients[0].ledger.releases("data")
    assert [release.steps for release in releases if release.client == 0] == [2, 0]


def test_fedask_survives_a_crash_between_its_exchanges(tmp_path: Path) -> None:
    """A client that comes back as a new process finds its factors in the ledger and sends the same projection."""
    whole = tiny_federation("fedask", tmp_path / "a")
    whole.round()
    broken = tiny_federation("fedask", tmp_path / "b")
    exchange = broken.engine.exchange
    calls = []

    def crash(requests: dict[int, object]) -> object:
        calls.append(requests)
        if len(calls) == 2:
            raise ConnectionError("the server is gone")
        return exchange(requests)

    broken.engine.exchange = crash
    with pytest.raises(ConnectionError):
        broken.round()
    again = tiny_federation("fedask", tmp_path / "b")
    again.round()
    for key, value in whole.server.model.tensors.items():
        assert torch.equal(value, again.server.model.tensors[key])
    assert again.engine.clients[0].ledger.steps("run", 0) == 2


def test_fedsa_clients_keep_their_own_b_and_head_over_rounds(tmp_path: Path) -> None:
    """A client's B starts from where it left it, though other clients and rounds were in between."""
    some = tiny_federation("fedsa-lora", tmp_path, participants=2)
    first = {site.b: some.server.model.tensors[site.b] for site in some.server.model.sites}
    kept: dict[int, dict[str, Tensor]] = {}
    for _ in range(4):
        some.round()
        for number in some.schedule[some.server.round - 1]:
            now = some.engine.clients[number].personal("run", some.server.round)
            assert set(now) == {*first, "head.weight", "head.bias"}
            assert all(not torch.equal(now[key], kept.get(number, {}).get(key, torch.zeros(()))) for key in now)
            kept[number] = now
        assert all(torch.equal(some.server.model.tensors[key], value) for key, value in first.items())
        assert not any(key in reply for reply in some.engine.replies[-1].values() for key in kept[number])
    for one in kept:
        for other in kept:
            if one != other:
                assert not torch.equal(kept[one]["head.weight"], kept[other]["head.weight"])


@pytest.mark.integration
def test_ranks_that_differ_are_what_clients_hold_train_and_send(tmp_path: Path) -> None:
    ranks = {0: 2, 1: 1, 2: 2}
    for name in ("flex-lora", "flora", "het-lora", "fed-rac-lora", "fedask"):
        some = tiny_federation(name, tmp_path / name, ranks=ranks)
        full = tiny_federation(name, tmp_path / f"{name}-full")
        sent, all_sent = some.round(), full.round()
        for number, rank in ranks.items():
            request, reply = some.engine.requests[0][number], some.engine.replies[0][number]
            for key, value in request.tensors.items():
                if key.endswith((".A", ".B")):
                    assert value.shape[0 if key.endswith(".A") else 1] == rank
            for key, value in reply.items():
                if key.endswith((".A", ".B")):
                    assert value.shape[0 if key.endswith(".A") else 1] == rank
        assert sent.bytes_down[1] < all_sent.bytes_down[1]
        assert sent.bytes_up[1] < all_sent.bytes_up[1] or name == "fedask"


def test_a_smaller_rank_has_the_gradient_of_its_leading_ranks_alone(tmp_path: Path) -> None:
    """Without noise: the client's update is that of a model whose other ranks are zero."""
    some = tiny_federation("flex-lora", tmp_path, privacy=UNCLIPPED, batch_size=20, steps=1, clients=1, ranks={0: 1})
    model: AdapterState = some.server.model
    draws = torch.Generator().manual_seed(0)
    model.assign({name: torch.randn(value.shape, generator=draws) for name, value in model.tensors.items()})
    cut = {name: value.clone() for name, value in model.tensors.items()}
    for site in model.sites:
        cut[site.a][1:] = 0
        cut[site.b][:, 1:] = 0
    other = tiny_federation("fed-avg", tmp_path / "b", privacy=UNCLIPPED, batch_size=20, steps=1, clients=1)
    other.server.model.assign(cut)
    some.round()
    other.round()
    mine, theirs = some.engine.replies[0][0], other.engine.replies[0][0]
    for site in model.sites:
        torch.testing.assert_close(mine[site.a], theirs[site.a][:1])
        torch.testing.assert_close(mine[site.b], theirs[site.b][:, :1])


def scaffold_server(clients: int) -> Server:
    return Server(
        model=AdapterState([], {"x": torch.zeros(5)}),
        rounds=9,
        terms={number: Terms(0.1, 10, 1.0, 0.0) for number in range(clients)},
        optimizer=OptimizerConfig(lr=0.2),
        local_steps=3,
        full_rates={"x": 0.2},
        seed=0,
    )


def test_scaffold_tracked_by_the_server_is_the_papers_algorithm() -> None:
    """Option II, written out with control variates at the clients, over rounds with some of the clients."""
    clients, rate, steps = 4, 0.2, 3
    draws = torch.Generator().manual_seed(0)
    targets = torch.randn(clients, 5, generator=draws)
    server, component = scaffold_server(clients), Scaffold(clients)
    theta, own, common = torch.zeros(5), torch.zeros(clients, 5), torch.zeros(5)
    found = torch.zeros(5)
    for participants in ([0, 1, 2, 3], [1, 3], [0, 2], [0, 1, 2, 3]):
        changes, moves, updates = [], [], {}
        for k in participants:
            local, tracked = theta.clone(), found.clone()
            correction = component.corrections(k, ["x"]).get("x", torch.zeros(5))
            for _ in range(steps):
                local = local - rate * ((local - targets[k]) - own[k] + common)
                tracked = tracked - rate * ((tracked - targets[k]) + correction)
            new = own[k] - common + (theta - local) / (rate * steps)
            changes.append(new - own[k])
            own[k] = new
            moves.append(local - theta)
            updates[k] = {"x": tracked - found}
        theta = theta + torch.stack(moves).mean(0)
        common = common + len(participants) / clients * torch.stack(changes).mean(0)
        replies = Replies(updates, dict.fromkeys(participants, 1 / len(participants)))
        component.learn(replies.updates, replies.weights, server.rates, server.local_steps)
        found = found + replies.mean["x"]
        torch.testing.assert_close(found, theta)
        torch.testing.assert_close(component.tensors["all:x"], common)


def test_scaffold_removes_the_drift_of_different_clients(tmp_path: Path) -> None:
    """Clients with different optima and many local steps: FedAvg stops off the optimum, SCAFFOLD reaches it."""
    curvature = torch.tensor([[1.0, 10.0], [10.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    optimum = (curvature * targets).sum(0) / curvature.sum(0)
    server = replace(scaffold_server(2), local_steps=10, full_rates={"x": 0.05})
    results = []
    for component in (None, Scaffold(2)):
        theta = torch.zeros(2)
        for _ in range(300):
            updates = {}
            for k in range(2):
                local = theta.clone()
                correction = {} if component is None else component.corrections(k, ["x"])
                for _ in range(10):
                    local = local - 0.05 * (curvature[k] * (local - targets[k]) + correction.get("x", torch.zeros(2)))
                updates[k] = {"x": local - theta}
            replies = Replies(updates, {0: 0.5, 1: 0.5})
            if component is not None:
                component.learn(replies.updates, replies.weights, server.rates, server.local_steps)
            theta = theta + replies.mean["x"]
        results.append(float((theta - optimum).norm()))
    assert results[1] < 1e-4 < 0.05 < results[0]
