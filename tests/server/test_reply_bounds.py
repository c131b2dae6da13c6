"""Bounds on updates: they hold for whatever the optimiser does with noisy gradients, and are not far off."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.config import OptimizerConfig
from lorica.local.optimizers import make_optimizer
from lorica.local.step import LocalStep, transform_gradients
from lorica.messages import Training
from lorica.privacy.mechanism import Terms
from lorica.privacy.released import _release
from lorica.server import reply_bounds as bounds
from lorica.server.reply_bounds import clipped_norm, gaussian_norm, gradient_bound, update_bounds

RECORDS = 40
TERMS = Terms(sampling_rate=0.2, batch_size=8, clip_norm=1.0, noise_multiplier=0.7)
SHAPES = {"s.A": (3, 8), "s.B": (6, 3), "head.weight": (4, 6)}
LOCAL = {
    "plain": LocalStep(),
    "gaussian": LocalStep(smoothing="gaussian"),
    "rescale": LocalStep(smoothing="rescale"),
    "alternate": LocalStep(alternate=True),
    "proximal": LocalStep(proximal=0.3),
    "damping": LocalStep(damping=0.5),
    "damping-proximal": LocalStep(damping=0.5, proximal=0.3),
    "tail": LocalStep(tail_penalty=0.05, kept=0.5),
}
OPTIMIZERS = {
    "sgd": OptimizerConfig(lr=0.3, lr_a=0.1),
    "momentum": OptimizerConfig(lr=0.3, momentum=0.9),
    "decay": OptimizerConfig(lr=0.3, weight_decay=0.2, momentum=0.5),
    "adamw": OptimizerConfig(name="adamw", lr=0.05),
    "adamw-decay": OptimizerConfig(name="adamw", lr=0.05, weight_decay=0.2),
}
TRAINED = [("s.A", "s.B", "head.weight"), ("s.B", "head.weight"), ("s.A",)]


def adapter(seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=draws) for name, size in SHAPES.items()}


def training(
    trained: tuple[str, ...], steps: int, local: LocalStep, optimizer: OptimizerConfig, **more: Any
) -> Training:
    rates = {name: (optimizer.lr_a or optimizer.lr) if name.endswith(".A") else optimizer.lr for name in trained}
    return Training(trained, TERMS, steps, optimizer, rates, local, **more)


def follow(work: Training, start: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the client's own optimiser and local step make of these noisy gradients."""
    optimizer, values = make_optimizer(work.optimizer, work.rates), dict(start)
    for step, gradient in enumerate(gradients):
        active = {name: _release(gradient[name]) for name in work.local.active(work.trained, step)}
        shaped = transform_gradients(active, values, start, work.corrections, work.local)
        for name, increment in optimizer.step(shaped, values).items():
            values[name] = values[name] + increment.tensor
    return {name: values[name] - start[name] for name in work.trained}


