"""Every method's aggregation against its dense formula: random factors, uneven weights, and ranks where it may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, leading
from lorica.config import MethodConfig, OptimizerConfig
from lorica.local.sketches import sketch_matrix
from lorica.methods.base import Method, make_method
from lorica.methods.exchange import Project, Replies, Train
from lorica.methods.lora_fair import descend
from lorica.methods.server import Server
from lorica.privacy.mechanism import Terms

SITES = [Site("layers.0.q", "layers.0", 12, 9, 3, 2.0), Site("layers.1.q", "layers.1", 7, 10, 3, 2.0)]
WEIGHTS = {0: 0.5, 1: 0.2, 2: 0.3}
RANKS = {0: 3, 1: 1, 2: 2}
HEAD = "head.weight"


class Play:
    """Drives one method with made-up replies and remembers the clients' final factors."""

    def __init__(
        self, name: str, ranks: dict[int, int] | None = None, private: bool = True, seed: int = 0, **options: Any
    ) -> None:
        self.draws = torch.Generator().manual_seed(seed)
        tensors = {HEAD: self.random(4, 5)}
        for site in SITES:
            tensors |= {site.a: self.random(site.rank, site.d_in), site.b: self.random(site.d_out, site.rank)}
        self.method: Method = make_method(MethodConfig(name=name, **options), SITES)
        state = AdapterState(SITES, tensors)
        self.method.start(state, 5)
        self.server = Server(
            model=state,
            rounds=10,
            terms={client: Terms(0.1, 10, 1.0, 1.0 if private else 0.0) for client in WEIGHTS},
            optimizer=OptimizerConfig(lr=0.1),
            local_steps=2,
            full_rates=dict.fromkeys(state.tensors, 0.1),
            seed=5,
            ranks=ranks or {},
        )
        self.clients: dict[int, dict[str, Tensor]] = {}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draws)

    def round(self) -> dict[str, Tensor]:
        """One round; returns the global tensors that it started from."""
        self.server.round += 1
        steps = self.method.round(self.server)
        asked: Any = next(steps)
        before = dict(self.server.model.tensors)
        while True:
            try:
                asked = steps.send(self.reply(asked))
            except StopIteration:
                return before

    def reply(self, asked: Train | Project) -> Replies:
        if isinstance(asked, Project):
            sketches = {
                client: {name: own[f"{name}.A"].T @ (own[f"{name}.B"].T @ basis) for name, basis in asked.bases.items()}
                for client, own in self.clients.items()
            }
            return Replies({}, WEIGHTS, {}, sketches)
        trained = self.server.model.trained(asked.factors)
        updates: dict[int, dict[str, Tensor]] = {}
        sketches = {}
        for client in WEIGHTS:
            rank = asked.ranks.get(client)
            start = {name: leading(name, value, rank) for name, value in self.server.model.tensors.items()}
            updates[client] = {name: 0.3 * self.random(*start[name].shape) for name in trained}
            self.clients[client] = start | {name: start[name] + update for name, update in updates[client].items()}
            own = self.clients[client]
            if asked.sketch_columns is not None:
                sketches[client] = {
                    site.name: own[site.b]
                    @ (own[site.a] @ sketch_matrix(5, self.server.round, site.name, site.d_in, asked.sketch_columns))
                    for site in SITES
                }
                updates[client] = {HEAD: updates[client][HEAD]}
            updates[client] = {name: value for name, value in updates[client].items() if name not in asked.personal}
        return Replies(updates, WEIGHTS, {}, sketches)

    def mean_product(self, site: Site) -> Tensor:
        """`Σ_k w_k B_k R_k A_k`, dense, fp64."""
        products = []
        for client, weight in WEIGHTS.items():
            own = {name: value.double() for name, value in self.clients[client].items()}
            middle = own.get(site.r, torch.eye(own[site.b].shape[1]).double())
            products.append(weight * own[site.b] @ middle @ own[site.a])
        return sum(products)

    def mean(self, name: str) -> Tensor:
        """`Σ_k w_k θ_k` of a tensor, fp64."""
        return sum(weight * self.clients[client][name].double() for client, weight in WEIGHTS.items())

    def product(self, site: Site) -> Tensor:
        """The new global factors' product, without what was merged."""
        tensors = {name: value.double() for name, value in self.server.model.tensors.items()}
        return tensors[site.b] @ tensors.get(site.r, torch.eye(site.rank).double()) @ tensors[site.a]

    def merged(self, site: Site) -> Tensor:
        b, a = self.server.model.merged[site.name]
        return b.double() @ a.double()

    def assert_head_averaged(self) -> None:
        close(self.server.model.tensors[HEAD].double(), self.mean(HEAD))


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the whole matrix's size."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= 1e-5 * max(1.0, float(expected.norm()))


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("name", ["fed-avg", "la-lora", "ffa-lora"])
def test_averaging_methods_average_each_factor(name: str) -> None:
    play = Play(name)
    play.round()
    for site in SITES:
        close(play.server.model.tensors[site.a], play.mean(site.a))
        close(play.server.model.tensors[site.b], play.mean(site.b))
    play.assert_head_averaged()


