"""Exact tests: right by chance as often as they say, and what each of them sees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from lorica.audit import exact
from lorica.audit.exact import Memberships, Outcome
from tests.tiers import integration

Draws = np.random.Generator
RATE = 0.25


def noise(draws: Draws, scale: float = 1.0) -> dict[str, np.ndarray]:
    return {name: scale * draws.standard_normal((4, size)) for name, size in (("A", 60), ("B", 40))}


def batches(draws: Draws) -> list[Memberships]:
    shape = (3, 40)
    return [Memberships(draws.random(shape) < 0.9, draws.random(shape) < RATE) for _ in range(2)]


def clean(owners: list[Memberships]) -> list[Memberships]:
    return [Memberships(one.visible, one.drawn & one.visible) for one in owners]


TESTS: dict[str, Callable[[Draws], Outcome]] = {
    "variance": lambda draws: exact.noise_variance(noise(draws)),
    "coordinates": lambda draws: exact.noise_of_each_coordinate(noise(draws)),
    "normality": lambda draws: exact.normality(draws.standard_normal(400)),
    "releases": lambda draws: exact.noise_of_releases(noise(draws)),
    "tensors": lambda draws: exact.noise_of_tensors([list(draws.standard_normal((3, 50))) for _ in range(2)]),
    "clip": lambda draws: exact.contributions(1 + 0.01 * draws.standard_normal(30), np.full(30, 0.01))[0],
    "division": lambda draws: exact.contributions(1 + 0.01 * draws.standard_normal(30), np.full(30, 0.01))[1],
    "nothing else": lambda draws: exact.nothing_else(float(np.square(draws.standard_normal(90)).sum()), 90),
    "sampling rate": lambda draws: exact.sampling_rate(clean(batches(draws)), RATE),
    "batch sizes": lambda draws: exact.batch_sizes(clean(batches(draws)), RATE),
    "independent batches": lambda draws: exact.independent_batches(clean(batches(draws))),
}


@pytest.mark.parametrize("name", [*TESTS][:-2] + integration(*[*TESTS][-2:]))
def test_a_promise_that_holds_fails_as_often_as_its_p_value_says(name: str) -> None:
    draws, runs = np.random.default_rng(1), 300
    p_values = np.array([TESTS[name](draws).p_value for _ in range(runs)])
    assert ((p_values >= 0) & (p_values <= 1)).all()
    for level in (0.02, 0.1):
        assert (p_values <= level).sum() <= stats.binom(runs, level).isf(1e-4)


def test_ten_percent_of_the_noise_are_missed_by_no_variance_test() -> None:
    draws = np.random.default_rng(2)
    values = {"A": draws.standard_normal((12, 400)) / 1.1}
    assert exact.noise_variance(values).p_value < 1e-12


def test_a_coordinate_without_noise_is_found_among_thousands() -> None:
    values = np.random.default_rng(3).standard_normal((12, 5000))
    values[:, 7] *= 0.01
    assert exact.noise_of_each_coordinate({"A": values}).p_value < 1e-12


def test_batches_of_fixed_size_have_the_right_rate_and_the_wrong_sizes() -> None:
    draws = np.random.default_rng(4)
    drawn = np.zeros((12, 200), dtype=bool)
    for row in drawn:
        row[draws.permutation(200)[:50]] = True
    owners = [Memberships(np.ones_like(drawn), drawn)]
    assert exact.sampling_rate(owners, RATE).p_value > 0.9
    assert exact.batch_sizes(owners, RATE).p_value < 1e-12
    assert exact.independent_batches(owners).p_value > 1e-3


@pytest.mark.parametrize("kind", ["the same", "disjoint"])
def test_batches_that_know_of_each_other_are_found(kind: str) -> None:
    drawn = np.random.default_rng(5).random((1, 200)) < RATE
    other = drawn if kind == "the same" else ~drawn & (np.random.default_rng(6).random((1, 200)) < 1 / 3)
    owners = [Memberships(np.ones((2, 200), dtype=bool), np.concatenate([drawn, other]))]
    assert exact.independent_batches(owners).p_value < 1e-6
    assert exact.batch_sizes(owners, RATE).p_value > 1e-3


def test_refutations_are_corrected_for_the_number_of_tests() -> None:
    tests = [Outcome("one", 2 * exact.FALSE_ALARM / 100, ""), Outcome("two", exact.FALSE_ALARM / 1000, "")]
    assert [test.promise for test in exact.refuted(tests, among=100)] == ["two"]
    assert [test.promise for test in exact.refuted(tests)] == ["one", "two"]