def noisy(
    names: list[str], generator: np.random.Generator, clipped: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A gradient of a Poisson batch in which every record's is clipped and points the same way, plus noise."""
    direction = clipped or {name: torch.from_numpy(generator.standard_normal(SHAPES[name])) for name in names}
    length = math.sqrt(sum(float(direction[name].square().sum()) for name in names))
    count = generator.binomial(RECORDS, TERMS.sampling_rate)
    return {
        name: (
            TERMS.clip_norm * count / TERMS.batch_size * direction[name] / length
            + TERMS.noise_std * torch.from_numpy(generator.standard_normal(SHAPES[name]))
        ).float()
        for name in names
    }


def check(work: Training, start: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> float:
    """Assert every bound; the largest share of one that was reached."""
    found, updates = update_bounds(work, RECORDS, start), follow(work, start, gradients)
    shares = [float(updates[name].norm()) / bound for name, bound in found.norms.items()]
    shares += [float((updates[name].abs() / bound).max()) for name, bound in found.coordinates.items()]
    shares.append(math.sqrt(sum(float(updates[n].norm() / work.rates[n]) ** 2 for n in found.norms)) / found.joint)
    assert max(shares) <= 1
    return max(shares)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("trained", TRAINED)
def test_no_simulated_client_breaks_a_bound(optimizer: str, local: str, trained: tuple[str, ...]) -> None:
    """Gradients that point one way in every record and step, with the noise of the mechanism."""
    for seed in range(5):
        generator = np.random.default_rng(seed)
        start = adapter(seed)
        corrections = {} if seed % 2 else {name: torch.full(SHAPES[name], 0.1) for name in trained}
        work = training(trained, 6, LOCAL[local], OPTIMIZERS[optimizer], corrections=corrections)
        direction = {name: torch.from_numpy(generator.standard_normal(SHAPES[name])) for name in trained}
        check(work, start, [noisy(list(trained), generator, direction) for _ in range(6)])


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_without_noise_the_bound_is_what_full_batches_reach(
    steps: int, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All records in every batch, all clipped, all one way: the bound but for its allowance for rounding."""
    monkeypatch.setitem(globals(), "TERMS", Terms(1.0, 8, 1.0, 1e-12))
    work = training(("s.B",), steps, LocalStep(), OPTIMIZERS[optimizer])
    start = {name: torch.zeros(size) for name, size in SHAPES.items()}
    gradient = torch.zeros(SHAPES["s.B"])
    gradient[0, 0] = RECORDS / 8
    assert check(work, start, [{"s.B": gradient}] * steps) == pytest.approx(1, rel=2e-3)


def test_the_clip_norm_is_shared_by_the_tensors_of_a_step() -> None:
    """Each tensor may have all of it, but not all at once: the joint bound is below that of the bounds together."""
    work = training(("s.A", "s.B", "head.weight"), 4, LocalStep(), OptimizerConfig(lr=0.3))
    found = update_bounds(work, RECORDS, adapter(0))
    assert found.joint * 0.3 < 0.8 * math.hypot(*found.norms.values())


def test_a_plain_reply_is_within_a_small_factor_of_its_bound() -> None:
    """Noise and clipped gradients as above, ten steps: scaled up by 3 the reply is over the bound."""
    generator, shares = np.random.default_rng(0), []
    for _ in range(10):
        direction = {name: torch.from_numpy(generator.standard_normal(SHAPES[name])) for name in SHAPES}
        work = training(tuple(SHAPES), 10, LocalStep(), OPTIMIZERS["sgd"])
        shares.append(check(work, adapter(0), [noisy(list(SHAPES), generator, direction) for _ in range(10)]))
    assert min(shares) > 1 / 3


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_adamws_bound_is_reached_by_growing_gradients(steps: int) -> None:
    """Equality in Cauchy and Schwarz: `g_i ∝ (β₁/β₂)^{t-i}` for the last step; earlier ones stay below theirs."""
    first, second = 0.9, 0.999
    start = {"s.B": torch.zeros(SHAPES["s.B"]), "s.A": torch.zeros(SHAPES["s.A"])}
    optimizer = OptimizerConfig(name="adamw", lr=0.01)
    gradients = [{"s.B": torch.full(SHAPES["s.B"], (first / second) ** (steps - 1 - i))} for i in range(steps)]
    work, shorter = (training(("s.B",), count, LocalStep(), optimizer) for count in (steps, steps - 1))
    reached = float(follow(work, start, gradients)["s.B"].abs().max())
    reached -= float(follow(shorter, start, gradients[:-1])["s.B"].abs().max()) if steps > 1 else 0.0
    allowed = float(update_bounds(work, RECORDS, start).coordinates["s.B"].max())
    if steps > 1:
        allowed -= float(update_bounds(shorter, RECORDS, start).coordinates["s.B"].max())
    assert reached == pytest.approx(allowed, rel=2e-3)


@pytest.mark.parametrize("probability", [0.05, 0.2])
def test_a_bound_fails_no_more_often_than_it_says(probability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large failure probability, over draws of the batch and of the noise; and it is no empty bound."""
    monkeypatch.setattr(bounds, "FAILURE", probability)
    generator = np.random.default_rng(0)
    for gains in ([1.0], [1.0, 1.0, 1.0], [0.3, 2.0, 1.0]):
        counts = generator.binomial(RECORDS, TERMS.sampling_rate, (4000, len(gains)))
        sums = counts @ np.array(gains) * TERMS.clip_norm / TERMS.batch_size
        bound = clipped_norm(TERMS, RECORDS, gains)
        assert np.mean(sums > bound) <= probability
        assert np.quantile(sums, 1 - probability) > 0.85 * bound
    parts = [(0.5, 4), (0.1, 30)]
    draws = np.hypot(*(np.linalg.norm(s * generator.standard_normal((4000, size)), axis=1) for s, size in parts))
    assert np.mean(draws > gaussian_norm(parts)) <= probability
    assert np.quantile(draws, 1 - probability) > 0.5 * gaussian_norm(parts)


def test_the_bound_of_one_gradient_is_that_of_a_step_of_rate_one() -> None:
    work = training(("s.B",), 1, LocalStep(), OptimizerConfig(lr=1.0))
    assert update_bounds(work, RECORDS, adapter(0)).norms["s.B"] == pytest.approx(gradient_bound(TERMS, RECORDS, 18))


def test_a_factor_that_rests_bounds_what_preconditioning_does() -> None:
    """`1/(λ_min(B Bᵀ) + δ)` where B is public and rests, `1/δ` where it moves."""
    start = adapter(0) | {"s.B": 3 * torch.eye(6, 3)}
    alone, plain = (
        update_bounds(training(("s.A",), 1, LocalStep(damping=damping), OptimizerConfig()), RECORDS, start).norms["s.A"]
        for damping in (0.5, None)
    )
    assert alone == pytest.approx(plain / 9.5)
    both = training(("s.A", "s.B"), 1, LocalStep(damping=0.5), OptimizerConfig())
    assert update_bounds(both, RECORDS, start).norms["s.A"] == pytest.approx(plain / 0.5)


def test_what_a_client_keeps_has_no_bound_where_its_start_is_unknown() -> None:
    work = training(("s.A", "s.B"), 2, LocalStep(), OPTIMIZERS["decay"], personal=("s.B",))
    found = update_bounds(work, RECORDS, adapter(0))
    assert math.isinf(found.norms["s.B"])
    assert math.isfinite(found.norms["s.A"])
    assert math.isfinite(found.joint)
