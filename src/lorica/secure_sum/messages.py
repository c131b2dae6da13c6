"""The messages of a summation, as bytes.

| message | content |
|---|---|
| keys | public key for encryption, public key for masks, 32 bytes each; with an identity key, 64 bytes of signature |
| share | sealed: share of the seed, share of the mask key, 33 bytes each |
| masked input | SHA-256 of its context, commitment to the seed, 32 bytes each; then the words, little-endian |
| reveal | for each client that shared, by id: one share of 33 bytes |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.identity import SIGNATURE_BYTES
from lorica.secure_sum.primitives import KEY_BYTES, NONCE_BYTES, TAG_BYTES, agree
from lorica.secure_sum.setup import SummationError
from lorica.secure_sum.shamir import SHARE_BYTES

SEALED_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES
DIGEST_BYTES = 32


def check_keys(agreement: Agreement, keys: Mapping[int, bytes]) -> None:
    """Check the public keys of all participants, but not their signatures.

    Raises:
        SummationError: a client that is not a member, a message of the wrong length, a repeated key, or fewer clients
            than the threshold.
    """
    seen: set[bytes] = set()
    for client, message in sorted(keys.items()):
        if client not in agreement.weights:
            raise SummationError("it sent keys but is not a member of the sum", client)
        if len(message) not in (2 * KEY_BYTES, 2 * KEY_BYTES + SIGNATURE_BYTES):
            expected = f"{2 * KEY_BYTES}, or {2 * KEY_BYTES + SIGNATURE_BYTES} with a signature"
            raise SummationError(f"its public keys have {len(message)} bytes, not {expected}", client)
        pair = {encryption_key(message), mask_key(message)}
        if len(pair) < 2 or pair & seen:
            raise SummationError("a public key appears twice", client)
        seen |= pair
    check_threshold(agreement, len(keys), "sent keys")


def check_threshold(agreement: Agreement, count: int, what: str) -> None:
    """Raise `SummationError` if `count` clients are fewer than the threshold."""
    threshold = agreement.setup.threshold
    if count < threshold:
        raise SummationError(f"only {count} clients {what}, but the threshold is {threshold}: nothing is revealed")


def encryption_key(message: bytes) -> bytes:
    return message[:KEY_BYTES]


def mask_key(message: bytes) -> bytes:
    return message[KEY_BYTES : 2 * KEY_BYTES]


def signature(message: bytes) -> bytes:
    """The signature of the two keys; empty if they are not signed."""
    return message[2 * KEY_BYTES :]


def to_sign(agreement: Agreement, client: int, message: bytes) -> bytes:
    """The bytes that a client signs with its identity key: its public keys, for this agreement."""
    return json.dumps(["lorica secure sum: keys", agreement.digest, client, message[: 2 * KEY_BYTES].hex()]).encode()


def pair_seed(agreement: Agreement, own: int, private: bytes, other: int, public: bytes) -> bytes:
    """The seed of the mask between two clients, the same from either side.

    Raises:
        SummationError: the other's public key allows no agreement.
    """
    try:
        return agree(private, public, "mask", agreement.digest, min(own, other), max(own, other))
    except ValueError:
        raise SummationError("its public key is not a usable X25519 key", other) from None


def commitment(agreement: Agreement, seed: bytes) -> bytes:
    """SHA-256 of a self-mask seed, with which the server checks that it reconstructed the right one.

    The seed has 256 random bits, so its hash does not reveal it.
    """
    return hashlib.sha256(json.dumps(["seed", agreement.digest]).encode() + seed).digest()


def context(agreement: Agreement, keys: Mapping[int, bytes]) -> bytes:
    """SHA-256 of everything that masked inputs must agree on to be summed.

    Args:
        keys: client -> public keys, of the clients that shared.
    """
    content = {
        "agreement": agreement.digest,
        "keys": [[client, message.hex()] for client, message in sorted(keys.items())],
    }
    return hashlib.sha256(json.dumps(content).encode()).digest()
