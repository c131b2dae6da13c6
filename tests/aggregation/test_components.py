"""Server-side components against closed forms, reference code and simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.aggregation.averaging import RoundAverage
from lorica.aggregation.kalman import KalmanFilter
from lorica.aggregation.noise import update_noise_variance
from lorica.aggregation.server_optimizers import FedAdam, FedAvgM, ServerAverage, make_server_optimizer
from lorica.aggregation.shrinkage import shrink_singular_values
from lorica.config import ServerConfig
from lorica.local.optimizers import Sgd
from lorica.privacy.mechanism import Terms
from lorica.privacy.released import _release


def series(length: int, seed: int = 0) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=draws).double() for _ in range(length)]


def test_average_is_fedavg_with_a_rate() -> None:
    (mean,) = series(1)
    torch.testing.assert_close(ServerAverage(0.5).step({"x": mean}, {}, 1)["x"], 0.5 * mean)


def test_fedavgm_in_every_round_is_sgd_with_momentum() -> None:
    """The mean update is the negative of a gradient: against `torch.optim.SGD`."""
    theta = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([theta], lr=0.7, momentum=0.9)
    component, found = FedAvgM(0.7, 0.9), torch.zeros(3, 4, dtype=torch.float64)
    for number, mean in enumerate(series(6), start=1):
        theta.grad = -mean
        reference.step()
        found = found + component.step({"x": mean}, {}, number)["x"]
        torch.testing.assert_close(found, theta.detach())


def test_momentum_fades_by_the_rounds_that_a_factor_rested() -> None:
    component, (first, second) = FedAvgM(1.0, 0.5), series(2)
    component.step({"x": first}, {}, 1)
    torch.testing.assert_close(component.step({"x": second}, {}, 4)["x"], 0.5**3 * first + second)


def test_fedadam_without_noise_is_the_papers_algorithm() -> None:
    component = FedAdam(0.1, 0.9, 0.99, 1e-3)
    first = second = torch.zeros(3, 4, dtype=torch.float64)
    for number, mean in enumerate(series(5), start=1):
        first, second = 0.9 * first + 0.1 * mean, 0.99 * second + 0.01 * mean**2
        expected = 0.1 * first / (second.sqrt() + 1e-3)
        torch.testing.assert_close(component.step({"x": mean}, {"x": 0.0}, number)["x"], expected)


def test_fedadam_takes_the_noise_floor_off_so_that_the_second_moment_is_the_signals() -> None:
    draws = torch.Generator().manual_seed(0)
    signal, variance = torch.tensor([0.0, 0.5, 2.0]).double().repeat(2000, 1), 1.7
    component = FedAdam(1.0, 0.0, 0.999, 1e-3)
    for number in range(1, 4000):
        noisy = signal + math.sqrt(variance) * torch.randn(signal.shape, generator=draws).double()
        component.step({"x": noisy}, {"x": variance}, number)
    found = component.tensors["second:x"].mean(0) / (1 - 0.999**3999)
    torch.testing.assert_close(found, signal[0].square(), rtol=0.02, atol=0.02)


def test_configuration_picks_the_optimiser() -> None:
    assert isinstance(make_server_optimizer(ServerConfig()), ServerAverage)
    assert isinstance(make_server_optimizer(ServerConfig(optimizer="fedavgm")), FedAvgM)
    assert isinstance(make_server_optimizer(ServerConfig(optimizer="fedadam")), FedAdam)


def test_shrinkage_is_gavish_and_donohos_closed_form() -> None:
    """One singular value at a time: `η(y) = √((y² - β - 1)² - 4β)/y` above `1 + √β`, zero below."""
    rows, columns, variance = 4, 16, 0.3
    beta, unit = rows / columns, math.sqrt(columns * variance)
    for y in (0.5, 1.4, 1.5, 1.51, 2.0, 10.0):
        values = np.zeros((rows, columns))
        values[1, 2] = y * unit
        expected = math.sqrt((y**2 - beta - 1) ** 2 - 4 * beta) / y * unit if y > 1.5 else 0.0
        for matrix in (values, values.T):
            found = shrink_singular_values(torch.from_numpy(matrix), variance).numpy()
            np.testing.assert_allclose(found, matrix / (y * unit) * expected, atol=1e-9)


def test_shrinkage_kills_pure_noise_and_helps_a_noisy_low_rank_matrix() -> None:
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 200, generator=draws).double()
    # The largest singular value of pure noise sits at the bulk's edge, 1 + √β.
    assert shrink_singular_values(noise, 1.0).norm() < 0.02 * noise.norm() + 3
    signal = 3 * torch.randn(60, 2, generator=draws).double() @ torch.randn(2, 200, generator=draws).double()
    noisy = signal + 2.0 * noise
    shrunk = shrink_singular_values(noisy, 4.0)
    u, s, vt = torch.linalg.svd(noisy, full_matrices=False)
    truncated = (u[:, :2] * s[:2]) @ vt[:2]
    errors = [float((estimate - signal).norm()) for estimate in (shrunk, truncated, noisy)]
    assert errors[0] <= errors[1] < errors[2]


def test_shrinkage_leaves_what_has_no_noise() -> None:
    matrix = torch.randn(3, 5)
    assert shrink_singular_values(matrix, 0.0) is matrix
    assert shrink_singular_values(torch.ones(7), 0.1).shape == (7,)


def test_kalman_gain_is_the_textbooks() -> None:
    """With its own learned drift taken as given, each step is the scalar Kalman recursion."""
    component = KalmanFilter()
    draws = torch.Generator().manual_seed(0)
    signal = torch.randn(400, generator=draws).double()
    estimate = uncertainty = None
    for number in range(1, 12):
        mean = signal + 0.8 * torch.randn(400, generator=draws).double()
        drift = component.numbers["x"][1] if number > 1 else 0.0
        found = component.step({"x": mean}, {"x": 0.64}, number)["x"]
        if estimate is None:
            estimate, uncertainty = torch.zeros_like(mean), max(0.0, float(mean.square().mean()) - 0.64)
        else:
            uncertainty += drift
        gain = uncertainty / (uncertainty + 0.64)
        estimate, uncertainty = estimate + gain * (mean - estimate), (1 - gain) * uncertainty
        torch.testing.assert_close(found, estimate)


def test_kalman_filter_averages_a_steady_signal_and_silences_noise() -> None:
    draws = torch.Generator().manual_seed(1)
    signal, component, quiet = torch.randn(2000, generator=draws).double(), KalmanFilter(), KalmanFilter()
    for number in range(1, 40):
        noise = 1.5 * torch.randn(2000, generator=draws).double()
        found = component.step({"x": signal + noise}, {"x": 2.25}, number)["x"]
        silent = quiet.step({"x": noise}, {"x": 2.25}, number)["x"]
    assert (found - signal).square().mean() < 0.15 * 2.25
    assert silent.square().mean() < 0.1 * 2.25


def test_kalman_filter_follows_a_signal_that_moves() -> None:
    draws = torch.Generator().manual_seed(2)
    signal, component = torch.zeros(3000).double(), KalmanFilter()
    errors = []
    for number in range(1, 80):
        signal = signal + torch.randn(3000, generator=draws).double()
        found = component.step({"x": signal + 1.0 * torch.randn(3000, generator=draws).double()}, {"x": 1.0}, number)[
            "x"
        ]
        errors.append(float((found - signal).square().mean()))
    # Steady state of q = v = 1: p (1 - κ) = 0.618.
    assert np.mean(errors[40:]) == pytest.approx(0.618, rel=0.1)


def test_kalman_filter_without_noise_is_transparent() -> None:
    (mean,) = series(1)
    assert KalmanFilter().step({"x": mean}, {"x": 0.0}, 1)["x"] is mean


def test_average_over_rounds_is_the_weighted_mean() -> None:
    component, values = RoundAverage(0.8), series(7)
    for value in values:
        component.update({"x": value})
    weights = np.array([0.8 ** (6 - index) for index in range(7)])
    expected = sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))
    torch.testing.assert_close(component.tensors["x"], expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_noise_variance_of_a_mean_update_is_the_simulated_one(momentum: float) -> None:
    """Three clients' local optimisers on pure noise, weighted and summed."""
    terms = {0: Terms(0.1, 10, 1.0, 2.0), 1: Terms(0.1, 20, 1.0, 3.0), 2: Terms(0.2, 8, 0.5, 1.0)}
    weights, rate, steps = {0: 0.5, 1: 0.3, 2: 0.2}, 0.4, 5
    draws = torch.Generator().manual_seed(0)
    total = torch.zeros(200_000)
    for client, weight in weights.items():
        optimizer = Sgd({"x": rate}, momentum, 0.0)
        for _ in range(steps):
            noise = terms[client].noise_std * torch.randn(200_000, generator=draws)
            total += weight * optimizer.step({"x": _release(noise)}, {})["x"].tensor
    expected = update_noise_variance(terms, weights, rate, steps, momentum)
    assert float(total.var()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("component", [FedAvgM(0.5, 0.9), FedAdam(0.1, 0.9, 0.99, 1e-3), KalmanFilter()])
def test_what_a_component_remembers_survives_json(component: FedAvgM | FedAdam | KalmanFilter) -> None:
    values = series(6)
    for number in (1, 2, 3):
        component.step({"x": values[number]}, {"x": 0.1}, number)
    numbers, tensors = json.loads(json.dumps(component.numbers)), {k: v.clone() for k, v in component.tensors.items()}
    expected = component.step({"x": values[5]}, {"x": 0.1}, 5)["x"]
    component.numbers, component.tensors = numbers, tensors
    assert torch.equal(component.step({"x": values[5]}, {"x": 0.1}, 5)["x"], expected)
