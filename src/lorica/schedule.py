"""Who takes part in each round, and at which rank: public, from the seed, the same on every machine."""

from __future__ import annotations

from lorica.streams import numpy_stream


def participation_schedule(clients: int, rounds: int, participants: int, seed: int) -> list[list[int]]:
    """Participants of each round, sorted.

    Balanced rotation: a public permutation is used up before the next one is drawn, so that after any number of rounds
    two clients' participations differ by at most one. The schedule is known before the run, so each client's budget is
    computed for exactly the steps that it will run.
    """
    draws = numpy_stream(seed, "participation")
    queue: list[int] = []
    schedule = []
    for _ in range(rounds):
        chosen: list[int] = queue[:participants]
        queue = queue[participants:]
        if len(chosen) < participants:
            # Those who sit out the end of one permutation come first in the next one, and nobody is drawn twice.
            taken = set(chosen)
            fresh = [client for client in draws.permutation(clients).tolist() if client not in taken]
            needed = participants - len(chosen)
            queue = fresh[needed:] + chosen
            chosen = chosen + fresh[:needed]
        schedule.append(sorted(chosen))
    return schedule


def client_ranks(rule: list[int] | str | None, clients: int, rank: int, seed: int) -> dict[int, int]:
    """Client -> rank of its factors; empty where all have the whole one.

    `halving`: `r, r/2, r/4, …, 1` and from the start again. `random`: uniform on `1…r` from the public seed.
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
