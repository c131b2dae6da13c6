"""Secret draws are ChaCha20's under the owner's seed, and each purpose has a stream of its own."""

from __future__ import annotations

import hashlib
import hmac
import struct

import pytest
import torch

from lorica.privacy import randomness as source
from lorica.privacy.randomness import SecureRandomness

SEED = bytes(range(32))


def rotated(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (32 - bits))) & 0xFFFFFFFF


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """RFC 8439, section 2.3."""
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter]
    start += struct.unpack("<3I", nonce)
    state = list(start)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = (state[x] + state[y]) & 0xFFFFFFFF
            state[z] = rotated(state[z] ^ state[x], bits)

    for _ in range(10):
        for column in range(4):
            quarter(column, column + 4, column + 8, column + 12)
        for diagonal in range(4):
            quarter(diagonal, (diagonal + 1) % 4 + 4, (diagonal + 2) % 4 + 8, (diagonal + 3) % 4 + 12)
    return struct.pack("<16I", *((x + y) & 0xFFFFFFFF for x, y in zip(state, start, strict=True)))


def test_the_reference_is_that_of_the_rfc() -> None:
    block = chacha20_block(bytes(range(32)), 1, bytes.fromhex("000000090000004a00000000"))
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")


def uniforms(purpose: str, call: int, count: int) -> list[float]:
    key = hmac.new(SEED, purpose.encode(), hashlib.sha256).digest()
    nonce = call.to_bytes(12, "little")
    stream = b"".join(chacha20_block(key, block, nonce) for block in range(count // 8 + 1))
    words = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]
    return [((word >> 11) + 0.5) / 2**53 for word in words]


def test_draws_are_the_keystream_of_their_purpose() -> None:
    randomness = SecureRandomness(SEED)
    for call in range(3):
        assert randomness.uniform(20).tolist() == uniforms("batches", call, 20)
    radius = torch.tensor(uniforms("noise", 0, 10), dtype=torch.float64).log().mul(-2).sqrt()
    angle = 2 * torch.pi * torch.tensor(uniforms("noise", 1, 10), dtype=torch.float64)
    torch.testing.assert_close(
        torch.cat(randomness.normal([13, 0, 7])), torch.cat([radius * angle.cos(), radius * angle.sin()])
    )
    key = hmac.new(SEED, b"dropout", hashlib.sha256).digest()
    assert randomness.dropout_seed() == int.from_bytes(chacha20_block(key, 0, bytes(12))[:7])


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    first, again, other = SecureRandomness(SEED), SecureRandomness(SEED), SecureRandomness()
    # How many noise values are drawn does not move the batches.
    first.normal([60, 40])
    assert torch.equal(first.uniform(50), again.uniform(50))
    assert not torch.equal(other.uniform(50), SecureRandomness().uniform(50))
    with pytest.raises(ValueError, match="32 bytes"):
        SecureRandomness(b"short")


def test_many_draws_are_made_tensor_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by the largest tensor, and no two tensors share draws."""
    monkeypatch.setattr(source, "MOST_AT_ONCE", 16)
    first, second = SecureRandomness(SEED).normal([12, 12])
    (alone,) = SecureRandomness(SEED).normal([12])
    assert torch.equal(first, alone)
    assert not torch.equal(first, second)
