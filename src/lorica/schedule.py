"""Which clients take part in each round, and with which rank: public, computed from the seed on every machine."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lorica.streams import numpy_stream


def participation_schedule(clients: int, rounds: int, participants: int, seed: int) -> list[list[int]]:
    """Participants of each round, sorted.

    Balanced rotation: every client of a public permutation takes part before the next permutation is drawn, so after
    any number of rounds the participation counts of two clients differ by at most one. The schedule is known before
    the run, so each client's budget is computed for exactly the steps that it will run.

    >>> participation_schedule(clients=5, rounds=4, participants=2, seed=0)
    [[1, 3], [2, 4], [0, 1], [3, 4]]
    """
    draws = numpy_stream(seed, "participation")
    queue: list[int] = []
    schedule = []
    for _ in range(rounds):
        chosen: list[int] = queue[:participants]
        queue = queue[participants:]
        if len(chosen) < participants:
            # Those already chosen go to the end of the new permutation, so that nobody is drawn twice in a round.
            taken = set(chosen)
            fresh = [client for client in draws.permutation(clients).tolist() if client not in taken]
            needed = participants - len(chosen)
            queue = fresh[needed:] + chosen
            chosen = chosen + fresh[:needed]
        schedule.append(sorted(chosen))
    return schedule


@lru_cache(maxsize=8)
def participation_counts(clients: int, rounds: int, participants: int, seed: int) -> tuple[int, ...]:
    """Number of rounds in which each client takes part, by the same schedule.

    >>> participation_counts(clients=5, rounds=4, participants=2, seed=0)
    (1, 2, 1, 2, 2)
    """
    schedule = participation_schedule(clients, rounds, participants, seed)
    return tuple(np.bincount(np.concatenate(schedule), minlength=clients).tolist())


def client_ranks(rule: list[int] | str | None, clients: int, rank: int, seed: int) -> dict[int, int]:
    """Client -> rank of its factors; empty if all clients use the full rank.

    `halving`: `r, r/2, r/4, …, 1`, repeated. `random`: uniform on `1…r`, drawn from the public seed.

    >>> client_ranks("halving", clients=5, rank=8, seed=0)
    {0: 8, 1: 4, 2: 2, 3: 1, 4: 8}
    """
    if rule is None:
        return {}
    if rule == "halving":
        levels = rank.bit_length()
        return {client: rank >> (client % levels) for client in range(clients)}
    if rule == "random":
        draws = numpy_stream(seed, "ranks")
        return {client: int(draws.integers(1, rank + 1)) for client in range(clients)}
    return dict(enumerate(int(own) for own in rule))
