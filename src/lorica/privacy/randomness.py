"""Sources of randomness for a mechanism: a secret seed from the operating system, or a public seed for research."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

from lorica.streams import stream_seed, torch_stream


class Randomness(Protocol):
    """Independent draws, float64 on the CPU."""

    def uniform(self, count: int) -> Tensor:
        """`count` draws from U(0, 1)."""

    def normal(self, counts: Sequence[int]) -> list[Tensor]:
        """So many draws from N(0, 1) for each of several tensors."""

    def dropout_seed(self) -> int:
        """Seed of the generator of dropout masks.

        As secret as the noise: the mask of an example depends on its place in the batch. If the server could compute
        the masks, one record would change the gradients of others in a known way.
        """


SEED_BYTES = 32
# Number of normal draws at once, 8 MiB and some copies. Starting a keystream costs as much as some thousand draws.
MOST_AT_ONCE = 2**20


def secret_seed() -> bytes:
    """32 bytes of the operating system's entropy."""
    return os.urandom(SEED_BYTES)


class SecureRandomness:
    """Draws of ChaCha20 (RFC 8439) under a secret seed that comes from the operating system's entropy.

    With the seed, the owner and nobody else can repeat a release. The ledger stores the seed from the charge until the
    reply is stored, and then erases it. An attempt that crashed is repeated with the same batches and noise, so it
    remains one release, charged once. With new random numbers, each attempt would be another release of the same
    records, and a server that makes attempts fail could get any number of them.

    Batches, noise and dropout masks have separate streams, with keys `HMAC-SHA256(seed, purpose)`. Without the seed,
    ChaCha20's output is indistinguishable from uniform bits; the operating system's generator relies on the same
    assumption (Linux's `getrandom` uses ChaCha20).

    Args:
        seed: 32 bytes; a new secret seed by default.

    Raises:
        ValueError: the seed does not have 32 bytes.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        seed = secret_seed() if seed is None else seed
        if len(seed) != SEED_BYTES:
            raise ValueError(f"the seed must have {SEED_BYTES} bytes, not {len(seed)}")
        self._batches, self._noise, self._dropout = (_Stream(seed, name) for name in ("batches", "noise", "dropout"))

    def uniform(self, count: int) -> Tensor:
        """`(k + ½) 2⁻⁵³` for a uniform 53-bit integer `k`: in the open interval (0, 1)."""
        return _open_unit(self._batches, count)

    def normal(self, counts: Sequence[int]) -> list[Tensor]:
        """The Box-Muller transform of pairs of uniform draws: for all tensors at once, if they are small."""
        count = sum(counts)
        if count > MOST_AT_ONCE and len(counts) > 1:
            return [draws for each in counts for draws in self.normal([each])]
        half = (count + 1) // 2
        radius = torch.sqrt(-2.0 * torch.log(_open_unit(self._noise, half)))
        angle = 2.0 * torch.pi * _open_unit(self._noise, half)
        draws = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]
        return list(torch.split(draws, list(counts)))

    def dropout_seed(self) -> int:
        """56 bits for the generator of dropout masks."""
        return int.from_bytes(self._dropout.take(7))


class _Stream:
    """Keystream for one purpose. Each call has its own nonce, so the block counter cannot overflow."""

    def __init__(self, seed: bytes, purpose: str) -> None:
        self._key = hmac.digest(seed, purpose.encode(), "sha256")
        self._calls = 0

    def take(self, count: int) -> bytes:
        # 32 bits of block counter, then 96 bits of nonce.
        nonce = bytes(4) + self._calls.to_bytes(12, "little")
        self._calls += 1
        return Cipher(ChaCha20(self._key, nonce), mode=None).encryptor().update(bytes(count))


def _open_unit(stream: _Stream, count: int) -> Tensor:
    bits = np.frombuffer(stream.take(8 * count), dtype="<u8") >> np.uint64(11)
    return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-53)


class ReproducibleRandomness:
    """Draws that are a function of public numbers, for comparisons and tests. Provides no privacy."""

    def __init__(self, seed: int, round_number: int, exchange: int, client: int) -> None:
        self._generator = torch_stream(seed, "mechanism", round_number, exchange, client)
        self._dropout_seed = stream_seed(seed, "dropout", round_number, exchange, client)

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator, dtype=torch.float64)

    def normal(self, counts: Sequence[int]) -> list[Tensor]:
        return [torch.randn(count, generator=self._generator, dtype=torch.float64) for count in counts]

    def dropout_seed(self) -> int:
        return self._dropout_seed
