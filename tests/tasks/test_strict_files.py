"""Files that are not what their name says, or say two things: refused with the line, and never opened if that may not
end."""

from __future__ import annotations

import gzip
import json
import logging
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lorica.config import TaskConfig, validate
from lorica.errors import UserError
from lorica.tasks.formats import columns as columns_module
from lorica.tasks.formats.image_folder import read_image_folder
from lorica.tasks.formats.json_lines import LINES
from lorica.tasks.labels import UNKNOWN, label_indices, label_names, label_numbers
from lorica.tasks.owners import source_names
from lorica.tasks.readers import read

LATIN = "text,label\nso good,a\nna\u00efve,b\n"


def source(path: Path | str, private: bool = False, **keys):
    config = TaskConfig(**({"type": "text-classification", "train": str(path), "test": str(path)} | keys))
    return read(config, "task.train", str(path), private=private)


def labels_of(path: Path, **keys):
    found = source(path, **keys)
    return label_indices(found, "label", label_names(found, "label"))


def refused(path: Path, content: bytes | str | None = None, **keys) -> str:
    """The words of the error of reading a file and its labels."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        labels_of(path, **keys)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('label,text\na,x\nb,"so called\na,y\n', "opens a cell in line 3 is never closed"),
        ('label,text\na,x\nb,"so\na,y\nb,"z\na,x\n', "opens a cell in line 3 closes in the middle of line 5"),
        ('label,text\na,"x" y\n', "line 2 has a cell that goes on after its closing quotation mark"),
        # Valid by the standard, but each line is a record.
        ('text,label\ngood,a\nbad,b\n"so,a\nfine,b\nfilm",a\n', "joins lines 4 to 6"),
        ('label,text\na,good\nb,bad\na,"so\nb,fine\na,film"\n', "joins lines 4 to 6"),
        ("text,label\ngood,a\nbad\n", "line 3 has 1 cells, but the header has 2"),
        ("text;label\ngood;a\n", "its cells are separated by semicolons"),
        ("text\tlabel\ngood\ta\n", "its cells are separated by tabs"),
        (gzip.compress(b"text,label\n", mtime=0), "it is compressed with gzip"),
        (b"PK\x03\x04...", "a spreadsheet"),
        (LATIN.encode("latin-1"), "line 3 is not encoded in UTF-8"),
        (LATIN.encode("utf-16"), "it is encoded in UTF-16"),
        (LATIN.encode("utf-16-le"), "line 1 has NUL bytes"),
        (LATIN.encode()[:-4] + b"\xc3", "line 3 is not encoded in UTF-8"),
        (b"text,label\na\x00b,a\n", "line 2 has NUL bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        ("text,label\nx," + "7" * 6000 + "\ny,1\n", "longer ones than 1,000"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, content: bytes | str, words: str) -> None:
    assert words in refused(tmp_path / "data.csv", content)


def test_lines_beyond_one_block_are_counted(tmp_path: Path) -> None:
    lines = [b"text,label", *[b"w" * 3000 + b",a"] * 1000, b"\xe9,b"]
    assert "line 1002 is not encoded" in refused(tmp_path / "data.csv", b"\n".join(lines))


def test_valid_line_breaks_are_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b'text,label\r\ngood,a\r\n"Dear John,\nyes, fine",b\r\n"say ""hi""\r\nand go",a\r\n')
    assert source(path).table["text"].to_pylist() == ["good", "Dear John,\nyes, fine", 'say "hi"\r\nand go']
    assert "2 records contain line breaks; the first of them begins in line 3" in caplog.text


def test_one_cell_may_be_longer_than_what_parsers_take_by_default(tmp_path: Path) -> None:
    path, long = tmp_path / "data.csv", "\u597d " * 1_500_000
    path.write_text(f"text,label\n{long},a\nb,c\n", encoding="utf-8")
    assert source(path).table["text"].to_pylist() == [long, "b"]


def test_texts_that_look_like_nothing_are_texts(tmp_path: Path) -> None:
    path, texts = tmp_path / "data.csv", ["NA", "null", "None", "-", "-1"]
    path.write_text("text,label\n" + "".join(f"{text},{'ab'[i % 2]}\n" for i, text in enumerate(texts)))
    assert source(path).table["text"].to_pylist() == texts


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "\\ud800", "label": "a"}', "line 2 has half of a surrogate pair"),
        ('{"text": "x", "label": ' + "[" * 100_000, "line 2 is nested too deeply"),
        ('{"text": "x", "label": ' + "9" * 6000 + "}", "line 2 has a number of thousands of digits"),
        ('{"text": "x", "label": "a", "label": "b"}', "line 2 has a key twice"),
        ('{"text": "x", "label": 1180591620717411303424}', "mixes types"),
        ('{"text": "x", "label": NaN}', "record 1 (counted from 0) has no value in column 'label'"),
        ('{"text": "x"}', "record 1 (counted from 0) has no value in column 'label'"),
    ],
)
def test_json_lines_that_are_refused(tmp_path: Path, line: str, words: str) -> None:
    assert words in refused(tmp_path / "data.jsonl", f'{{"text": "a", "label": 1}}\n{line}\n')


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00", "label": "a"}\n')
    assert source(path).table["text"].to_pylist() == ["\U0001f600"]


@pytest.mark.parametrize("last", ["0.5", str(2**60 + 1) + "}\n" + '{"text": "x", "label": 0.5'])
def test_integers_and_floats_in_different_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    monkeypatch.setattr("lorica.tasks.formats.json_lines.LINES", 2)
    lines = ['{"text": "x", "label": 9007199254740993}\n'] * 2 + [f'{{"text": "x", "label": {last}}}\n']
    assert LINES > 2
    assert "task.label" in refused(tmp_path / "data.jsonl", "".join(lines))


def test_lists_that_are_empty_in_one_chunk_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.tasks.formats.json_lines.LINES", 1)
    path = tmp_path / "data.jsonl"
    answers = [{"text": [], "answer_start": []}, {"text": ["b"], "answer_start": [2]}]
    rows = [{"question": "q", "context": "a b", "answers": answer} for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert source(path, type="question-answering").table["answers"].to_pylist() == answers


MARKS = ["-1", "-", "NA", "NaN", "null", "None", "-100", " - "]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_records_without_a_label_are_refused_unless_the_mark_is_a_label(tmp_path: Path, mark: str, suffix: str) -> None:
    path, labels = tmp_path / f"data{suffix}", ["0", "1", mark, "1", mark]
    if suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"x,{label}\n" for label in labels))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in labels))
    else:
        parquet.write_table(pa.table({"text": ["x"] * 5, "label": labels}), path)
    words = refused(path)
    assert f"record 2 (counted from 0) has {mark!r} in column 'label'" in words
    assert "remove the records without a label (2 of 5)" in words
    names = ["0", "1", mark]
    assert label_indices(source(path), "label", names).tolist() == [0, 1, 2, 1, 2]
    # At a node an error would tell the server.
    private = label_indices(source(path, private=True), "label", ["0", "1"])
    assert private.tolist() == [0, 1, UNKNOWN, 1, UNKNOWN]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_missing_labels_of_an_owner_are_unknown(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    if suffix == ".csv":
        path.write_text("text,label\nx,1\ny,\nz,0\n")
    elif suffix == ".jsonl":
        path.write_text('{"text": "x", "label": 1}\n{"text": "y", "label": null}\n{"text": "z", "label": 0}\n')
    else:
        parquet.write_table(pa.table({"text": ["x", "y", "z"], "label": [1, None, 0]}), path)
    assert label_indices(source(path, private=True), "label", ["0", "1"]).tolist() == [1, UNKNOWN, 0]
    numbers = label_numbers(source(path, private=True, type="text-regression"), "label")
    assert [str(number) for number in numbers] == ["1.0", "nan", "0.0"]
    assert "record 1 (counted from 0) has no value in column 'label'" in refused(path)


@pytest.mark.parametrize("values", [["1", "1e999", "2"], ["1", "nan", "2"], ["1", "9" * 400, "2"]])
def test_numbers_to_predict_are_finite(tmp_path: Path, values: list[str]) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\n" + "".join(f"x,{value}\n" for value in values))
    with pytest.raises(UserError, match=r"record 1 \(counted from 0\) has no (finite )?number.*remove"):
        label_numbers(source(path, type="text-regression"), "label")


def test_withheld_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\nx,-1.0\ny,-1\n")
    with pytest.raises(UserError, match="withheld"):
        label_numbers(source(path, type="text-regression"), "label")


def declared(path: Path, labels: list[int | None], metadata: bytes) -> Path:
    table = pa.table({"text": ["x"] * len(labels), "label": labels})
    parquet.write_table(table.replace_schema_metadata({b"huggingface": metadata}), path)
    return path


@pytest.mark.parametrize(
    "metadata",
    [b"{", b"3", b"\xff", b'{"info": {"features": 3}}', b"[" * 100_000]
    + [
        json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}).encode()
        for names in ("ab", [1, 2], ["a", "a"], ["a"])
    ],
)
def test_damaged_label_names_are_refused(tmp_path: Path, metadata: bytes) -> None:
    assert "create the file again" in refused(declared(tmp_path / "data.parquet", [0, 1], metadata)).lower()


def test_a_declared_label_below_zero_is_none(tmp_path: Path) -> None:
    metadata = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}'
    path = declared(tmp_path / "data.parquet", [0, 1, -1, 2], metadata)
    words = refused(path)
    assert "record 2 (counted from 0) has no label" in words
    assert "remove the records without a label (2 of 4)" in words
    private = label_indices(source(path, private=True), "label", ["a", "b"])
    assert private.tolist() == [0, 1, UNKNOWN, UNKNOWN]


def test_text_of_parquet_is_utf8(tmp_path: Path) -> None:
    bad = pa.array([b"\xff\xfe", b"x"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": bad, "label": ["a", "b"]}), tmp_path / "data.parquet")
    assert "not encoded in UTF-8" in refused(tmp_path / "data.parquet")


def test_a_small_parquet_file_that_expands_is_refused_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 records of one text of 100 kB are 1 GB once they are read; the file has the text once."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["x" * 100_000]))
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"text": words, "label": words}), path)
    assert path.stat().st_size < 1_000_000
    monkeypatch.setattr(columns_module, "MOST_BYTES", 2**26)
    before = pa.total_allocated_bytes()
    assert "it has more than" in refused(path)
    assert pa.default_memory_pool().max_memory() - before < 2**30


def test_records_without_number_are_refused_by_the_files_own_words(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    zeros = pa.repeat(pa.scalar(0, pa.int8()), columns_module.MOST_RECORDS + 1)
    parquet.write_table(pa.table({"text": zeros, "label": zeros}), path)
    started = time.perf_counter()
    assert "20,000,000 records" in refused(path)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.parquet", "data.json"])
def test_what_is_no_file_is_never_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "it is a FIFO" in refused(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "a device, not a file" in refused(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "it is a folder" in refused(tmp_path / name)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(name)
    assert "task.train" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["", "a\0b.csv", "x" * 5000 + ".csv", "~nobody-of-this-name/x.csv", "/" + "a/" * 3000])
def test_what_is_no_path_is_refused(name: str) -> None:
    content = {"type": "text-classification", "train": name, "test": "b.csv"}
    with pytest.raises(UserError, match=r"^task\.train"):
        read(validate(TaskConfig, content, prefix="task"), "task.train", name)


def test_files_of_loricas_own_are_no_data(tmp_path: Path) -> None:
    for name in ("a.csv", "a.csv.private-metrics.jsonl", "a.csv.ledger.sqlite"):
        (tmp_path / name).write_text("text,label\n")
    assert source_names(str(tmp_path)) == source_names(str(tmp_path / "a*")) == [str(tmp_path / "a.csv")]


def test_an_image_folder_says_what_it_skips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat/1.png", "cat/2.tif", "dog/3.TIF", "dog/deep/er/4.png", "5.gif", "dog/6.jpg", "dog/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert read_image_folder(tmp_path, "task.train", "image", "label")["image"].to_pylist() == [
            "cat/1.png",
            "dog/6.jpg",
        ]
    assert "2 × .tif" in caplog.text
    assert "1 × .gif" in caplog.text
    assert "1 × .png" in caplog.text
    (tmp_path / "cat" / "1.png").unlink()
    (tmp_path / "dog" / "6.jpg").unlink()
    with pytest.raises(UserError, match=r"no images.*2 × \.tif"):
        read_image_folder(tmp_path, "task.train", "image", "label")


def test_a_fifo_among_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "1.png")
    with pytest.raises(UserError, match=r"cat/1\.png.*FIFO"):
        read_image_folder(tmp_path, "task.train", "image", "label")


@pytest.mark.parametrize(
    "start", [2**70, -1, 1.5, True, "0", None, 2**40], ids=["2^70", "-1", "1.5", "true", "text", "null", "2^40"]
)
def test_squad_places_that_cannot_be(tmp_path: Path, start: object) -> None:
    entry = {"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": start}]}
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": [entry]}]}]}))
    with pytest.raises(UserError, match="not in SQuAD format"):
        source(path, type="question-answering")
