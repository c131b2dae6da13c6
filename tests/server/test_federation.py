"""Who takes part, with what weight, and what is counted."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.config import PrivacyConfig, load
from lorica.engines.local import prepare_local
from lorica.errors import UserError
from lorica.privacy.plan import plan_client
from lorica.schedule import participation_schedule
from lorica.server.federation import client_weights


@given(
    clients=st.integers(1, 12),
    rounds=st.integers(1, 40),
    participants=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_rotation_is_balanced_at_every_moment(clients: int, rounds: int, participants: int, seed: int) -> None:
    participants = min(participants, clients)
    schedule = participation_schedule(clients, rounds, participants, seed)
    counts: Counter[int] = Counter()
    for chosen in schedule:
        assert chosen == sorted(set(chosen))
        assert len(chosen) == participants
        counts.update(chosen)
        assert max(counts.values()) - min(counts[client] for client in range(clients)) <= 1
    assert schedule == participation_schedule(clients, rounds, participants, seed)


def test_everyone_takes_part_at_full_participation() -> None:
    assert participation_schedule(3, 4, 3, 0) == [[0, 1, 2]] * 4


def test_different_seeds_draw_different_clients() -> None:
    assert participation_schedule(10, 5, 3, 0) != participation_schedule(10, 5, 3, 1)


def test_weights_follow_their_formula() -> None:
    clients = [(100, 1.1), (300, 0.7), (50, 1.9)]
    plans = [
        plan_client(number, records, 20, 10, PrivacyConfig(epsilon=None, noise_multiplier=sigma))
        for number, (records, sigma) in enumerate(clients)
    ]
    assert client_weights("uniform", plans) == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert client_weights("records", plans) == pytest.approx({0: 100 / 450, 1: 300 / 450, 2: 50 / 450})
    inverse = np.array([1 / sigma**2 for _, sigma in clients])
    assert list(client_weights("noise", plans).values()) == pytest.approx(list(inverse / inverse.sum()))
    bare = [plan_client(number, n, 20, 10, PrivacyConfig(noise="none")) for number, (n, _) in enumerate(clients)]
    assert client_weights("noise", bare) == client_weights("records", bare)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["federation.min_clients=7"], r"federation\.min_clients = 7: only 6 clients"),
        (["federation.min_clients=3", "federation.participation=0.3"], "only 2 clients take part in a round"),
        (["federation.min_clients=0"], r"federation\.min_clients = 0"),
        (["method.name=ro-lora", "server.aggregate=krum", "federation.min_clients=4"], r"server\.byzantine = 1"),
        (["optimizer.name=adamw", "federation.min_clients=1"], r"optimizer\.name = 'adamw'"),
    ],
)
def test_what_a_round_needs_is_checked_for_the_fewest_replies_that_it_may_have(
    overrides: list[str], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        prepare_local(load(None, overrides))
