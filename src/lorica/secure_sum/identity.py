"""Identity keys (Ed25519, RFC 8032), with which clients sign the public keys that they use in a summation.

An owner creates its key once. The other owners copy the public key into their policies, as a line `ed25519:HEX NAME`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

SIGNATURE_BYTES = 64
LINE = re.compile(r"ed25519:(?P<key>[0-9a-f]{64})(?: (?P<name>[A-Za-z0-9_.@-]{1,100}))?")


@dataclass(frozen=True)
class Member:
    """A client and its public identity key.

    Attributes:
        key: 32 bytes.
        name: name for the log; may be empty.
    """

    key: bytes
    name: str = ""

    @classmethod
    def of(cls, line: str) -> Member:
        """The inverse of `str`.

        Raises:
            ValueError: not such a line.
        """
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError("not a public key as `lorica flower keys` prints it, ed25519:… NAME")
        return cls(bytes.fromhex(found["key"]), found["name"] or "")

    def __str__(self) -> str:
        return f"ed25519:{self.key.hex()} {self.name}".strip()

    def signed(self, content: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's signature of `content`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.key).verify(signature, content)
        except (InvalidSignature, ValueError):
            return False
        return True


class Identity:
    """A private identity key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def new(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, content: bytes) -> Identity:
        """The inverse of `to_pem`.

        Raises:
            ValueError: not an Ed25519 private key without a passphrase.
        """
        try:
            key = load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("not an Ed25519 private key (PEM, without a passphrase)")
        return cls(key)

    def to_pem(self) -> bytes:
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def public(self, name: str = "") -> Member:
        """The public key; its `str` is the line for policies."""
        return Member(self._key.public_key().public_bytes_raw(), name)

    def sign(self, content: bytes) -> bytes:
        """The signature of `content`, `SIGNATURE_BYTES` bytes."""
        return self._key.sign(content)