@pytest.mark.parametrize("factorise", ["factors", "dense"])
def test_fedsvd_keeps_the_product_and_orthonormalises_a(factorise: str) -> None:
    play = Play("fedsvd", factorise=factorise)
    for _ in range(3):
        play.round()
        for site in SITES:
            close(play.product(site), play.mean_product(site))
            a, b = play.server.model.tensors[site.a].double(), play.server.model.tensors[site.b].double()
            close(a @ a.T, torch.eye(3))
            gram = b.T @ b
            close(gram, gram.diagonal().diag())  # B = U S
        play.assert_head_averaged()


@pytest.mark.parametrize("ranks", [{}, RANKS])
@pytest.mark.parametrize("balanced", [True, False])
def test_fedask_under_dp_finds_the_mean_product_exactly(ranks: dict[int, int], balanced: bool) -> None:
    """Only B is trained and A is common, so the mean has rank r and the sketch of r + p columns loses nothing."""
    play = Play("fedask", ranks, oversampling=0, balanced=balanced)
    for _ in range(2):
        play.round()
        for site in SITES:
            close(play.product(site), play.mean_product(site))
            if balanced:
                a, b = play.server.model.tensors[site.a].double(), play.server.model.tensors[site.b].double()
                close(a @ a.T, b.T @ b)
        play.assert_head_averaged()


def test_fedask_without_noise_is_the_truncated_svd_once_the_sketch_is_wide_enough() -> None:
    play = Play("fedask", private=False, oversampling=6)
    play.round()
    assert (play.mean_product(SITES[0]).svd().S[3:] > 0.1).any()  # the mean has more than rank r
    # 3 clients of rank 3: the mean has rank up to 9, bounded by the smallest side; the second site's is 7.
    site = SITES[1]
    close(play.product(site), best(play.mean_product(site), 3))


@pytest.mark.parametrize("ranks", [{}, RANKS])
def test_flex_lora_redistributes_the_truncated_svd_of_the_mean(ranks: dict[int, int]) -> None:
    play = Play("flex-lora", ranks)
    for _ in range(2):
        play.round()
        for site in SITES:
            mean = play.mean_product(site)
            close(play.product(site), best(mean, 3))
            for rank in (1, 2):
                b, a = (leading(name, play.server.model.tensors[name], rank) for name in (site.b, site.a))
                close(b @ a, best(mean, rank))
        play.assert_head_averaged()


@pytest.mark.parametrize("ranks", [{}, RANKS])
def test_flora_merges_the_mean_product_and_starts_anew(ranks: dict[int, int]) -> None:
    play = Play("flora", ranks)
    total = {site.name: torch.zeros(site.d_out, site.d_in).double() for site in SITES}
    for _ in range(3):
        before = play.round()
        for site in SITES:
            total[site.name] += play.mean_product(site)
            close(play.merged(site), total[site.name])
            assert not play.server.model.tensors[site.b].any()
            fresh = play.server.model.tensors[site.a]
            assert not torch.equal(fresh, before[site.a])
            assert fresh.abs().max() <= 1 / np.sqrt(site.d_in)
        play.assert_head_averaged()


def test_fedex_lora_is_the_mean_product_with_the_residual_merged() -> None:
    play = Play("fedex-lora")
    earlier = {site.name: torch.zeros(site.d_out, site.d_in).double() for site in SITES}
    for _ in range(3):
        play.round()
        for site in SITES:
            close(play.server.model.tensors[site.a], play.mean(site.a))
            close(play.server.model.tensors[site.b], play.mean(site.b))
            residual = play.mean_product(site) - play.mean(site.b) @ play.mean(site.a)
            assert residual.norm() > 0.1
            close(play.merged(site), earlier[site.name] + residual)
            earlier[site.name] = earlier[site.name] + residual
        play.assert_head_averaged()


def test_lora_fair_is_regularised_least_squares() -> None:
    play = Play("lora-fair", regularisation=0.05)
    play.round()
    for site in SITES:
        a, mean_b = play.mean(site.a), play.mean(site.b)
        close(play.server.model.tensors[site.a], a)
        residual = play.mean_product(site) - mean_b @ a
        # Ridge regression of the residual on the rows of Ā, by augmented least squares.
        augmented = np.vstack([a.T.numpy(), np.sqrt(0.05) * np.eye(3)])
        target = np.vstack([residual.T.numpy(), np.zeros((3, site.d_out))])
        correction = np.linalg.lstsq(augmented, target, rcond=None)[0].T
        close(play.server.model.tensors[site.b], mean_b + torch.from_numpy(correction))
    play.assert_head_averaged()


