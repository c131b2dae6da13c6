"""Sampling, noise and the canonical step."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.privacy.mechanism import Terms, add_noise, noisy_gradient, poisson_sample
from lorica.privacy.randomness import ReproducibleRandomness, SecureRandomness
from lorica.tasks.records import Batch
from lorica.testing.records import TinyRecords
from tests.models import adapted, batch, clipped_one_at_a_time

SOURCES = {
    "secure": SecureRandomness,
    "reproducible": lambda: ReproducibleRandomness(seed=1, round_number=2, exchange=1, client=3),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sampling_has_the_right_rate_and_independent_records(source: str) -> None:
    randomness, rate, draws, records = SOURCES[source](), 0.3, 20_000, 5
    drawn = np.zeros((draws, records))
    for row in drawn:
        row[poisson_sample(records, rate, randomness)] = 1
    deviation = math.sqrt(rate * (1 - rate) / draws)
    assert np.all(abs(drawn.mean(0) - rate) < 5 * deviation)
    # Fixed-size batches have the right marginals too; only pairs show that records are drawn independently.
    pairs = drawn.T @ drawn / draws
    joint = math.sqrt(rate**2 * (1 - rate**2) / draws)
    assert np.all(abs(pairs[~np.eye(records, dtype=bool)] - rate**2) < 5 * joint)
    sizes = drawn.sum(1)
    assert abs(sizes.var() - records * rate * (1 - rate)) < 0.05
    assert (sizes == 0).any()
    # Successive draws of one record are independent as well.
    assert abs(np.mean(drawn[1:, 0] * drawn[:-1, 0]) - rate**2) < 5 * joint


@pytest.mark.parametrize("draws", [5000, pytest.param(50_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", SOURCES)
def test_noise_has_the_right_variance_in_every_coordinate(source: str, draws: int) -> None:
    randomness, deviation = SOURCES[source](), 1.7
    noise = torch.stack(
        [add_noise(torch.zeros(2, 3), deviation, *randomness.normal([6])) for _ in range(draws)]
    ).double()
    assert noise.mean(0).abs().max() < 5 * deviation / math.sqrt(draws)
    assert (noise.var(0) / deviation**2 - 1).abs().max() < 5 * math.sqrt(2 / draws)
    kurtosis = (noise / deviation).pow(4).mean(0)
    assert (kurtosis - 3).abs().max() < 5 * math.sqrt(96 / draws)
    correlation = torch.corrcoef(noise.flatten(1).T)
    assert (correlation - torch.eye(6)).abs().max() < 5 / math.sqrt(draws)


def test_secure_noise_never_repeats() -> None:
    draws = torch.cat([torch.stack(SecureRandomness().normal([8, 8])) for _ in range(50)])
    assert len({tuple(row.tolist()) for row in draws}) == 100


def test_secure_noise_is_gaussian() -> None:
    from scipy import stats

    assert stats.kstest(torch.cat(SecureRandomness().normal([50_001, 3])).numpy(), "norm").pvalue > 1e-4


def test_reproducible_streams_differ_by_round_exchange_and_client() -> None:
    (first,) = ReproducibleRandomness(0, 1, 1, 0).normal([4])
    torch.testing.assert_close([first], ReproducibleRandomness(0, 1, 1, 0).normal([4]))
    for other in [(1, 1, 1, 0), (0, 2, 1, 0), (0, 1, 2, 0), (0, 1, 1, 1)]:
        assert not torch.equal(first, *ReproducibleRandomness(*other).normal([4]))


def test_released_sums_lie_on_a_coarse_grid() -> None:
    noisy = add_noise(torch.randn(1000) * 1e-7, 3.0, *SecureRandomness().normal([1000])).double()
    spacing = 2.0 ** (1 - 16)
    assert torch.equal(noisy, (noisy / spacing).round() * spacing)


def test_step_is_clipped_sum_plus_noise_over_the_expected_batch() -> None:
    """Against the formula written out with the same random draws."""
    model, records = adapted("bert"), TinyRecords.texts(40)
    terms = Terms(sampling_rate=0.3, batch_size=12, clip_norm=0.1, noise_multiplier=0.8)
    found = noisy_gradient(
        model.peft_model, model.losses, model.tensors, records, terms, ReproducibleRandomness(0, 1, 1, 0), 64
    )
    randomness = ReproducibleRandomness(0, 1, 1, 0)
    chosen = records.batch(poisson_sample(40, 0.3, randomness))
    expected = clipped_one_at_a_time(model, chosen, 0.1)
    draws = randomness.normal([value.numel() for value in expected.values()])
    for (name, value), own in zip(expected.items(), draws, strict=True):
        noise = 0.08 * own.reshape(value.shape)
        torch.testing.assert_close(found[name].tensor, ((value + noise) / 12).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 37, 10**6])
def test_micro_batches_do_not_change_the_result(tokens: int) -> None:
    model, records = adapted("bert"), TinyRecords.texts(30)
    terms = Terms(0.5, 15, 0.2, 0.5)

    def gradient(budget: int) -> dict[str, Tensor]:
        randomness = ReproducibleRandomness(0, 1, 1, 0)
        found = noisy_gradient(model.peft_model, model.losses, model.tensors, records, terms, randomness, budget)
        return {name: value.tensor for name, value in found.items()}

    reference = gradient(200)
    for name, value in gradient(tokens).items():
        torch.testing.assert_close(value, reference[name], rtol=1e-3, atol=1e-5)


def test_an_empty_batch_releases_noise_alone() -> None:
    model, records = adapted("bert"), TinyRecords.texts(5)

    def fail(*_: object) -> Tensor:
        raise AssertionError("the model was run on an empty batch")

    terms = Terms(sampling_rate=0.0, batch_size=4, clip_norm=2.0, noise_multiplier=1.5)
    found = noisy_gradient(model.peft_model, fail, model.tensors, records, terms, SecureRandomness(), 64)
    values = torch.cat([value.tensor.flatten() for value in found.values()])
    assert abs(float(values.std()) / (1.5 * 2.0 / 4) - 1) < 5 / math.sqrt(2 * len(values))


def test_nan_examples_change_nothing_and_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    model, records = adapted("vit"), TinyRecords.of(batch("vit", 20))
    poisoned = TinyRecords.of(batch("vit", 20))
    poisoned.inputs["pixel_values"][7] = math.nan
    terms = Terms(1.0, 20, 0.5, 0.0)

    def gradient(some: TinyRecords) -> dict[str, Tensor]:
        randomness = ReproducibleRandomness(0, 1, 1, 0)
        found = noisy_gradient(model.peft_model, model.losses, model.tensors, some, terms, randomness, 10**6)
        return {name: value.tensor for name, value in found.items()}

    without = gradient(records.subset(np.array([index for index in range(20) if index != 7])))
    for name, value in gradient(poisoned).items():
        torch.testing.assert_close(value, without[name], rtol=1e-4, atol=1e-6)
    assert not caplog.records


def test_no_noise_without_a_multiplier_and_no_clipping_without_a_bound() -> None:
    terms = Terms(1.0, 10, math.inf, 0.0)
    model, records = adapted("vit"), TinyRecords.of(batch("vit", 10))
    found = noisy_gradient(model.peft_model, model.losses, model.tensors, records, terms, SecureRandomness(), 10**6)
    everything = next(iter(records.micro_batches(np.arange(10), 10**6)))
    parameters = [getattr(module, kind).requires_grad_() for module, kind, _ in model.tensors.values()]
    expected = torch.autograd.grad(model.losses(model.peft_model, everything).mean(), parameters)
    for name, gradient in zip(model.tensors, expected, strict=True):
        torch.testing.assert_close(found[name].tensor, gradient, rtol=1e-4, atol=1e-6)
    assert isinstance(everything, Batch)
