"""Training data of several owners: which sources a name stands for, and whose records are whose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.loading import load_task
from lorica.tasks.owners import first_source, read_training, source_names

ROWS = {
    "north": [{"text": "a good film", "label": 1, "ward": 10}, {"text": "a bad film", "label": 0, "ward": 9}],
    "south": [{"text": "dull", "label": 0, "ward": 10}],
}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        write_rows(tmp_path / "hospitals" / f"{name}.jsonl", rows)
    (tmp_path / "hospitals" / "readme.txt").write_text("no data")
    (tmp_path / "hospitals" / "north.jsonl.ledger.sqlite").write_text("no data")
    return tmp_path / "hospitals"


def text_config(train: str | list[str]) -> TaskConfig:
    return TaskConfig(type="text-classification", train=train, test="unused")


def test_a_list_a_pattern_and_a_folder_name_the_same_files(hospitals):
    north, south = str(hospitals / "north.jsonl"), str(hospitals / "south.jsonl")
    assert source_names(str(hospitals)) == source_names(str(hospitals / "*.jsonl*")) == [north, south]
    assert source_names([south, north]) == [south, north]
    assert source_names("lorica:digits/train") == ["lorica:digits/train"]
    assert source_names("someone/data[train]") == ["someone/data[train]"]
    assert first_source(str(hospitals)) == hospitals
    assert first_source([south, north]) == hospitals / "south.jsonl"


def test_files_are_read_in_order_and_are_owners(hospitals):
    source, owners = read_training(text_config(str(hospitals)))
    assert source.table.column("text").to_pylist() == ["a good film", "a bad film", "dull"]
    assert owners.of.tolist() == [0, 0, 1]
    assert [Path(name).stem for name in owners.names] == ["north", "south"]


def test_values_of_a_column_are_owners_in_the_order_of_numbers(hospitals):
    source, owners = read_training(text_config(str(hospitals)), "ward")
    assert owners.names == ["9", "10"]
    assert owners.of.tolist() == [1, 0, 1]
    assert source.table.num_rows == 3


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_the_owners_column_is_read_from_every_format(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text("text,label,site\na,0,west\nb,1,east\n")
    else:
        write_rows(path, [{"text": "a", "label": 0, "site": "west"}, {"text": "b", "label": 1, "site": "east"}])
    _, owners = read_training(text_config(str(path)), "site")
    assert (owners.names, owners.of.tolist()) == (["east", "west"], [1, 0])


def test_image_folders_of_several_owners_are_one_task(tmp_path, grey_base):
    for owner, levels in (("a", [0, 255]), ("b", [255])):
        for index, level in enumerate(levels):
            folder = tmp_path / "owners" / owner / ("dark" if level == 0 else "light")
            folder.mkdir(parents=True)
            Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / f"{index}.png")
    config = TaskConfig(
        type="image-classification", train=str(tmp_path / "owners" / "*"), test=str(tmp_path / "owners" / "a")
    )
    task = load_task(config, grey_base)
    assert task.owners.of.tolist() == [0, 0, 1]
    assert task.train.labels.tolist() == [0, 1, 1]
    pixels = task.train.batch(np.arange(3)).inputs["pixel_values"]
    assert pixels.mean(dim=(1, 2, 3)).tolist() == [-1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("train", "by", "message"),
    [
        ([], None, r"task\.train = \[\]: it is empty"),
        (["{}/north.jsonl", "{}/north.jsonl"], None, "contains a source twice"),
        ("{}/*.csv", None, "no file matches this pattern"),
        (["{}/north.jsonl", "{}/absent.jsonl"], None, r"absent\.jsonl': no such file"),
        ("{}", "wards", r"federation\.by = 'wards': no such column in north\.jsonl\. Did you mean 'ward'"),
        ("{}/../typed/*", None, r"b\.jsonl': its column 'label' holds string, but that of .*a\.jsonl holds int64"),
        ("{}/../mixed/*", None, "columns with the same name have different types"),
        (
            "{}/../floats.parquet",
            "ward",
            r"federation\.by = 'ward': the column .* holds double, which cannot identify owners",
        ),
        ("{}/../missing.jsonl", "ward", r"record 1 \(counted from 0\) has no value in column 'ward'"),
    ],
)
def test_mistakes_are_named(hospitals, train, by, message):
    write_rows(hospitals.parent / "typed" / "a.jsonl", [{"text": "Miller", "label": 1}])
    write_rows(hospitals.parent / "typed" / "b.jsonl", [{"text": "Miller", "label": "1"}])
    write_rows(hospitals.parent / "mixed" / "a.parquet", [{"text": "Miller", "label": 1}])
    write_rows(hospitals.parent / "mixed" / "b.parquet", [{"text": "Miller", "label": [1]}])
    write_rows(hospitals.parent / "floats.parquet", [{"text": "Miller", "label": 1, "ward": 0.5}])
    write_rows(
        hospitals.parent / "missing.jsonl", [{"text": "Miller", "label": 1, "ward": 1}, {"text": "b", "label": 0}]
    )
    filled = [name.format(hospitals) for name in train] if isinstance(train, list) else train.format(hospitals)
    with pytest.raises(UserError, match=message) as error:
        read_training(text_config(filled), by)
    assert "Miller" not in str(error.value)


def test_files_that_declare_other_label_names_are_refused(tmp_path):
    for name, labels in (("a", ["no", "yes"]), ("b", ["yes", "no"])):
        features = {"label": {"names": labels, "_type": "ClassLabel"}}
        table = pa.table({"text": ["x", "y"], "label": [0, 1]})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"b\.parquet': its declared features"):
        read_training(text_config(str(tmp_path)))
