"""The score's closed-form cases (PP-score): exact on quadratics, unbiased under noise, blind to private data."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.aggregation.noise import mean_noise_variance, step_weights
from lorica.methods.gauge import SCALE
from lorica.methods.scores import (
    alignment,
    cross_client_energy,
    cross_client_spread,
    curvature_score_variance,
    debiased_energy,
    energy_variance,
    shared_dimension,
    weight_alignment,
)
from lorica.privacy.mechanism import Terms


def q_of(gradients: Tensor, weights: Tensor) -> float:
    return cross_client_energy(weights @ gradients, gradients.square().sum(1).tolist(), weights.tolist())


def local_rounds(
    gradient: Callable[[Tensor], Tensor],
    starts: Tensor,
    clients: int,
    steps: int,
    rate: float,
    noise: float,
    draws: torch.Generator,
) -> Tensor:
    """`G_k` of every client after `steps` noisy SGD steps on its own copy: starts `(T, d)` -> `(T, K, d)`."""
    theta = starts[:, None].repeat(1, clients, 1)
    for _ in range(steps):
        theta -= rate * (gradient(theta) + noise * torch.randn(theta.shape, generator=draws, dtype=theta.dtype))
    return (starts[:, None] - theta) / (rate * steps)


def quadratic(dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    root = torch.randn(dimension, dimension, generator=draws, dtype=torch.float64) / math.sqrt(dimension)
    return root @ root.T, torch.randn(dimension, generator=draws, dtype=torch.float64)


def test_exact_decrease_of_a_quadratic_without_noise() -> None:
    """E = 1, two identical clients: `a S` is the loss decrease of the step, to rounding."""
    hessian, g = quadratic(20, 0)
    start, rate = torch.zeros(1, 20, dtype=torch.float64), 0.3
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    draws = torch.Generator()
    (first,) = local_rounds(lambda theta: g + theta @ hessian, start, 2, 1, rate, 0.0, draws)
    moved = start - rate * (weights @ first)
    (second,) = local_rounds(lambda theta: g + theta @ hessian, moved, 2, 1, rate, 0.0, draws)
    score = (q_of(first, weights) + alignment(weights @ first, weights @ second)) / 2
    (step,) = moved - start
    decrease = -(g @ step + step @ hessian @ step / 2)
    assert rate * score == pytest.approx(float(decrease), rel=1e-10)


def test_pure_noise_scores_zero_on_average_with_the_stated_variance() -> None:
    clients, dimension, tau, trials = 6, 50, 0.7, 4000
    draws = torch.Generator().manual_seed(1)
    noise = tau * torch.randn(trials, 2, clients, dimension, generator=draws, dtype=torch.float64)
    weights = torch.full((clients,), 1 / clients, dtype=torch.float64)
    variance = tau**2 / clients
    q = np.array([q_of(trial[0], weights) for trial in noise])
    x = np.array([alignment(weights @ trial[0], weights @ trial[1]) for trial in noise])
    n = np.array([debiased_energy(weights @ trial[0], variance) for trial in noise])
    score = (q + x) / 2
    for values in (q, x, n, score):
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(trials)
    energy_noise = 2 * clients / (clients - 1) * dimension * variance**2
    stated = curvature_score_variance(energy_noise, dimension, (variance, variance), 0.0)
    assert score.var() == pytest.approx(stated, rel=0.1)
    assert n.var() == pytest.approx(energy_variance(dimension, variance, 0.0), rel=0.1)


@pytest.mark.parametrize("steps", [1, 5])
def test_unbiased_for_the_decrease_of_a_noisy_quadratic(steps: int) -> None:
    """Monte Carlo: the mean of `a S` is the expected decrease, noise's own harm `(a/2) v tr H` included."""
    clients, dimension, tau, rate, trials = 4, 30, 0.5, 0.05, 3000
    hessian, g = quadratic(dimension, 2)
    starts = torch.zeros(trials, dimension, dtype=torch.float64)
    weights = torch.full((clients,), 1 / clients, dtype=torch.float64)
    draws = torch.Generator().manual_seed(3)
    firsts = local_rounds(lambda theta: g + theta @ hessian, starts, clients, steps, rate, tau, draws)
    moves = -rate * steps * (weights @ firsts)
    seconds = local_rounds(lambda theta: g + theta @ hessian, starts + moves, clients, steps, rate, tau, draws)
    scores, decreases = [], []
    for first, step, second in zip(firsts, moves, seconds, strict=True):
        score = (q_of(first, weights) + alignment(weights @ first, weights @ second)) / 2
        scores.append(rate * steps * score)
        decreases.append(-float(g @ step + step @ hessian @ step / 2))
    error = np.std(scores) / math.sqrt(trials) + np.std(decreases) / math.sqrt(trials)
    # For E > 1 the trapezoid is conservative by (η (E-1)/2) gᵀHg.
    drift = rate * steps * rate * (steps - 1) / 2 * float(g @ hessian @ g)
    assert -4 * error - drift * 1.5 <= np.mean(scores) - np.mean(decreases) <= 4 * error


