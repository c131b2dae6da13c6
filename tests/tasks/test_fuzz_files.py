"""Mutated data files: whatever happens to them, a task is loaded or a `UserError` says why not, and soon.

`LORICA_FUZZ_SEED` chooses other mutations.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.label_counts import public_counts
from lorica.tasks.loading import load_task, load_training
from tests.fuzzing import draws_of
from tests.tasks.conftest import WORDS
from tests.tiers import integration

LONGEST_SECONDS = 10
ROWS = [(" ".join(WORDS[i % 5 :]), ("neg", "pos")[i % 2]) for i in range(12)]
FEATURES = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["neg", "pos"]}}}}
SCRAPS = [
    *(
        b'"',
        b'""',
        b",",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"\xe9",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b"[" * 3000,
    ),
    *(b"-1", b"-", b"NA", b"NaN", b"null", b"Infinity", b"1e999", b"9" * 6000, b"\\ud800", b"'", b"\t", b";", b" "),
    *(
        b"\x1f\x8b\x08",
        b"PK\x03\x04",
        b"PAR1",
        b"true",
        b"[]",
        b"{}",
        b"0.5",
        b"\xe2\x80\xa8",
        b"1180591620717411303424",
    ),
]


def csv_file(folder: Path) -> dict[str, Any]:
    (folder / "data.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS))
    return {"type": "text-classification", "train": "data.csv"}


def numbers_file(folder: Path) -> dict[str, Any]:
    (folder / "data.csv").write_text("text,label\n" + "".join(f"{text},{i / 4}\n" for i, (text, _) in enumerate(ROWS)))
    return {"type": "text-regression", "train": "data.csv"}


def json_lines_file(folder: Path) -> dict[str, Any]:
    rows = [{"text": text, "label": i % 3} for i, (text, _) in enumerate(ROWS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"type": "text-classification", "train": "data.jsonl"}


def parquet_file(folder: Path) -> dict[str, Any]:
    table = pa.table({"text": [text for text, _ in ROWS], "label": [i % 2 for i in range(len(ROWS))]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(FEATURES)}), folder / "data.parquet")
    return {"type": "text-classification", "train": "data.parquet"}


def squad_file(folder: Path) -> dict[str, Any]:
    entries = [{"id": str(i), "question": "a fine film", "answers": [answer(i)]} for i in range(6)]
    content = {"data": [{"title": "t", "paragraphs": [{"context": " ".join(WORDS), "qas": entries}]}]}
    (folder / "data.json").write_text(json.dumps(content))
    lengths = {"max_length": 32, "stride": 4, "max_question": 8}
    return {"type": "question-answering", "train": "data.json"} | lengths


def answer(index: int) -> dict[str, Any]:
    return {"text": WORDS[index], "answer_start": len(" ".join(WORDS[:index])) + (index > 0)}


def image_folder(folder: Path) -> dict[str, Any]:
    for index in range(6):
        place = folder / "images" / ("cat", "dog")[index % 2] / f"{index}.{('png', 'jpg', 'webp')[index % 3]}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 7), 40 * index).save(place)
    return {"type": "image-classification", "train": "images"}


def image_table(folder: Path) -> dict[str, Any]:
    encoded = []
    for index in range(6):
        content = io.BytesIO()
        Image.new("RGB", (5, 4), (index, 0, 0)).save(content, format="PNG")
        encoded.append({"bytes": content.getvalue(), "path": None})
    parquet.write_table(pa.table({"image": encoded, "label": [0, 1] * 3}), folder / "data.parquet")
    return {"type": "image-classification", "train": "data.parquet"}


KINDS = [csv_file, numbers_file, json_lines_file, parquet_file, squad_file, image_folder, image_table]


def mutated(content: bytes, draws: random.Random) -> bytes:
    """A few bytes changed, inserted or cut out, a part repeated, or another encoding."""
    for _ in range(draws.randint(1, 3)):
        place = draws.randint(0, len(content))
        end = min(len(content), place + draws.choice([1, 2, 8, 60]))
        content = {
            "insert": lambda: content[:place] + draws.choice(SCRAPS) + content[place:],  # noqa: B023
            "replace": lambda: content[:place] + draws.choice(SCRAPS) + content[end:],  # noqa: B023
            "cut": lambda: content[:place] + content[end:],  # noqa: B023
            "end": lambda: content[:place],  # noqa: B023
            "repeat": lambda: content[:place] + content[place:end] * draws.choice([2, 300]) + content[end:],  # noqa: B023
            "flip": lambda: content[:place] + bytes([draws.randrange(256)]) + content[place + 1 :],  # noqa: B023
            "encode": lambda: content.decode("latin-1").encode("utf-16"),  # noqa: B023
        }[draws.choices(["insert", "replace", "cut", "end", "repeat", "flip", "encode"], [6, 6, 3, 2, 2, 3, 1])[0]]()
    return content


def mutate_one(folder: Path, draws: random.Random) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draws.choice(files)
    path.write_bytes(mutated(path.read_bytes(), draws))


def check(kind: Callable[[Path], dict[str, Any]], seeds: range, folder: Path, bases: dict[bool, str]) -> int:
    """How many of the mutations are loaded after all."""
    loaded = 0
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        keys = kind(place)
        draws = draws_of(kind.__name__, seed)
        mutate_one(place, draws)
        source = str(place / keys["train"])
        config = TaskConfig(**keys | {"train": source, "test": source})
        started = time.perf_counter()
        try:
            task = load_task(config, bases["image" in keys["type"]])
        except UserError as error:
            str(error).encode()
        else:
            public_counts(task)
            loaded += 1
        assert time.perf_counter() - started < LONGEST_SECONDS, (kind.__name__, seed)
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_loaded_or_refused(
    tmp_path: Path, text_base: str, grey_base: str, kind: Callable[[Path], dict[str, Any]]
) -> None:
    keys = kind(tmp_path)
    source = str(tmp_path / keys["train"])
    bases = {False: text_base, True: grey_base}
    # Without a mutation there is nothing to refuse.
    assert len(load_task(TaskConfig(**keys | {"train": source, "test": source}), bases["image" in keys["type"]]).train)
    assert check(kind, range(20), tmp_path, bases) < 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files_are_loaded_or_refused(
    tmp_path: Path, text_base: str, grey_base: str, kind: Callable[[Path], dict[str, Any]]
) -> None:
    assert check(kind, range(1000, 1200), tmp_path, {False: text_base, True: grey_base}) < 200


ODD = {
    "binary": pa.array([b"a", b"b\xff"] * 3),
    "bool": pa.array([True, False] * 3),
    "date": pa.array([0, 1] * 3, pa.date32()),
    "decimal": pa.array([1, 2] * 3, pa.decimal128(5)),
    "dictionary": pa.array(["a", "b"] * 3).dictionary_encode(),
    "dictionary of integers": pa.array([7, 2**62] * 3).dictionary_encode(),
    "dictionary and null": pa.array(["a", None] * 3).dictionary_encode(),
    "double": pa.array([0.0, float("nan")] * 3),
    "half": pa.array([1.0, 2.0] * 3, pa.float16()),
    "integers": pa.array([-(2**63), 2**63 - 1] * 3),
    "list": pa.array([["a"], []] * 3),
    "list of null": pa.array([[], [None]] * 3),
    "map": pa.array([[("a", 1)], []] * 3, pa.map_(pa.string(), pa.int64())),
    "messages": pa.array([[{"role": "user", "content": None}], []] * 3),
    "null": pa.nulls(6),
    "struct": pa.array([{"text": ["a"], "answer_start": [2**62]}, {"text": None, "answer_start": None}] * 3),
    "struct of bytes": pa.array([{"bytes": b"", "path": "/dev/zero"}, {"bytes": None, "path": "a\0b"}] * 3),
    "text": pa.array(["", "x" * 5000] * 3),
    "text of numbers": pa.array(["9" * 5000, "1"] * 3),
    "time": pa.array([0, 1] * 3, pa.timestamp("ns", "UTC")),
    "unsigned": pa.array([0, 2**64 - 1] * 3, pa.uint64()),
    "views": pa.array(["a", "b"] * 3).cast(pa.string_view()),
}
COLUMNS = {
    "text-classification": ["text", "label"],
    "text-regression": ["text", "label"],
    "language-modelling": ["text"],
    "question-answering": ["question", "context", "answers"],
    "image-classification": ["image", "label"],
}


@pytest.mark.parametrize("metadata", [FEATURES, *integration(None)])
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_any_type_are_loaded_or_refused(
    tmp_path: Path, text_base: str, grey_base: str, kind: str, metadata: dict[str, Any] | None
) -> None:
    plain = {"answers": pa.array([{"text": ["a"], "answer_start": [0]}] * 6), "label": pa.array(["neg", "pos"] * 3)}
    base = grey_base if kind.startswith("image") else text_base
    source = str(tmp_path / "data.parquet")
    metadata = metadata and {"huggingface": json.dumps(metadata)}
    usual = {own: plain.get(own, pa.array(["a film"] * 6)) for own in COLUMNS[kind]}
    lengths = {"max_length": 32, "stride": 4, "max_question": 8}
    for column in COLUMNS[kind]:
        for name, values in ODD.items():
            parquet.write_table(pa.table(usual | {column: values}).replace_schema_metadata(metadata), source)
            for private in (False, True):
                config = TaskConfig(type=kind, train=source, test=source, labels=["neg", "pos"], **lengths)
                try:
                    load_training(config, base) if private else load_task(config, base)
                except UserError as error:
                    str(error).encode()
                except Exception as error:
                    raise AssertionError(f"{column} of {name}, private {private}") from error