def test_lora_fair_descends_the_papers_objective() -> None:
    draws = torch.Generator().manual_seed(0)
    b_s, a_s = torch.randn(8, 6, generator=draws).double(), torch.randn(6, 9, generator=draws).double()
    b, a = torch.randn(8, 2, generator=draws).double(), torch.randn(2, 9, generator=draws).double()

    def objective(correction: Tensor) -> Tensor:
        product, target = ((b + correction) @ a).flatten(), (b_s @ a_s).flatten()
        return 1 - torch.cosine_similarity(product, target, dim=0) + 0.01 * correction.square().sum()

    correction = torch.zeros_like(b).requires_grad_()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(objective(correction), correction)
        correction = (correction - 0.1 * gradient).detach().requires_grad_()
    found = descend(b_s, a_s, b, a, 0.01, 20, 0.1)
    close(found, correction.detach())
    assert objective(found) < objective(torch.zeros_like(b))
    assert not descend(b_s, a_s, torch.zeros_like(b), a, 0.01, 5, 0.1).any()


def test_lora_fair_can_solve_iteratively() -> None:
    play, plain = Play("lora-fair", solver="iterative", lr=1.0), Play("fed-avg")
    play.round()
    plain.round()
    for site in SITES:
        target = play.mean_product(site).flatten()
        cosine = [torch.cosine_similarity(one.product(site).flatten(), target, dim=0) for one in (play, plain)]
        assert cosine[0] > cosine[1]


def test_fedsa_lora_averages_a_and_sees_nothing_else() -> None:
    play = Play("fedsa-lora")
    before = play.round()
    for site in SITES:
        close(play.server.model.tensors[site.a], play.mean(site.a))
        assert torch.equal(play.server.model.tensors[site.b], before[site.b])
    assert torch.equal(play.server.model.tensors[HEAD], before[HEAD])


@pytest.mark.parametrize("ranks", [{}, RANKS])
@pytest.mark.parametrize("norm_weights", [True, False])
def test_het_lora_is_the_padded_mean_with_norm_weights(ranks: dict[int, int], norm_weights: bool) -> None:
    play = Play("het-lora", ranks, norm_weights=norm_weights, pruning=1.0)
    play.round()
    weights = dict(WEIGHTS)
    if norm_weights:
        norms = {
            client: torch.cat([(own[site.b] @ own[site.a]).flatten() for site in SITES]).norm()
            for client, own in play.clients.items()
        }
        weights = {client: float(norm / sum(norms.values())) for client, norm in norms.items()}
    for site in SITES:
        for name in (site.a, site.b):
            expected = torch.zeros_like(play.server.model.tensors[name])
            for client, own in play.clients.items():
                expected[tuple(slice(size) for size in own[name].shape)] += weights[client] * own[name]
            close(play.server.model.tensors[name], expected)
    play.assert_head_averaged()


def test_het_lora_prunes_a_client_whose_tail_shrank() -> None:
    play = Play("het-lora", pruning=0.7)
    play.server.round = 1
    steps = play.method.round(play.server)
    asked = next(steps)
    assert set(asked.ranks.values()) == {3}
    replies = play.reply(asked)
    for site in SITES:
        # Client 0 loses its last rank, the others' grows.
        replies.updates[0][site.b][:, 2] = -play.server.model.tensors[site.b][:, 2]
        for client in (1, 2):
            replies.updates[client][site.b][:, 2] = play.server.model.tensors[site.b][:, 2]
            replies.updates[client][site.a][2] = play.server.model.tensors[site.a][2]
    with pytest.raises(StopIteration):
        steps.send(replies)
    assert play.method.decisions() == {"ranks": {"0": 2, "1": 3, "2": 3}}
    play.server.round = 2
    assert next(play.method.round(play.server)).ranks == {0: 2, 1: 3, 2: 3}


@pytest.mark.parametrize("ranks", [{}, RANKS])
@pytest.mark.parametrize("trains", ["A", "B", "coin"])
def test_fed_rac_lora_chains_products_over_new_subspaces(ranks: dict[int, int], trains: str) -> None:
    play = Play("fed-rac-lora", ranks, trains=trains)
    total = {site.name: torch.zeros(site.d_out, site.d_in).double() for site in SITES}
    seen = []
    for _ in range(4):
        before = play.round()
        for site in SITES:
            drawn = before[site.b] if before[site.b].any() else before[site.a].T
            close(drawn.T @ drawn, torch.eye(3))
            total[site.name] += play.mean_product(site)
            close(play.merged(site), total[site.name])
            assert not play.product(site).any()  # what was merged is not in the factors as well
        seen.append(drawn)
        play.assert_head_averaged()
    if trains != "coin":
        assert all(not torch.equal(seen[0], other) for other in seen[1:])


