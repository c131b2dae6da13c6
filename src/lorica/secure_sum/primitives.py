"""The cryptographic primitives of the protocol: key agreement, authenticated encryption, mask generation."""

from __future__ import annotations

import json
import secrets

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16


def private_key() -> bytes:
    """A fresh X25519 private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """The public key of an X25519 private key (RFC 7748)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, *purpose: object) -> bytes:
    """Derive 32 bytes that both key holders can compute: HKDF-SHA256 (RFC 5869) of the X25519 shared secret.

    Args:
        purpose: the use of the result; different purposes give independent bytes.

    Raises:
        ValueError: a public key of small order, for which the shared secret is zero.
    """
    secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=json.dumps(purpose).encode()).derive(secret)


def seal(key: bytes, content: bytes, *context: object) -> bytes:
    """`nonce | ciphertext | tag` of ChaCha20-Poly1305 (RFC 8439), with the context as associated data."""
    # Random, not a counter: both clients of a pair use the same key, and a client may encrypt again after a crash.
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, json.dumps(context).encode())


def open_sealed(key: bytes, sealed: bytes, *context: object) -> bytes | None:
    """Decrypt the output of `seal`; None if it was not sealed with this key in this context."""
    nonce, ciphertext = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, json.dumps(context).encode())
    except (InvalidTag, ValueError):
        return None


def keystream(seed: bytes, count: int, word: np.dtype[np.unsignedinteger]) -> np.ndarray:
    """The first `count` words of the ChaCha20 keystream (RFC 8439) under key `seed`, nonce 0, block counter from 0.

    Each seed is used for one stream only, so the nonce may be constant.
    """
    # The library's nonce is the 32-bit block counter followed by the RFC's nonce.
    encryptor = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(count * word.itemsize)), dtype=word)
