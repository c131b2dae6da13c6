"""The bytes that travel in a summation, as both sides read them.

| message | content |
|---|---|
| keys | public key for encryption, public key for masks, 32 bytes each |
| share | sealed: share of the seed, share of the mask key, 33 bytes each |
| masked input | SHA-256 of what it belongs to, commitment to the seed, 32 bytes each; then the words, little-endian |
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
        SummationError: an id out of range, a message of the wrong length, a key that another client has too, more
            clients than agreed, or fewer than the threshold.
    """
    seen: set[bytes] = set()
    for client, message in sorted(keys.items()):
        if not 0 <= client <= LARGEST_ID:
            raise SummationError("the id is not in 0 .. 2^63 - 1", client)
        if len(message) != 2 * KEY_BYTES:
            raise SummationError(f"{len(message)} bytes of public keys, expected {2 * KEY_BYTES}", client)
        pair = {encryption_key(message), mask_key(message)}
        if len(pair) < 2 or pair & seen:
            raise SummationError("a public key appears twice", client)
        seen |= pair
    if len(keys) > setup.clients:
        raise SummationError(f"{len(keys)} clients, agreed were at most {setup.clients}")
    check_threshold(setup, len(keys), "sent keys")


def check_threshold(setup: Setup, count: int, what: str) -> None:
    """Raise `SummationError` if `count` clients are fewer than the threshold."""
    if count < setup.threshold:
        raise SummationError(f"{count} clients {what}, the threshold is {setup.threshold}: nothing is revealed")


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
    """SHA-256 of a self-mask seed, by which the server knows whether it reconstructed the right one.

    The seed has 256 random bits, so this does not help to find it.
    """
    return hashlib.sha256(json.dumps(["seed", setup.summation]).encode() + seed).digest()


def context(setup: Setup, keys: Mapping[int, bytes], shapes: Shapes) -> bytes:
    """SHA-256 of what two masked inputs must have in common to be summed.

    Args:
        keys: of the clients that shared: those that masks were made with.
    """
    content = {
        "setup": [setup.summation, setup.clients, setup.threshold, setup.bits, float(setup.bound)],
        "keys": [[client, message.hex()] for client, message in sorted(keys.items())],
        "shapes": [[name, list(shape)] for name, shape in sorted(shapes.items())],
    }
    return hashlib.sha256(json.dumps(content).encode()).digest()
