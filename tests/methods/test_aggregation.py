"""Every method's aggregation against its dense formula: random factors, uneven weights, and ranks where it may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from lorica.adapters.names import is_a, is_factor, site_of
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, leading
from lorica.config import MethodConfig, OptimizerConfig
from lorica.local.sketches import sketch_matrix
from lorica.methods.base import Method, make_method
from lorica.methods.consensus_avg import consensus
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
        self.weights = {site.name: self.random(site.d_out, site.d_in) for site in SITES}
        state = AdapterState(SITES, tensors, lambda site: self.weights[site.name])
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
            if client in asked.slices:
                for name in filter(is_factor, trained):
                    rest = set(range(SITES[0].rank)) - set(asked.slices[client].get(site_of(name), ()))
                    updates[client][name].index_fill_(0 if is_a(name) else 1, torch.tensor(sorted(rest)).long(), 0.0)
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


def agreed(play: Play, site: Site, rank: int) -> Tensor:
    """The leading eigenvectors of the mean projector, dense."""
    mean = torch.zeros(site.d_out, site.d_out).double()
    for client, weight in WEIGHTS.items():
        own = {name: value.double() for name, value in play.clients[client].items()}
        product = own[site.b] @ own[site.a]
        mean += weight * product @ torch.linalg.pinv(product, rtol=1e-6)
    return torch.linalg.eigh(mean).eigenvectors[:, -rank:]


@pytest.mark.parametrize("ranks", [{}, RANKS])
def test_consensus_avg_is_the_mean_product_in_the_agreed_subspace(ranks: dict[int, int]) -> None:
    play = Play("consensus-avg", ranks)
    for _ in range(2):
        play.round()
        for site in SITES:
            mean, subspace = play.mean_product(site), agreed(play, site, 3)
            expected = subspace @ subspace.T @ mean
            close(play.product(site), expected)
            assert (mean - expected).norm() >= (mean - best(mean, 3)).norm() - 1e-6
            for rank in (1, 2):
                b, a = (leading(name, play.server.model.tensors[name], rank) for name in (site.b, site.a))
                close(b @ a, best(expected, rank))
        play.assert_head_averaged()


def test_consensus_avg_does_not_depend_on_the_clients_bases() -> None:
    """And it is exact for clients that share the column space."""
    play, other = Play("consensus-avg"), Play("consensus-avg")
    for each in (play, other):
        each.server.round = 1
    steps, again = play.method.round(play.server), other.method.round(other.server)
    next(steps)
    next(again)
    start, changes, turned_changes, mean = dict(play.server.model.tensors), {}, {}, 0
    for client, weight in WEIGHTS.items():
        changes[client], turned_changes[client] = {HEAD: torch.zeros(4, 5)}, {HEAD: torch.zeros(4, 5)}
        for site in SITES:
            mix, basis = play.random(3, 3), torch.linalg.qr(play.random(3, 3)).Q @ torch.diag(torch.tensor([0.5, 1, 2]))
            b, a = start[site.b] @ mix, play.random(3, site.d_in)
            changes[client] |= {site.b: b - start[site.b], site.a: a - start[site.a]}
            turned_changes[client] |= {
                site.b: b @ basis - start[site.b],
                site.a: torch.linalg.inv(basis) @ a - start[site.a],
            }
        mean = mean + weight * (b @ a).double()
    for generator, updates in ((steps, changes), (again, turned_changes)):
        with pytest.raises(StopIteration):
            generator.send(Replies(updates, WEIGHTS))
    for site in SITES:
        close(play.product(site), other.product(site))
    close(play.product(SITES[-1]), mean)


def test_consensus_avg_of_zeros_leaves_factors_that_can_be_trained() -> None:
    play = Play("consensus-avg")
    play.server.round = 1
    steps = play.method.round(play.server)
    next(steps)
    zeros = {site.b: -play.server.model.tensors[site.b] for site in SITES} | {HEAD: torch.zeros(4, 5)}
    with pytest.raises(StopIteration):
        steps.send(Replies(dict.fromkeys(WEIGHTS, zeros), WEIGHTS))
    for site in SITES:
        assert not play.product(site).any()
        assert play.server.model.tensors[site.a].any(1).all()


def test_consensus_avg_keeps_what_clients_share_where_energy_keeps_one_loud_client() -> None:
    columns, rows = torch.eye(6), torch.eye(5)
    loud = (100 * columns[:, 3:4], rows[3:4])
    pairs = [(columns[:, :1], rows[:1]), (columns[:, :1], rows[:1]), loud]
    found = consensus(pairs, [0.3, 0.3, 0.4], 1)
    close(found.abs(), columns[:, :1])
    mean = sum(weight * b @ a for weight, (b, a) in zip([0.3, 0.3, 0.4], pairs, strict=True))
    close(torch.linalg.svd(mean).U[:, :1].abs(), columns[:, 3:4])
    nothing = (torch.zeros(6, 1), rows[:1])
    assert consensus([nothing, pairs[0]], [0.9, 0.1], 2).shape == (6, 1)
    assert consensus([nothing, nothing], [0.5, 0.5], 2).shape == (6, 0)


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


def test_frlora_merges_the_change_of_the_averaged_product_and_starts_anew() -> None:
    play = Play("frlora")
    total, principal = {}, {}
    for site in SITES:
        weight = play.weights[site.name].double()
        principal[site.name] = best(weight, 3) / site.scale
        close(play.product(site), principal[site.name])
        b, a = (play.server.model.tensors[name].double() for name in (site.b, site.a))
        close(b.T @ b, a @ a.T)
        # The start keeps the product that the adapter had.
        draws = Play("fed-avg").server.model.tensors
        total[site.name] = draws[site.b].double() @ draws[site.a].double()
        close(play.merged(site) + play.product(site), total[site.name])
    for _ in range(3):
        before = play.round()
        for site in SITES:
            total[site.name] = total[site.name] + play.mean(site.b) @ play.mean(site.a) - principal[site.name]
            close(play.merged(site) + play.product(site), total[site.name])
            for name in (site.a, site.b):
                assert torch.equal(play.server.model.tensors[name], before[name])
        play.assert_head_averaged()
    assert torch.linalg.matrix_rank(play.merged(SITES[0])) > 3


def test_frlora_of_one_client_has_that_clients_weight() -> None:
    """And the rest of the weight beside the principal factors has none of their directions."""
    play = Play("frlora")
    play.server.round = 1
    steps = play.method.round(play.server)
    next(steps)
    start = {site.name: play.merged(site) for site in SITES}
    updates = {name: play.random(*value.shape) for name, value in play.server.model.tensors.items()}
    with pytest.raises(StopIteration):
        steps.send(Replies({0: updates}, {0: 1.0}))
    for site in SITES:
        b, a = ((play.server.model.tensors[name] + updates[name]).double() for name in (site.b, site.a))
        close(play.merged(site) + play.product(site), start[site.name] + b @ a)


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
    """Towards B in odd rounds and towards A in even ones, by rotations of three dimensions as SciPy finds them."""
    play = Play("fedrot-lora", alignment=alignment)
    for number in (1, 2):
        before = play.round()
        for site in SITES:
            expected = {site.a: torch.zeros(3, site.d_in).double(), site.b: torch.zeros(site.d_out, 3).double()}
            for client, own in play.clients.items():
                b, a = own[site.b].double(), own[site.a].double()
                mine, reference = (b, before[site.b]) if number == 1 else (a.T, before[site.a].T)
                full = Rotation.align_vectors(reference.numpy(), mine.numpy())[0].as_matrix().T
                u, _, vt = np.linalg.svd((1 - alignment) * np.eye(3) + alignment * full)
                rotation = torch.from_numpy(u @ vt)
                assert torch.linalg.det(rotation) > 0
                close((b @ rotation) @ (rotation.T @ a), b @ a)
                expected[site.a] += WEIGHTS[client] * rotation.T @ a
                expected[site.b] += WEIGHTS[client] * b @ rotation
            close(play.server.model.tensors[site.a], expected[site.a])
            close(play.server.model.tensors[site.b], expected[site.b])
        play.assert_head_averaged()


def test_fedrot_lora_does_not_rotate_while_b_is_zero() -> None:
    """Not even towards A: the rotation would be that of noise."""
    for number in (1, 2):
        play = Play("fedrot-lora", alignment=1.0)
        play.server.round = number - 1
        play.server.model.assign({site.b: torch.zeros(site.d_out, 3) for site in SITES})
        play.round()
        for site in SITES:
            close(play.server.model.tensors[site.a], play.mean(site.a))
            close(play.server.model.tensors[site.b], play.mean(site.b))


def turned(play: Play, bases: dict[int, Tensor]) -> Replies:
    """Replies of clients whose factors are the global ones in other bases."""
    tensors, updates = play.server.model.tensors, {}
    for client, q in bases.items():
        updates[client] = {HEAD: torch.zeros(4, 5)}
        for site in SITES:
            updates[client] |= {site.b: tensors[site.b] @ q - tensors[site.b]}
            updates[client] |= {site.a: q.T @ tensors[site.a] - tensors[site.a]}
    return Replies(updates, WEIGHTS)


@pytest.mark.parametrize("number", [1, 2])
def test_fedrot_lora_undoes_rotations_where_fedavg_destroys_the_product(number: int) -> None:
    """Clients with one product in different bases: the rotated mean is exact."""
    play = Play("fedrot-lora", alignment=1.0)
    play.server.round = number
    steps = play.method.round(play.server)
    next(steps)
    tensors = dict(play.server.model.tensors)
    draws = np.random.default_rng(0)
    replies = turned(
        play, {client: torch.from_numpy(Rotation.random(rng=draws).as_matrix()).float() for client in WEIGHTS}
    )
    for site in SITES:
        mean = [tensors[name] + replies.mean[name] for name in (site.b, site.a)]
        assert (mean[0] @ mean[1] - tensors[site.b] @ tensors[site.a]).norm() > 0.5
    with pytest.raises(StopIteration):
        steps.send(replies)
    for site in SITES:
        close(play.server.model.tensors[site.a], tensors[site.a])
        close(play.server.model.tensors[site.b], tensors[site.b])


def test_fedrot_lora_does_not_undo_a_reflection() -> None:
    """The nearest rotation of a reflected basis leaves one direction turned round, the one that weighs least."""
    play = Play("fedrot-lora", alignment=1.0)
    play.server.round = 2
    steps = play.method.round(play.server)
    next(steps)
    tensors = dict(play.server.model.tensors)
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    with pytest.raises(StopIteration):
        steps.send(turned(play, dict.fromkeys(WEIGHTS, mirror)))
    for site in SITES:
        close(play.product(site), tensors[site.b].double() @ tensors[site.a].double())
        a = tensors[site.a].double()
        _, axes = torch.linalg.eigh(a @ a.T)
        weakest = axes[:, 0]
        close(play.server.model.tensors[site.a], a - 2 * torch.outer(weakest, weakest @ a))


@pytest.mark.parametrize("ranks", [{}, RANKS])
def test_lora_a2_is_the_mean_product_of_the_trained_ranks(ranks: dict[int, int]) -> None:
    play = Play("lora-a2", ranks, budget=0.5)
    for number in range(1, 7):
        play.server.round = number
        steps = play.method.round(play.server)
        asked = next(steps)
        before = dict(play.server.model.tensors)
        for client, slices in asked.slices.items():
            assert sum(map(len, slices.values())) == (2 * ranks[client] if ranks else 3)
        with pytest.raises(StopIteration):
            steps.send(play.reply(asked))
        for site in SITES:
            close(play.product(site), play.mean_product(site))
            active = site.b if number % 2 else site.a
            moved = (play.server.model.tensors[active] - before[active]).any(0 if number % 2 else 1)
            trained = {rank for slices in asked.slices.values() for rank in slices.get(site.name, ())}
            assert set(moved.nonzero().flatten().tolist()) == trained
        play.assert_head_averaged()


def test_lora_a2_ranks_pairs_by_the_size_of_their_change_of_the_weight() -> None:
    """`‖Δb_i a_i‖_F` of the outer products, over all maps; the noise's share is subtracted."""
    play, found = Play("lora-a2", private=False, budget=1.0), {}
    before = play.round()
    after = dict(play.server.model.tensors)
    for site in SITES:
        for rank in range(3):
            change = (after[site.b] - before[site.b])[:, rank]
            found[site.name, rank] = float(torch.outer(change, before[site.a][rank]).norm())
    half = Play("lora-a2", private=False, budget=0.5)
    half.method.load_state_dict(play.method.state_dict())
    half.server.round = 3
    best = sorted(found, key=lambda pair: -found[pair])[:3]
    expected: dict[str, tuple[int, ...]] = {}
    for name, rank in sorted(best):
        expected[name] = (*expected.get(name, ()), rank)
    assert next(half.method.round(half.server)).slices[0] == expected
    noisy = Play("lora-a2", budget=1.0)
    noisy.round()
    for site in SITES:
        # Two steps at rate 0.1 with noise of 0.1, averaged over the clients.
        variance = 0.1**2 * 2 * 0.1**2 * sum(weight**2 for weight in WEIGHTS.values())
        noise = site.d_out * variance / 0.1**2
        energies = (after[site.b] - before[site.b]).double().square().sum(0) / 0.1**2
        close(noisy.method.state_dict()["B"][site.name], energies - noise)