def test_debiased_energy_is_biased_by_minibatch_noise_where_the_others_are_not() -> None:
    """methods.md 2.4: with strong minibatch noise N' breaks; Q does not."""
    clients, dimension, trials = 4, 40, 3000
    draws = torch.Generator().manual_seed(4)
    g = torch.ones(dimension, dtype=torch.float64) * 0.1
    weights = torch.full((clients,), 1 / clients, dtype=torch.float64)
    noisy = g + torch.randn(trials, clients, dimension, generator=draws, dtype=torch.float64)
    q = np.mean([q_of(trial, weights) for trial in noisy])
    n = np.mean([debiased_energy(weights @ trial, 0.0) for trial in noisy])
    assert q == pytest.approx(float(g @ g), abs=0.15)
    assert n == pytest.approx(float(g @ g) + dimension / clients, rel=0.05)


def test_uneven_weights_stay_unbiased() -> None:
    draws = torch.Generator().manual_seed(5)
    g = torch.full((30,), 0.2, dtype=torch.float64)
    weights = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    noisy = g + torch.randn(6000, 3, 30, generator=draws, dtype=torch.float64)
    values = np.array([q_of(trial, weights) for trial in noisy])
    assert abs(values.mean() - float(g @ g)) < 4 * values.std() / math.sqrt(6000)


def test_unequal_noise_and_weights_have_the_stated_variance() -> None:
    """Pure noise, for the weights of `federation.weights=noise`, which are proportional to 1/τ², and for others."""
    taus = torch.tensor([0.3, 0.6, 1.2, 0.9], dtype=torch.float64)
    draws = torch.Generator().manual_seed(6)
    noisy = taus[:, None] * torch.randn(5000, 4, 30, generator=draws, dtype=torch.float64)
    for weights in (taus**-2 / (taus**-2).sum(), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)):
        variance = float((weights**2 * taus**2).sum())
        spread = cross_client_spread((taus**2).tolist(), weights.tolist())
        values = np.array([q_of(trial, weights) for trial in noisy])
        assert values.var() == pytest.approx(energy_variance(30, variance, 0.0, spread), rel=0.1)


def subspace(dimension: int, rank: int, draws: torch.Generator) -> Tensor:
    """Orthonormal rows times `s`, with PyTorch's QR."""
    return SCALE * torch.linalg.qr(torch.randn(dimension, rank, generator=draws, dtype=torch.float64)).Q.T


@pytest.mark.parametrize("factor", ["A", "B"])
def test_alignment_in_weight_space_is_that_of_dense_gradients(factor: str) -> None:
    """`⟨G₁ P₁, G₂ P₂⟩ γ² s²`, with the projectors on what the resting factors span, formed without the factors."""
    d_out, d_in, rank, gamma = 7, 9, 2, 1.7
    draws = torch.Generator().manual_seed(7)
    dense = torch.randn(2, d_out, d_in, generator=draws, dtype=torch.float64)
    resting = [subspace(d_in if factor == "B" else d_out, rank, draws) for _ in range(2)]
    projected, steps = [], []
    for g, rows in zip(dense, resting, strict=True):
        projector = torch.linalg.pinv(rows) @ rows
        projected.append(g @ projector if factor == "B" else projector @ g)
        steps.append((gamma * g @ rows.T, rows) if factor == "B" else (rows.T, gamma * rows @ g))
    expected = gamma**2 * SCALE**2 * float((projected[0] * projected[1]).sum())
    assert weight_alignment([steps[0]], [steps[1]], SCALE) == pytest.approx(expected, rel=1e-10)
    # In one and the same subspace, whatever its basis, it is the alignment of the factors' gradients.
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=draws, dtype=torch.float64)).Q
    rows = turn @ resting[0]
    g = gamma * dense[1]
    turned = (g @ rows.T, rows) if factor == "B" else (rows.T, rows @ g)
    same = g @ resting[0].T if factor == "B" else resting[0] @ g
    gradient = steps[0][0 if factor == "B" else 1]
    plain = alignment(gradient.flatten(), same.flatten())
    assert weight_alignment([steps[0]], [turned], SCALE) == pytest.approx(plain, rel=1e-10)


