"""The messages of a summation, as bytes.

| message | content |
|---|---|
| keys | public key for encryption, public key for masks, 32 bytes each |
| share | sealed: share of the seed, share of the mask key, 33 bytes each |
| masked input | SHA-256 of its context, commitment to the seed, 32 bytes each; then the words, little-endian |
| reveal | for each client that shared, by id: one share of 33 bytes |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from lorica.secure_sum.primitives import KEY_BYTES, NONCE_BYTES, TAG_BYTES, agree
from lorica.secure_sum.quantisation import Shapes
from lorica.secure_sum.setup import LARGEST_ID, Setup, SummationError
from lorica.secure_sum.shamir import SHARE_BYTES

SEALED_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES
DIGEST_BYTES = 32


def check_keys(setup: Setup, keys: Mapping[int, bytes]) -> None:
    """Check the public keys of all participants.

    Raises:
        SummationError: an id out of range, a message of the wrong length, a repeated key, more clients than agreed, or
            fewer than the threshold.
    """
    seen: set[bytes] = set()
    for client, message in sorted(keys.items()):
        if not 0 <= client <= LARGEST_ID:
            raise SummationError("the id is not between 0 and 2^63 - 1", client)
        if len(message) != 2 * KEY_BYTES:
            raise SummationError(f"its public keys have {len(message)} bytes, not {2 * KEY_BYTES}", client)
        pair = {encryption_key(message), mask_key(message)}
        if len(pair) < 2 or pair & seen:
            raise SummationError("a public key appears twice", client)
        seen |= pair
    if len(keys) > setup.clients:
        raise SummationError(f"{len(keys)} clients sent keys, but at most {setup.clients} were agreed")
    check_threshold(setup, len(keys), "sent keys")


def check_threshold(setup: Setup, count: int, what: str) -> None:
    """Raise `SummationError` if `count` clients are fewer than the threshold."""
    if count < setup.threshold:
        raise SummationError(
            f"only {count} clients {what}, but the threshold is {setup.threshold}: nothing is revealed"
        )


def encryption_key(message: bytes) -> bytes:
    return message[:KEY_BYTES]


def mask_key(message: bytes) -> bytes:
    return message[KEY_BYTES:]


def pair_seed(setup: Setup, own: int, private: bytes, other: int, public: bytes) -> bytes:
    """The seed of the mask between two clients, the same from either side.

    Raises:
        SummationError: the other's public key allows no agreement.
    """
    try:
        return agree(private, public, "mask", setup.summation, min(own, other), max(own, other))
    except ValueError:
        raise SummationError("its public key is not a usable X25519 key", other) from None


def commitment(setup: Setup, seed: bytes) -> bytes:
    """SHA-256 of a self-mask seed, with which the server checks that it reconstructed the right one.

    The seed has 256 random bits, so its hash does not reveal it.
    """
    return hashlib.sha256(json.dumps(["seed", setup.summation]).encode() + seed).digest()


def context(setup: Setup, keys: Mapping[int, bytes], shapes: Shapes) -> bytes:
    """SHA-256 of everything that masked inputs must agree on to be summed.

    Args:
        keys: client -> public keys, of the clients that shared.
    """
    content = {
        "setup": [setup.summation, setup.clients, setup.threshold, setup.bits, float(setup.bound)],
        "keys": [[client, message.hex()] for client, message in sorted(keys.items())],
        "shapes": [[name, list(shape)] for name, shape in sorted(shapes.items())],
    }
    return hashlib.sha256(json.dumps(content).encode()).digest()
