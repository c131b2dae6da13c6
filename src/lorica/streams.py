"""Public random streams, each a function of (seed, purpose, numbers).

Results therefore depend neither on the engine nor on the order of clients, and a resumed run draws the same numbers.
"""

import hashlib

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed: SHA-256 of the arguments. Different purposes or numbers give independent streams."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_stream(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded with `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *numbers))


def numpy_stream(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A PCG64 generator seeded with `stream_seed`."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, purpose, *numbers)))