def test_noise_in_weight_space_has_the_stated_variance() -> None:
    """Pure noise of two rounds, taken in two subspaces that share a part: of `X`, and of the whole score."""
    d_out, d_in, rank, clients, trials, tau = 6, 5, 2, 3, 4000, 0.8
    draws = torch.Generator().manual_seed(8)
    rows = [subspace(d_in, rank, draws) for _ in range(2)]
    noise = tau * torch.randn(trials, 2, clients, d_out, rank, generator=draws, dtype=torch.float64)
    weights = torch.full((clients,), 1 / clients, dtype=torch.float64)
    variance, dimension = tau**2 / clients, d_out * rank
    means = noise.mean(2)
    x = np.array([weight_alignment([(m[0], rows[0])], [(m[1], rows[1])], SCALE) for m in means])
    shared = shared_dimension([(rows[0], rows[1], d_out)], SCALE)
    assert 0.1 * dimension < shared < 0.9 * dimension
    assert shared_dimension([(rows[0], rows[0], d_out)], SCALE) == pytest.approx(dimension)
    assert x.var() == pytest.approx(shared * variance**2, rel=0.1)
    q = np.array([q_of(trial[0].flatten(1), weights) for trial in noise])
    energy_noise = energy_variance(dimension, variance, 0.0, 2 * clients / (clients - 1))
    # The later round has half the noise.
    stated = curvature_score_variance(energy_noise, shared, (variance, variance / 4), 0.0)
    assert ((q + x / 2) / 2).var() == pytest.approx(stated, rel=0.1)


def test_signal_and_noise_of_the_score_have_the_stated_variance() -> None:
    clients, dimension, trials = 5, 20, 20_000
    draws = torch.Generator().manual_seed(9)
    g = torch.full((dimension,), 0.7, dtype=torch.float64)
    noise = torch.randn(trials, 2, clients, dimension, generator=draws, dtype=torch.float64)
    noisy = g + noise * torch.tensor([1.0, 0.5], dtype=torch.float64)[:, None, None]
    mean = noisy.mean(2)
    q = ((noisy[:, 0].sum(1) ** 2).sum(1) - (noisy[:, 0] ** 2).sum((1, 2))) / (clients * (clients - 1))
    score = (q + (mean[:, 0] * mean[:, 1]).sum(1)) / 2
    variances = (1 / clients, 0.25 / clients)
    energy_noise = energy_variance(dimension, variances[0], 0.0, 2 * clients / (clients - 1))
    stated = curvature_score_variance(energy_noise, dimension, variances, float(g @ g))
    assert float(score.var()) == pytest.approx(stated, rel=0.05)


def test_step_weights_are_how_far_each_gradient_moves_the_parameters() -> None:
    assert step_weights(4, 0.0).tolist() == [1, 1, 1, 1]
    for moment in (0.5, 0.9):
        parameter = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=moment)
        moved = []
        for active in range(5):
            parameter.data.zero_()
            optimizer.state.clear()
            for step in range(5):
                parameter.grad = torch.tensor([1.0 if step == active else 0.0])
                optimizer.step()
            moved.append(-parameter.item())
        assert step_weights(5, moment).tolist() == pytest.approx(moved, rel=1e-6)


def test_noise_variance_of_the_mean_is_the_simulated_one() -> None:
    terms = {0: Terms(0.1, 10, 1.0, 2.0), 1: Terms(0.1, 20, 1.0, 3.0)}
    weights, coefficients = {0: 0.7, 1: 0.3}, step_weights(4, 0.8)
    draws = np.random.default_rng(0)
    trials = 200_000
    total = np.zeros(trials)
    for client, weight in weights.items():
        steps = draws.normal(0, terms[client].noise_std, (trials, 4))
        total += weight * steps @ coefficients.numpy() / coefficients.sum().item()
    assert mean_noise_variance(terms, weights, coefficients) == pytest.approx(total.var(), rel=0.02)
