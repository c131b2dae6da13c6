"""Tensors as bytes in the safetensors format, with a strict reader for untrusted bytes.

The format: eight bytes with the header's length, the header (JSON: name -> type, shape, byte range), then the values.
The reader checks sizes before it parses anything, and allocates no more memory than the values in the bytes need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

TYPES: dict[torch.dtype, tuple[str, np.dtype[Any]]] = {
    torch.float32: ("F32", np.dtype("<f4")),
    torch.int64: ("I64", np.dtype("<i8")),
}
"""The types that Lorica writes: fp32 for tensors of a model, and int64 for counts."""
LARGEST_HEADER = 2**22
"""Maximum number of bytes in a header, including the JSON of a request."""
LONGEST_NAME = 1000
_METADATA = "__metadata__"
# Maximum size of an entry in the header, without the name: type, shape and byte range.
_LINE = 200
_NUMPY: dict[str, np.dtype[Any]] = dict(TYPES.values())


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as safetensors bytes.

    Raises:
        TypeError: a tensor that is neither fp32 nor int64.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES:
            raise TypeError(f"{name} is {tensor.dtype}; only {', '.join(map(str, TYPES))} are supported")
    content: bytes = safetensors.torch.save(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        metadata=None if metadata is None else dict(metadata),
    )
    return content


def decode(content: object, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """The inverse of `encode`, without the metadata.

    Args:
        shapes: name -> shape of the requested fp32 tensors, if known; longer contents are rejected.

    Raises:
        ValueError: not bytes in this format, or more bytes than requested.
    """
    return decode_with_metadata(content, shapes)[0]


def decode_with_metadata(
    content: object, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `decode`, with the metadata."""
    header, values = _split(content, shapes)
    metadata = header.pop(_METADATA, {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its metadata is not a mapping of names to texts")
    ranges = {name: _range(name, entry) for name, entry in header.items()}
    end = 0
    for _, _, first, last in sorted(ranges.values(), key=lambda found: found[2:]):
        if first != end:
            raise ValueError("its tensors overlap or have gaps between them")
        end = last
    if end != len(values):
        raise ValueError(f"its tensors cover {end} of {len(values)} bytes")
    return {name: _tensor(values, *found) for name, found in ranges.items()}, metadata


def _split(content: object, shapes: Mapping[str, tuple[int, ...]] | None) -> tuple[dict[str, Any], memoryview]:
    """The header, parsed, and the values."""
    if not isinstance(content, bytes):
        raise ValueError(f"it is of type {type(content).__name__}, not bytes")
    largest = LARGEST_HEADER
    if shapes is not None:
        largest = min(largest, sum(len(json.dumps(name)) + _LINE for name in shapes) + _LINE)
        asked = 8 + largest + 4 * sum(map(math.prod, shapes.values()))
        if len(content) > asked:
            raise ValueError(f"it has {len(content)} bytes, but at most {asked} were requested")
    length = int.from_bytes(content[:8], "little")
    if length > largest:
        raise ValueError(f"its header has {length} bytes, but at most {largest} are allowed")
    if len(content) < 8 + length:
        raise ValueError("it ends within its header")
    try:
        header = json.loads(content[8 : 8 + length].decode())
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if type(header) is not dict:
        raise ValueError("its header is not a JSON object")
    return header, memoryview(content)[8 + length :]


def _range(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Type, shape and byte range of one tensor."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name has {len(name)} characters, but at most {LONGEST_NAME} are allowed")
    # An unpaired surrogate would fail later, when the name is written.
    name.encode()
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.80} has no type, shape and byte range")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _NUMPY:
        raise ValueError(f"{name!r:.80} is of type {dtype!r:.80}; only {' and '.join(_NUMPY)} are supported")
    if type(shape) is not list or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ValueError(f"{name!r:.80} has shape {shape!r:.80}")
    # Strides are products of sizes, even for empty tensors.
    if math.prod(max(n, 1) for n in shape) >= 2**48:
        raise ValueError(f"{name!r:.80} has shape {shape!r:.80}")
    if type(offsets) is not list or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"{name!r:.80} has byte range {offsets!r:.80}")
    first, last = offsets
    if last - first != math.prod(shape) * _NUMPY[dtype].itemsize:
        raise ValueError(f"{name!r:.80} has shape {shape!r:.80} in {last - first} bytes")
    return _NUMPY[dtype], tuple(shape), first, last


def _tensor(values: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], first: int, last: int) -> Tensor:
    # Copied into PyTorch's own aligned memory: matrix products can round differently with another alignment, and
    # engines must agree bit for bit.
    return torch.tensor(np.frombuffer(bytes(values[first:last]), dtype).reshape(shape))