def test_galore_avg_averages_weights_in_the_span_of_released_directions() -> None:
    play = Play("galore-avg", refresh=2)
    total = {site.name: torch.zeros(site.d_out, site.d_in).double() for site in SITES}
    projected: dict[str, Tensor] = {}
    for round_number in range(1, 7):
        before = play.round()
        left = (round_number - 1) // 2 % 2 == 0
        for site in SITES:
            projector = before[site.b] if left else before[site.a].T
            close(projector.T @ projector, torch.eye(3))
            if (round_number - 1) % 2 == 0:
                if site.name in projected:
                    # The new projector spans the singular vectors of the last projection's total update.
                    u, _, vt = torch.linalg.svd(projected[site.name])
                    basis = u[:, :3] if left else vt[:3].T
                    close(projector.double() @ projector.T.double(), basis @ basis.T)
                projected[site.name] = torch.zeros(site.d_out, site.d_in).double()
            projected[site.name] = projected[site.name] + play.mean_product(site)
            total[site.name] += play.mean_product(site)
            close(play.merged(site), total[site.name])
            assert not play.product(site).any()
        play.assert_head_averaged()


@pytest.mark.parametrize("warm_up", [0, 2])
def test_fed_sb_averages_the_product_through_r_alone(warm_up: int) -> None:
    play = Play("fed-sb", warm_up=warm_up)
    for round_number in range(1, 6):
        before = play.round()
        for site in SITES:
            close(play.product(site), play.mean_product(site))
            if round_number > warm_up:
                assert torch.equal(play.server.model.tensors[site.a], before[site.a])
                assert torch.equal(play.server.model.tensors[site.b], before[site.b])
                close(before[site.a] @ before[site.a].T, torch.eye(3))
                close(before[site.b].T @ before[site.b], torch.eye(3))
        play.assert_head_averaged()


@pytest.mark.parametrize("alignment", [0.0, 0.5, 1.0])
def test_fedrot_lora_rotates_without_changing_a_clients_product(alignment: float) -> None:
    play = Play("fedrot-lora", alignment=alignment)
    before = play.round()
    for site in SITES:
        expected = {site.a: torch.zeros(3, site.d_in).double(), site.b: torch.zeros(site.d_out, 3).double()}
        for client, own in play.clients.items():
            b, a = own[site.b].double(), own[site.a].double()
            u, _, vt = np.linalg.svd((a @ before[site.a].double().T).numpy())
            u, _, vt = np.linalg.svd((1 - alignment) * np.eye(3) + alignment * u @ vt)
            rotation = torch.from_numpy(u @ vt)
            close((b @ rotation) @ (rotation.T @ a), b @ a)
            expected[site.a] += WEIGHTS[client] * rotation.T @ a
            expected[site.b] += WEIGHTS[client] * b @ rotation
        close(play.server.model.tensors[site.a], expected[site.a])
        close(play.server.model.tensors[site.b], expected[site.b])
    play.assert_head_averaged()


def test_fedrot_lora_undoes_rotations_where_fedavg_destroys_the_product() -> None:
    """Clients with one product in different bases: the rotated mean is exact."""
    play = Play("fedrot-lora", alignment=1.0)
    play.server.round = 1
    steps = play.method.round(play.server)
    next(steps)
    tensors = dict(play.server.model.tensors)
    updates = {}
    for client in WEIGHTS:
        updates[client] = {HEAD: torch.zeros(4, 5)}
        for site in SITES:
            q = torch.linalg.qr(play.random(3, 3)).Q
            updates[client] |= {site.b: tensors[site.b] @ q - tensors[site.b]}
            updates[client] |= {site.a: q.T @ tensors[site.a] - tensors[site.a]}
    replies = Replies(updates, WEIGHTS)
    for site in SITES:
        mean = [tensors[name] + replies.mean[name] for name in (site.b, site.a)]
        assert (mean[0] @ mean[1] - tensors[site.b] @ tensors[site.a]).norm() > 0.5
    with pytest.raises(StopIteration):
        steps.send(replies)
    for site in SITES:
        close(play.product(site), tensors[site.b] @ tensors[site.a])


def test_deer_averages_b_and_then_a() -> None:
    play = Play("deer")
    before = play.round()
    for site in SITES:
        close(play.product(site), play.mean_product(site))
        assert not torch.equal(play.server.model.tensors[site.b], before[site.b])
        assert not torch.equal(play.server.model.tensors[site.a], before[site.a])
