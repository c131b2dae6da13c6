"""Private training records are no public test records, under whatever name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.classification import Classification
from lorica.tasks.overlap import check_sources, overlap
from lorica.tasks.records import Task
from lorica.testing.records import TinyRecords


def config(train: str | list[str], test: str | dict[str, str], **keys: str) -> TaskConfig:
    return TaskConfig(type="text-classification", train=train, test=test, **keys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for name in ("a.csv", "b.csv", "sub/c.csv"):
        (data / name).write_text("text,label\nx,0\ny,1\n")
    (tmp_path / "link.csv").symlink_to(data / "a.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/a.csv", "data/a.csv"),
        ("data/a.csv", "{}/data/a.csv"),
        ("data/a.csv", "data/../data/./a.csv"),
        ("data/a.csv", "link.csv"),
        ("link.csv", "data/a.csv"),
        (["data/b.csv", "data/a.csv"], "link.csv"),
        ("data/*.csv", "data/b.csv"),
        ("data", "data/b.csv"),
        ("data/sub/c.csv", "data/sub"),
        ("data/sub/c.csv", "data"),
        ("org/name[train]", "org/name[train]"),
        ("lorica:digits/train", "lorica:digits/train"),
    ],
)
def test_one_source_under_two_names_is_refused(folder: Path, train: str | list[str], test: str) -> None:
    test = test.format(folder)
    with pytest.raises(UserError, match=r"task\.test = .*overlaps with task\.train.*test_overlap=allow"):
        check_sources(config(train, test))
    with pytest.raises(UserError, match=r"task\.test\.two = "):
        check_sources(config(train, {"one": "elsewhere.csv", "two": test}))
    check_sources(config(train, test, test_overlap="allow"))


@pytest.mark.parametrize(
    ("train", "test"),
    [("data/a.csv", "data/b.csv"), ("data/*.csv", "data/sub/c.csv"), ("org/name[train]", "org/name[test]")],
)
def test_other_sources_pass(folder: Path, train: str, test: str) -> None:
    check_sources(config(train, test))


def test_records_in_both_are_counted_and_named_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the files are called and whatever their order is."""
    records = TinyRecords.texts(30)
    public = TinyRecords.texts(10, seed=1)
    shared = records.subset(np.array([29, 3, 3, 7]))
    task = Task(records, {"": public, "more": shared}, ["a", "b"], Classification(("accuracy",)))
    with pytest.raises(UserError, match=r"task\.test = .*: 3 of its records are also in task\.train"):
        overlap(config("a.csv", "b.csv", test_overlap="refuse"), task)
    assert overlap(config("a.csv", "b.csv", test_overlap="allow"), task) == 3
    assert caplog.text == ""
    assert overlap(config("a.csv", "b.csv"), task) == 3
    assert "3 records of task.train are also in task.test" in caplog.text
    apart = Task(records, {"": public}, ["a", "b"], Classification(("accuracy",)))
    assert overlap(config("a.csv", "b.csv"), apart) == 0


@pytest.mark.integration
def test_a_copy_in_another_order_and_format_is_refused_by_a_run(tmp_path: Path) -> None:
    from tests.tasks.test_whole_runs import experiment, sentences, write_rows

    rows = [{"text": f"{text} {index}", "label": index % 2} for index, text in enumerate(sentences(40, 0))]
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = tmp_path / "other.csv"
    test.write_text("label,text\n" + "".join(f"{row['label']},{row['text']}\n" for row in rows[::-1][:15]))
    task = {"type": "text-classification", "train": train, "test": str(test)}
    with pytest.raises(UserError, match=r"15 of its records are also in task\.train"):
        experiment(tmp_path, task | {"test_overlap": "refuse"}).run()
    assert not (tmp_path / "runs").exists()
    copy = str(shutil.copy(train, tmp_path / "copy.jsonl"))
    result = experiment(tmp_path, task | {"test": copy}, name="allowed").run()
    assert any(line.startswith("40 training records that are also in a test") for line in result.privacy["not_covered"])
