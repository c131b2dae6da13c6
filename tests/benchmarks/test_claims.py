"""The experiments on the paper's claims compute what they say."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from tests.scripts import load_script

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "claims.py"


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    return load_script(SCRIPT)


def test_the_spectrum_is_that_of_dense_algebra(claims: ModuleType) -> None:
    draws = np.random.default_rng(0)
    half = draws.standard_normal((40, 40))
    matrix = (half + half.T).astype(np.float32)
    largest, _ = claims.spectrum(lambda vector: matrix @ vector, 40, seed=0, probes=1)
    assert largest == pytest.approx(float(np.linalg.eigvalsh(matrix)[-1]), rel=1e-3)
    # A sign vector gives the exact trace of a diagonal matrix.
    values = draws.standard_normal(40).astype(np.float32)
    _, trace = claims.spectrum(lambda vector: values * vector.ravel(), 40, seed=0, probes=3)
    assert trace == pytest.approx(float(values.sum()), rel=1e-4)


def test_what_is_out_of_reach_is_what_least_squares_leaves(claims: ModuleType) -> None:
    engine = claims.Factorisation.drawn(seed=1)
    sites = [Site(name, name, claims.WIDTH, claims.WIDTH, claims.RANK, 1.0) for name in engine.targets]
    draws = torch.Generator().manual_seed(0)
    a = {site.a: torch.randn(claims.RANK, claims.WIDTH, generator=draws) for site in sites}
    state = AdapterState(sites, a | {site.b: torch.randn(claims.WIDTH, claims.RANK, generator=draws) for site in sites})
    for site, (by_a, by_b) in zip(sites, claims._out_of_reach(engine, state), strict=True):
        b, a = state.tensors[site.b].double().numpy(), state.tensors[site.a].double().numpy()
        wanted = engine.targets[site.name].double().numpy() - b @ a
        total = np.square(wanted).sum()
        step_on_a = np.linalg.lstsq(b, wanted, rcond=None)[0]
        step_on_b = np.linalg.lstsq(a.T, wanted.T, rcond=None)[0].T
        assert by_a == pytest.approx(np.square(wanted - b @ step_on_a).sum() / total, rel=1e-5)
        assert by_b == pytest.approx(np.square(wanted - step_on_b @ a).sum() / total, rel=1e-5)


def test_without_noise_all_methods_that_train_both_factors_reach_the_minimum(claims: ModuleType) -> None:
    course = claims.run("ro-lora", 3.0, 0.0, seed=0)
    assert course.losses[-1] < 1e-6 * course.losses[0]
    assert all(free <= tied + 1e-9 for free, tied in zip(course.free, course.tied, strict=True))


@pytest.mark.slow
def test_noise_does_not_lock_the_choice_in(claims: ModuleType) -> None:
    """With noise, choosing by significance ends as low as alternating, and the paper's rule far above it."""
    ends = {
        label: statistics.fmean(claims.run(label, 1.0, 0.03, seed).losses[-1] for seed in range(5))
        for label in (claims.BY_LAYER, claims.SOFTMAX, "ro-lora")
    }
    assert ends[claims.BY_LAYER] < 1.05 * ends["ro-lora"]
    assert ends[claims.SOFTMAX] > 1.2 * ends["ro-lora"]


@pytest.mark.slow
def test_choices_are_those_of_the_uploads(claims: ModuleType) -> None:
    shown = CliRunner().invoke(claims.app, ["privacy", "--rounds", "3"], env={"COLUMNS": "120"})
    rows = [line.split("│")[3:5] for line in shown.output.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [["yes", "no"]] * 9
