"""The reader of safetensors bytes takes what Lorica writes, and refuses all else in no time and memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from lorica.tensors import LARGEST_HEADER, LONGEST_NAME, decode, decode_with_metadata, encode

TENSORS = {
    "layer.0.A": torch.tensor([[1.5, -0.0, float("nan")], [float("inf"), 1e-45, 3.4e38]]),
    "energy:x": torch.tensor(2.0),
    "nothing": torch.empty(0, 3),
    "sequence": torch.tensor(7),
    "ø\n": torch.ones(2, 1, 2).transpose(0, 2),
}


def blob(header: Any, values: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def bits(value: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return value.dtype, value.shape, value.contiguous().numpy().tobytes()


def test_it_reads_what_the_library_writes_bit_for_bit() -> None:
    content = safetensors.torch.save({n: t.contiguous() for n, t in TENSORS.items()}, metadata={"a": "b"})
    assert encode(TENSORS, {"a": "b"}) == content
    found, metadata = decode_with_metadata(content)
    assert metadata == {"a": "b"}
    assert {name: bits(value) for name, value in found.items()} == {n: bits(t) for n, t in TENSORS.items()}
    library = safetensors.torch.load(content)
    assert {name: bits(value) for name, value in library.items()} == {n: bits(t) for n, t in found.items()}
    assert decode(encode({})) == {}
    # Writing to a tensor changes neither the bytes nor another tensor.
    found["layer.0.A"].zero_()
    assert bits(decode(content)["layer.0.A"]) == bits(TENSORS["layer.0.A"])


BAD = {
    "an integer": 7,
    "a huge integer": 10**15,
    "none": None,
    "text": "reply",
    "a bytearray": bytearray(encode({"a": torch.ones(1)})),
    "a list": [1],
    "nothing": b"",
    "a short prefix": b"\x02\x00",
    "no JSON": blob(b"\xff\xfe{"),
    "UTF-16": blob("{}".encode("utf-16")),
    "a list as header": blob([]),
    "a number as header": blob(1),
    "a nested header": blob(b"[" * 100_000),
    "a number of many digits": blob(b'{"a":' + b"1" * 10_000 + b"}"),
    "an entry that is none": blob({"a": 1}),
    "an entry that lacks": blob({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "an entry with more": blob({"a": entry() | {"b": 1}}, bytes(4)),
    "F4": blob({"a": entry("F4", [8])}, bytes(4)),
    "F8_E8M0": blob({"a": entry("F8_E8M0", [4])}, bytes(4)),
    "F64": blob({"a": entry("F64", [1], [0, 8])}, bytes(8)),
    "BOOL": blob({"a": entry("BOOL", [4])}, bytes(4)),
    "a type that is none": blob({"a": entry(["F32"])}, bytes(4)),
    "a shape of 2^63": blob({"a": entry("F32", [2**63, 0], [0, 0])}),
    "an empty shape of huge strides": blob({"a": entry("F32", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], [0, 0])}),
    "a negative shape": blob({"a": entry("F32", [-1, -1])}, bytes(4)),
    "a shape of floats": blob({"a": entry("F32", [1.0])}, bytes(4)),
    "a shape of booleans": blob({"a": entry("F32", [True])}, bytes(4)),
    "a shape that is text": blob({"a": entry("F32", "1")}, bytes(4)),
    "a shape of NaN": blob({"a": entry("F32", [float("nan")])}, bytes(4)),
    "a shape of a thousand": blob({"a": entry("F32", [1] * 1000)}, bytes(4)),
    "a shape of more": blob({"a": entry("F32", [2])}, bytes(4)),
    "three offsets": blob({"a": entry(offsets=[0, 4, 4])}, bytes(4)),
    "negative offsets": blob({"a": entry(offsets=[-4, 0])}, bytes(4)),
    "backward offsets": blob({"a": entry("F32", [0], [4, 0])}, bytes(4)),
    "offsets beyond the end": blob({"a": entry("F32", [2], [0, 8])}, bytes(4)),
    "offsets of booleans": blob({"a": entry("F32", [0], [False, False])}),
    "two tensors in one place": blob({"a": entry(), "b": entry()}, bytes(4)),
    "a hole": blob({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)),
    "values of no tensor": blob({}, bytes(4)),
    "values after the last": blob({"a": entry()}, bytes(8)),
    "a long name": blob({"a" * (LONGEST_NAME + 1): entry()}, bytes(4)),
    "half a surrogate pair": blob(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "metadata that are a list": blob({"__metadata__": ["request"]}),
    "metadata that are numbers": blob({"__metadata__": {"request": 1}}),
}


@pytest.mark.parametrize("name", BAD)
def test_everything_else_is_one_kind_of_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(BAD[name])


def test_a_header_is_measured_before_it_is_parsed() -> None:
    """JSON of 90 MB once took 96 s and 2.1 GB; a length that the bytes do not have must not be allocated either."""
    content = blob(b'{"a":[' + b"[]," * 30_000_000 + b"[]]}")
    spaces = blob(b" " * (LARGEST_HEADER + 1))
    tracemalloc.start()
    started = time.perf_counter()
    for hostile in (content, (2**63).to_bytes(8, "little"), spaces):
        with pytest.raises(ValueError, match=f"at most {LARGEST_HEADER} are allowed"):
            decode(hostile)
    with pytest.raises(ValueError, match=r"at most \d{3} were requested"):
        decode(content, {"a": (1,)})
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    assert seconds < 0.5


@pytest.mark.parametrize("shapes", [{"layer.0.A": (2, 3), "ø\n": (2, 1, 2)}, {"energy:x": ()}, {}])
def test_what_was_asked_for_fits(shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    assert decode(encode(tensors), shapes).keys() == shapes.keys()
    with pytest.raises(ValueError, match="were requested"):
        decode(encode(tensors | {"more": torch.ones(1000)}), shapes)
    assert len(encode({})) <= 24


def test_only_what_is_read_is_written() -> None:
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        encode({"x": torch.ones(1, dtype=torch.float64)})


def test_mutated_bytes_are_read_or_refused() -> None:
    """Bytes flipped, cut out, repeated and put in: tensors of known types come out, or a `ValueError`."""
    draws = np.random.default_rng(0)
    content = encode(TENSORS, {"request": "{}"})
    read = 0
    for _ in range(500):
        changed = mutated(content, draws)
        try:
            found = decode(changed)
        except ValueError:
            continue
        read += 1
        assert sum(value.nbytes for value in found.values()) <= len(changed)
        assert all(value.dtype in (torch.float32, torch.int64) for value in found.values())
    assert 0 < read < 500


def mutated(content: bytes, draws: np.random.Generator) -> bytes:
    """A few random changes, half of them within the header."""
    changed = bytearray(content)
    for _ in range(int(draws.integers(1, 4))):
        end = len(changed) if draws.random() < 0.5 else min(len(changed), 400)
        place = int(draws.integers(0, max(end, 1)))
        kind = draws.integers(0, 4)
        if kind == 0:
            changed[place : place + 1] = bytes([int(draws.integers(0, 256))])
        elif kind == 1:
            del changed[place : place + int(draws.integers(1, 20))]
        elif kind == 2:
            changed[place:place] = changed[place : place + int(draws.integers(1, 20))]
        else:
            pieces = [b"0", b"9", b"-", b'"', b"[", b"}", b"1e999", b"null", b"F64", b"\xff"]
            changed[place:place] = pieces[int(draws.integers(0, len(pieces)))]
    return bytes(changed)
