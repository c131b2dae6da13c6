"""Learning rates over the rounds, and what the server makes of them."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from lorica.config import OptimizerConfig
from lorica.local.optimizers import schedule_factor
from lorica.methods.exchange import Replies
from lorica.methods.server import Server
from lorica.testing.federation import run_rounds, tiny_federation


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_schedules_start_at_the_full_rate_fall_and_stay_positive(rounds: int) -> None:
    for name in ("linear", "cosine"):
        factors = [schedule_factor(name, number, rounds) for number in range(1, rounds + 1)]
        assert factors[0] == 1.0
        assert all(later < earlier for earlier, later in pairwise(factors))
        assert factors[-1] > 0
    assert [schedule_factor("constant", number, rounds) for number in range(1, rounds + 1)] == [1.0] * rounds
    assert schedule_factor("cosine", 2, 2) == pytest.approx(0.5)
    assert schedule_factor("cosine", 2, 4) == pytest.approx((1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("method", ["ro-lora", "as-lora"])
def test_the_clients_of_a_round_step_at_its_rate(method: str, tmp_path: Path) -> None:
    """Requests carry it, and replies are that rate times the gradients: noise only, so their size shows the rate."""
    optimizer = OptimizerConfig(lr=0.5, schedule="linear")
    some = run_rounds(tiny_federation(method, tmp_path, optimizer=optimizer, rounds=4))
    for number, requests in enumerate(some.engine.requests, start=1):
        expected = 0.5 * (1 - (number - 1) / 4)
        assert set(requests[0].work.rates.values()) == {expected}
    plain = run_rounds(tiny_federation(method, tmp_path / "plain", optimizer=OptimizerConfig(lr=0.5), rounds=4))
    last, before = some.engine.replies[-1][0], plain.engine.replies[-1][0]
    assert all(float(last[name].norm()) < 0.5 * float(before[name].norm()) for name in last.keys() & before.keys())


def test_the_noise_variance_of_a_mean_update_follows_the_rate(tmp_path: Path) -> None:
    some = tiny_federation("fed-avg", tmp_path, optimizer=OptimizerConfig(lr=0.5, schedule="linear"), rounds=4)
    server: Server = some.server
    name = next(iter(server.full_rates))
    variances = []
    for number in (1, 3):
        server.round = number
        weights = dict.fromkeys(server.terms, 1 / 3)
        variances.append(server._noise([name], Replies({}, weights))[name])
    assert variances[1] / variances[0] == pytest.approx(0.25)
