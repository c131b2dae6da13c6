"""Convert tensors to integers modulo 2^k and back.

A coordinate `x` becomes `round(clip(x, ±bound) / step)`, in two's complement. The step is chosen so that the sum over
all clients never overflows. The dequantised sum of `n` clients differs from the sum of the clipped values by at most
`n · step / 2` per coordinate (rounding to nearest, ties to even), plus the rounding to fp32.

Values beyond the bound are clipped. Clipping is post-processing of a release, so it costs no privacy, but it biases the
sum: choose a bound, from public numbers, that values rarely exceed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lorica.secure_sum.setup import Setup, SummationError

Shapes = Mapping[str, Sequence[int]]


def coordinates(shapes: Shapes) -> int:
    """Total number of coordinates of tensors with these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def quantise(setup: Setup, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """All coordinates as words, `(coordinates,)`, with the tensors in the order of their names.

    Raises:
        SummationError: NaN or inf in a tensor.
    """
    parts = [np.empty(0)]
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().double().reshape(-1).numpy()
        if not np.isfinite(values).all():
            raise SummationError(f"tensor {name} is not finite")
        parts.append(np.clip(values, -setup.bound, setup.bound))
    integers = np.rint(np.concatenate(parts) / setup.step).astype(np.int64)
    return integers.astype(setup.word)


def dequantise(setup: Setup, words: np.ndarray, shapes: Shapes) -> dict[str, Tensor]:
    """The inverse of `quantise`, for the words `(coordinates,)` of a sum: name -> fp32 tensor, computed in float64."""
    values = words.view(f"<i{setup.bits // 8}").astype(np.float64) * setup.step
    tensors, start = {}, 0
    for name, shape in sorted(shapes.items()):
        count = math.prod(shape)
        tensors[name] = torch.from_numpy(values[start : start + count].reshape(tuple(shape))).float()
        start += count
    return tensors
