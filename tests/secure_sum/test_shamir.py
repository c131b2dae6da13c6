"""Any t shares give the secret back; t - 1 are consistent with every secret."""

from __future__ import annotations

import itertools
import secrets

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from lorica.secure_sum.shamir import P, combine, split, valid

BYTES = st.binary(min_size=32, max_size=32)


def solved_at_zero(points: list[tuple[int, int]], prime: int) -> int:
    """The constant term of the polynomial through these points: Vandermonde's system by Gaussian elimination mod p."""
    rows = [[pow(x, power, prime) for power in range(len(points))] + [y] for x, y in points]
    for column in range(len(rows)):
        pivot = next(row for row in range(column, len(rows)) if rows[row][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        inverse = pow(rows[column][column], -1, prime)
        rows[column] = [value * inverse % prime for value in rows[column]]
        for row in range(len(rows)):
            if row != column:
                factor = rows[row][column]
                rows[row] = [(a - factor * b) % prime for a, b in zip(rows[row], rows[column], strict=True)]
    return rows[0][-1]


def points(shares: dict[int, bytes]) -> list[tuple[int, int]]:
    return [(client + 1, int.from_bytes(share, "big")) for client, share in shares.items()]


def test_the_field_is_the_smallest_that_holds_every_secret() -> None:
    assert sympy.nextprime(2**256) == P


@given(
    secret=BYTES | st.sampled_from([bytes(32), b"\xff" * 32]),
    clients=st.sets(st.integers(0, 2**63 - 1), min_size=2, max_size=7),
    data=st.data(),
)
def test_any_t_shares_give_the_secret_back(secret: bytes, clients: set[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(clients)))
    shares = split(secret, threshold, clients)
    assert all(valid(share) for share in shares.values())
    for some in itertools.combinations(shares.items(), threshold):
        assert combine(dict(some)) == secret
        assert solved_at_zero(points(dict(some)), P).to_bytes(32, "big") == secret


@given(secret=BYTES, other=BYTES, threshold=st.integers(2, 6))
def test_fewer_shares_are_consistent_with_every_secret(secret: bytes, other: bytes, threshold: int) -> None:
    """For any other secret there is a last share that makes the first t - 1 its shares."""
    few = dict(list(split(secret, threshold, range(threshold)).items())[:-1])
    as_if = [(0, int.from_bytes(other, "big")), *points(few)]
    # The value at t of the polynomial through (0, other) and the shares: shift x so that t becomes 0.
    last = solved_at_zero([((x - threshold) % P, y) for x, y in as_if], P)
    assert combine(few | {threshold - 1: last.to_bytes(33, "big")}) == other


def test_shares_below_the_threshold_are_fresh_in_each_split() -> None:
    secret = secrets.token_bytes(32)
    seen = {share for _ in range(50) for share in split(secret, 3, range(5)).values()}
    assert len(seen) == 250


def test_shares_of_no_secret_are_told() -> None:
    assert combine({0: (P - 1).to_bytes(33, "big")}) is None


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), P.to_bytes(33, "big"), b"\xff" * 33])
def test_bytes_outside_the_field_are_told(share: bytes) -> None:
    assert not valid(share)
    assert valid((P - 1).to_bytes(33, "big"))