def test_lora_a2_tries_every_pair_and_trains_no_row_whose_column_is_zero() -> None:
    play = Play("lora-a2", budget=0.2)
    play.server.model.assign({site.b: torch.zeros(site.d_out, 3) for site in SITES})
    seen: dict[str, set[tuple[str, int]]] = {"A": set(), "B": set()}
    for number in range(1, 15):
        play.server.round = number
        steps = play.method.round(play.server)
        asked = next(steps)
        trained = {(site, rank) for site, ranks in asked.slices[0].items() for rank in ranks}
        assert len(trained) == 1
        if number % 2 == 0:
            assert trained <= seen["B"]
        seen["B" if number % 2 else "A"] |= trained
        with pytest.raises(StopIteration):
            steps.send(play.reply(asked))
    assert len(seen["B"]) == len(seen["A"]) == 6


def test_lora_a2_with_the_whole_budget_is_ro_lora() -> None:
    one, other = Play("lora-a2", budget=1.0), Play("ro-lora", gauge="none")
    for _ in range(4):
        one.round()
        other.round()
        for name, value in one.server.model.tensors.items():
            assert torch.equal(value, other.server.model.tensors[name])


def test_deer_averages_b_and_then_a() -> None:
    play = Play("deer")
    before = play.round()
    for site in SITES:
        close(play.product(site), play.mean_product(site))
        assert not torch.equal(play.server.model.tensors[site.b], before[site.b])
        assert not torch.equal(play.server.model.tensors[site.a], before[site.a])
