"""Prepared records are made once, whole or not at all, and are mapped rather than read."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from lorica.config import TaskConfig
from lorica.files import cache_folder
from lorica.tasks import load_task
from lorica.tasks.cache import Arrays, cached_arrays
from lorica.tasks.text import TextRecords
from tests.tasks.conftest import write_tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORICA_HOME", str(tmp_path / "home"))


def make(arrays: Arrays) -> None:
    arrays.append("tokens", np.arange(5, dtype=np.int32))
    arrays.append("tokens", np.arange(5, 7, dtype=np.int32))
    arrays.append("pixels", np.ones((2, 3, 4), dtype=np.uint8))
    arrays.append("none", np.empty((0, 2), dtype=np.float32))


def fail(arrays: Arrays) -> None:
    raise AssertionError("made again")


def test_arrays_are_made_once_and_mapped() -> None:
    first = cached_arrays(["a"], make)
    again = cached_arrays(["a"], fail)
    for found in (first, again):
        assert isinstance(found["tokens"], np.memmap)
        np.testing.assert_array_equal(found["tokens"], np.arange(7))
        assert found["pixels"].shape == (2, 3, 4)
        assert found["none"].shape == (0, 2)
        with pytest.raises(ValueError, match="read-only"):
            found["tokens"][0] = 1
    with pytest.raises(AssertionError, match="made again"):
        cached_arrays(["b"], fail)


def test_nothing_half_made_stays_and_nobody_else_can_read() -> None:
    def crash(arrays: Arrays) -> None:
        make(arrays)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_arrays(["a"], crash)
    assert list((cache_folder() / "records").iterdir()) == []
    cached_arrays(["a"], make)
    (folder,) = (cache_folder() / "records").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_of_two_runs_that_make_the_same_one_is_kept() -> None:
    """The other run finishes while this one is at it."""

    def late(arrays: Arrays) -> None:
        cached_arrays(["a"], make)
        make(arrays)

    np.testing.assert_array_equal(cached_arrays(["a"], late)["tokens"], np.arange(7))
    assert len(list((cache_folder() / "records").iterdir())) == 1


def test_rows_of_one_kind_only(tmp_path: Path) -> None:
    arrays = Arrays(tmp_path)
    arrays.append("x", np.zeros((1, 2)))
    with pytest.raises(ValueError, match="rows of x"):
        arrays.append("x", np.zeros((1, 3)))


def _prepare(home: str, queue: multiprocessing.Queue[int]) -> None:
    os.environ["LORICA_HOME"] = home
    queue.put(int(cached_arrays(["shared"], make)["tokens"].sum()))


def test_parallel_runs_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_prepare, args=(str(tmp_path / "home"), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=120) for _ in processes] == [21, 21, 21]
    for process in processes:
        process.join()
    assert len(list((tmp_path / "home" / "cache" / "records").iterdir())) == 1


def test_texts_are_tokenised_again_only_for_other_data_lengths_or_tokenizers(tmp_path: Path) -> None:
    base, other = write_tokenizer(tmp_path / "base"), write_tokenizer(tmp_path / "other", frame=False)
    data, more = tmp_path / "data.csv", tmp_path / "more.csv"
    data.write_text("text,label\na fine film,p\nnot at all dull,n\n")
    more.write_text("text,label\na fine film,p\nnot at all bad,n\n")

    def count(source: Path, tokenizer: str, **keys: int) -> int:
        config = TaskConfig(type="text-classification", train=str(source), test=str(source), **keys)
        records = load_task(config, tokenizer).train
        assert isinstance(records, TextRecords)
        assert isinstance(records.tokens, np.memmap)
        return len(list((cache_folder() / "records").iterdir()))

    assert count(data, base) == 1
    assert count(data, base) == 1
    assert count(more, base) == 2
    assert count(data, base, max_length=4) == 3
    assert count(data, other) == 4
