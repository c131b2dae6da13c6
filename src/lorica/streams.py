"""Public random streams: a function of (seed, purpose, numbers), so that engines, order and resumption agree."""

import hashlib

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed from SHA-256 of its arguments; different purposes or numbers give unrelated streams."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_stream(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator for `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *numbers))


def numpy_stream(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A PCG64 generator for `stream_seed`."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, *numbers)))
