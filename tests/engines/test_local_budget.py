"""A run in one process is refused at its start where any record's budget would not last, in whichever file it comes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lorica.engines.local import LocalEngine, prepare_local
from lorica.errors import UserError
from lorica.experiment import Experiment
from lorica.privacy.accounting import Steps, epsilon
from tests.engines.organisations import rows
from tests.tasks.test_whole_runs import tiny_bert

DELTA, SIGMA = 1e-2, 1.0
Rows = list[dict[str, Any]]


def as_csv(path: Path, content: Rows) -> Path:
    path = path.with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["label", "text"])
        writer.writeheader()
        writer.writerows(content)
    return path


def as_jsonl(path: Path, content: Rows) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(json.dumps(row) for row in content))
    return path


def as_parquet(path: Path, content: Rows) -> Path:
    path = path.with_suffix(".parquet")
    parquet.write_table(pyarrow.Table.from_pylist(content), path)
    return path


class Runs:
    """Experiments of one round on data that a test writes, with a limit that one run and half another fit into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny_bert(folder / "encoder")
        self.test = as_jsonl(folder / "test", rows(10, 99))
        numbered = [row | {"text": f"{row['text']} {number}"} for number, row in enumerate(rows(20, 0))]
        self.rows: Rows = numbered
        self.train = as_jsonl(folder / "train", self.rows)
        self.limit = epsilon([Steps(8 / 10, SIGMA, 3)], DELTA)

    def experiment(self, train: Path, name: str, *overrides: str) -> Experiment:
        content: dict[str, Any] = {
            "name": name,
            "output": str(self.folder / "runs"),
            "model": {"base": self.base, "pooling": "mean", "threads": 1},
            "lora": {"r": 2},
            "task": {"type": "text-classification", "train": str(train), "test": str(self.test), "max_length": 16},
            "federation": {"clients": 2, "partition": "iid", "rounds": 2, "local_steps": 1, "batch_size": 8},
            "privacy": {"epsilon": None, "noise_multiplier": SIGMA, "delta": DELTA, "max_lifetime_epsilon": self.limit},
        }
        return Experiment.load(content, list(overrides))

    def engine(self, train: Path, *overrides: str) -> LocalEngine:
        return prepare_local(self.experiment(train, "engine", *overrides).config)[1]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


FILES: dict[str, tuple[Callable[[Path, Rows], Path], Callable[[Rows], Rows]]] = {
    "copied": (as_jsonl, lambda content: content),
    "one record more": (as_jsonl, lambda content: [*content, {"text": "good new one", "label": "good"}]),
    "one record fewer": (as_jsonl, lambda content: content[1:]),
    "shuffled": (as_jsonl, lambda content: [content[i] for i in np.random.default_rng(1).permutation(len(content))]),
    "as CSV": (as_csv, lambda content: content[::-1]),
    "as Parquet": (as_parquet, lambda content: content[::2] + content[1::2]),
    "with a column more": (as_jsonl, lambda content: [row | {"ward": 3} for row in content]),
}


def test_a_record_cannot_be_spent_twice_by_writing_it_to_another_file(runs: Runs) -> None:
    result = runs.experiment(runs.train, "first").run()
    assert result.privacy["clients"][0]["lifetime_epsilon"] == epsilon([Steps(8 / 10, SIGMA, 2)], DELTA)
    for name, (write, change) in FILES.items():
        folder = runs.folder / name
        folder.mkdir()
        with pytest.raises(UserError, match=r"privacy\.max_lifetime_epsilon"):
            runs.engine(write(folder / "data", change(runs.rows))).join("second")
        if name == "one record more":
            # In the same place, too, as data grow.
            as_jsonl(runs.train, change(runs.rows))
            with pytest.raises(UserError, match=r"privacy\.max_lifetime_epsilon"):
                runs.engine(runs.train).join("second")
    # What the refused runs had reserved was given back; other records have all of their budget.
    other = as_jsonl(runs.folder / "other", [row | {"text": f"{row['text']} of another ward"} for row in runs.rows])
    runs.engine(other).join("second")
    # One step still fits, and the statement says what the record has been in.
    appended = runs.experiment(
        as_jsonl(runs.folder / "again", FILES["shuffled"][1](runs.rows)), "third", "federation.rounds=1"
    ).run()
    worst = max(row["lifetime_epsilon"] for row in appended.privacy["clients"])
    assert worst == epsilon([Steps(8 / 10, SIGMA, 3)], DELTA)


def test_two_runs_at_once_do_not_both_start(runs: Runs) -> None:
    first = runs.engine(runs.train)
    assert set(first.join("first")) == {0, 1}
    copy = as_csv(runs.folder / "copy", runs.rows[::-1])
    for train in (runs.train, copy):
        with pytest.raises(UserError, match=r"what is reserved for run .*first.*lorica budget .* --release first"):
            runs.engine(train).join("second")
    # The same run again, after a crash, has its own reservation.
    runs.engine(runs.train).join("first")
    # One that asks for no more than is left starts.
    runs.engine(copy, "federation.rounds=1").join("third")
    with pytest.raises(UserError, match="what is reserved for run"):
        runs.engine(runs.train, "federation.rounds=1").join("fourth")
    for client in first.clients.values():
        client.ledger.end("first", client.number)
    runs.engine(runs.train, "federation.rounds=1").join("fourth")


def test_a_finished_run_holds_nothing(runs: Runs) -> None:
    runs.experiment(runs.train, "first", "federation.rounds=1").run()
    ledger = runs.engine(runs.train).clients[0].ledger
    assert [one.outstanding for one in ledger.exposures()] == [0, 0]
    assert os.path.samefile(ledger.path, f"{runs.train}.ledger.sqlite")


def test_a_group_is_known_by_any_of_its_records(runs: Runs) -> None:
    """All of a patient's records count as one, and a new record of an old patient is no new patient."""

    def with_patients(content: Rows) -> Rows:
        return [row | {"patient": f"p{index // 2}"} for index, row in enumerate(content)]

    content = with_patients([*runs.rows, *({"text": f"good {n}", "label": "good"} for n in range(20))])
    groups = ["privacy.unit=group", "privacy.group=patient", "privacy.group_records=4"]
    runs.engine(as_jsonl(runs.folder / "wards", content), *groups).join("first")
    grown = [*content, *(row | {"text": f"{row['text']} again"} for row in content)]
    with pytest.raises(UserError, match=r"what is reserved for run .*first"):
        runs.engine(as_jsonl(runs.folder / "grown", grown), *groups).join("second")
