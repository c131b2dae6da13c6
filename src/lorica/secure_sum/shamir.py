"""Shamir's secret sharing: any `t` shares reconstruct the secret; fewer shares reveal nothing.

Shamir, How to share a secret, CACM 1979. The secret is the constant term of a random polynomial of degree `t - 1` over
the integers modulo the prime `P`; client `u` gets the value at `u + 1`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

# The smallest prime above 2^256: every secret of 32 bytes is an element of the field.
P = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, clients: Iterable[int]) -> dict[int, bytes]:
    """One share for each client: `f(u + 1) mod P`, `f(x) = secret + Σ_i a_i x^i`, `a_i` uniform, `1 <= i < threshold`.

    Args:
        secret: `SECRET_BYTES` bytes.
        clients: ids, distinct and not negative.
    """
    coefficients = [secrets.randbelow(P) for _ in range(threshold - 1)] + [int.from_bytes(secret, "big")]
    shares = {}
    for client in clients:
        value = 0
        for coefficient in coefficients:
            value = (value * (client + 1) + coefficient) % P
        shares[client] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret from `threshold` shares, by Lagrange's formula at 0: `Σ_u f(x_u) Π_{v≠u} x_v / (x_v - x_u) mod P`.

    Returns:
        `SECRET_BYTES` bytes, or None if the shares do not belong to such a secret. Wrong shares usually give a wrong
        secret rather than None, so check the result against a commitment.
    """
    total = 0
    for client, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != client:
                numerator = numerator * (other + 1) % P
                denominator = denominator * (other - client) % P
        total += int.from_bytes(share, "big") * numerator * pow(denominator, -1, P)
    value = total % P
    return value.to_bytes(SECRET_BYTES, "big") if value < 2 ** (8 * SECRET_BYTES) else None


def valid(share: bytes) -> bool:
    """Whether these bytes are an element of the field."""
    return len(share) == SHARE_BYTES and int.from_bytes(share, "big") < P
