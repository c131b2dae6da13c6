"""Sources: what is read from each kind, and every way in which one can be wrong."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.labels import label_indices, label_names
from lorica.tasks.readers import read

SECRET = "Mrs Miller of Ward 7"
EMPTY = ("the file is empty", "it has no records")


def text_config(train: str, **keys) -> TaskConfig:
    return TaskConfig(**({"type": "text-classification", "train": train, "test": train} | keys))


def texts_and_labels(config: TaskConfig, which="train"):
    source = read(config, f"task.{which}", getattr(config, which))
    names = label_names(source, config.label)
    indices = label_indices(source, config.label, names)
    columns = [source.table.column(name).to_pylist() for name in config.text]
    return columns, [names[index] for index in indices], names


def failure(config: TaskConfig, which="train") -> UserError:
    """The error of reading the source and its labels, which must not show any record."""
    with pytest.raises(UserError) as caught:
        texts_and_labels(config, which)
    error = caught.value
    assert "Miller" not in str(error)
    # A traceback that showed a parser's error would show the record after all.
    assert error.__suppress_context__ or error.__context__ is None
    return error


def write_file(folder: Path, name: str, records: list[dict]) -> str:
    """The same records in the format that the name asks for."""
    path = folder / name
    if path.suffix.lower() == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


FILES = ["data.csv", "data.jsonl", "data.json", "data.parquet", "DATA.CSV"]
RECORDS = [
    {"id": 1, "text": "a fine, long film", "label": 10},
    {"id": 2, "text": "2020-01-01", "label": 9},
    {"id": 3, "text": "NA", "label": 9},
    {"id": 4, "text": "naïve – 好", "label": 10},
]


@pytest.mark.parametrize("name", FILES)
def test_every_file_format_gives_the_same_columns_in_the_files_order(tmp_path, name):
    columns, labels, names = texts_and_labels(text_config(write_file(tmp_path, name, RECORDS)))
    assert columns == [[record["text"] for record in RECORDS]]
    assert labels == ["10", "9", "9", "10"]
    assert names == ["9", "10"]


@pytest.mark.parametrize("name", FILES)
def test_pairs_of_columns_are_read_in_the_configured_order(tmp_path, name):
    records = [{"b": "dull", "label": "no", "a": "long"}, {"b": "fine", "label": "yes", "a": "good"}]
    columns, labels, names = texts_and_labels(text_config(write_file(tmp_path, name, records), text=["a", "b"]))
    assert columns == [["long", "good"], ["dull", "fine"]]
    assert labels == names == ["no", "yes"]


def test_csv_cells_may_hold_line_breaks_and_quoted_nothing(write_csv):
    path = write_csv("data.csv", '\ufefftext,label\n"one\ntwo",1\n"",2\n')
    assert texts_and_labels(text_config(path))[0] == [["one\ntwo", ""]]


def test_json_lines_skip_blank_lines_and_ignore_other_keys(write_csv):
    content = '{"text": "a", "label": true, "x": [1]}\n\n{"label": false, "text": "b"}\n'
    path = write_csv("data.jsonl", content)
    columns, labels, names = texts_and_labels(text_config(path))
    assert (columns, labels, names) == ([["a", "b"]], ["true", "false"], ["false", "true"])


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_and_labels_may_be_of_any_text_type(tmp_path, kind):
    table = pa.table({"text": pa.array(["a", "b"]).cast(kind), "label": pa.array(["x", "y"]).cast(kind)})
    parquet.write_table(table, tmp_path / "data.parquet")
    columns, labels, _ = texts_and_labels(text_config(str(tmp_path / "data.parquet")))
    assert (columns, labels) == ([["a", "b"]], ["x", "y"])


def test_a_folder_name_that_looks_like_a_hive_partition_adds_no_column(tmp_path):
    folder = tmp_path / "label=7"
    folder.mkdir()
    assert texts_and_labels(text_config(write_file(folder, "data.parquet", RECORDS)))[2] == ["9", "10"]


def test_class_names_in_parquet_metadata_are_used_in_their_order(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["so", "good", "bad"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 0, 2]}, features=features)
    parquet.write_table(data.with_format("arrow")[:], tmp_path / "data.parquet")
    _, labels, names = texts_and_labels(text_config(str(tmp_path / "data.parquet")))
    assert names == ["so", "good", "bad"]
    assert labels == ["bad", "so", "bad"]


def test_integer_labels_sort_by_value_and_others_as_text(write_csv):
    integers = write_csv("integers.csv", "text,label\na,10\nb,-2\nc,9\n")
    mixed = write_csv("mixed.csv", "text,label\na,10\nb,x\nc,9\n")
    assert texts_and_labels(text_config(integers))[2] == ["-2", "9", "10"]
    assert texts_and_labels(text_config(mixed))[2] == ["10", "9", "x"]


class TestWrongSources:
    def test_missing_file(self, tmp_path):
        error = failure(text_config(str(tmp_path / "nowhere.csv")))
        assert (error.key, error.problem) == ("task.train", "no such file")

    def test_missing_folder(self, tmp_path):
        assert "no such file or folder" in failure(text_config(str(tmp_path / "no where"))).problem

    def test_unknown_format(self, write_csv):
        assert "'.xml'" in failure(text_config(write_csv("data.xml", SECRET))).problem

    def test_unknown_embedded_data_set(self):
        assert "lorica:digits/train" in failure(text_config("lorica:letters/train")).remedy

    def test_the_embedded_digits_hold_no_text(self):
        error = failure(text_config("lorica:digits/train"))
        assert (error.key, error.value) == ("task.text", "text")
        assert "image, label" in error.remedy

    def test_the_test_source_has_its_own_key(self, tmp_path):
        config = text_config(write_file(tmp_path, "data.csv", RECORDS), test=str(tmp_path / "nowhere.csv"))
        assert failure(config, "test").key == "task.test"

    @pytest.mark.parametrize("name", FILES)
    def test_missing_column_names_the_nearest_and_lists_all(self, tmp_path, name):
        error = failure(text_config(write_file(tmp_path, name, RECORDS), text="texts"))
        assert (error.key, error.value) == ("task.text", "texts")
        assert error.remedy == "did you mean 'text'? The columns are: id, text, label"
        error = failure(text_config(str(tmp_path / name), label="zzz"))
        assert (error.key, error.remedy) == ("task.label", "the columns are: id, text, label")

    def test_first_record_of_a_csv_without_header_is_not_taken_for_column_names(self, write_csv):
        error = failure(text_config(write_csv("data.csv", f"{SECRET},1\n{SECRET},0\n")))
        assert error.problem == "its first line contains none of the columns 'text', 'label'"
        assert "task.text and task.label" in error.remedy

    def test_column_that_is_there_twice(self, write_csv):
        error = failure(text_config(write_csv("data.csv", "text,label,text\na,1,b\n")))
        assert "several columns" in error.problem

    @pytest.mark.parametrize("content", ["", "\n", "text,label\n"])
    def test_empty_csv(self, write_csv, content):
        assert failure(text_config(write_csv("data.csv", content))).problem in EMPTY

    def test_empty_json_lines(self, write_csv):
        assert "no records" in failure(text_config(write_csv("data.jsonl", "\n"))).problem

    def test_empty_parquet(self, tmp_path):
        schema = pa.schema({"text": pa.string(), "label": pa.int64()})
        parquet.write_table(schema.empty_table(), tmp_path / "data.parquet")
        assert "no records" in failure(text_config(str(tmp_path / "data.parquet"))).problem

    @pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
    @pytest.mark.parametrize("column", ["text", "label"])
    def test_null_is_named_by_index_and_column(self, tmp_path, name, column):
        records = [{"text": SECRET, "label": 1}, {"text": SECRET, "label": 0}, {"text": SECRET, "label": 1}]
        records[1][column] = None
        error = failure(text_config(write_file(tmp_path, name, records)))
        assert error.problem == f"record 1 (counted from 0) has no value in column '{column}'"

    @pytest.mark.parametrize(("content", "column"), [(f"{SECRET},\n", "label"), (",1\n", "text")])
    def test_empty_csv_cell_is_named_by_index_and_column(self, write_csv, content, column):
        error = failure(text_config(write_csv("data.csv", f"text,label\n{SECRET},1\n{content}")))
        assert error.problem == f"record 1 (counted from 0) has no value in column '{column}'"

    def test_csv_row_with_too_many_cells_is_named_by_its_number(self, write_csv):
        error = failure(text_config(write_csv("data.csv", f"text,label\na,1\n{SECRET},{SECRET},1\n")))
        assert error.problem == "line 3 has 3 cells, but the header has 2"

    def test_csv_that_is_not_utf8(self, tmp_path):
        (tmp_path / "data.csv").write_bytes(b"text,label\nMiller \xff,1\n")
        assert "UTF-8" in failure(text_config(str(tmp_path / "data.csv"))).remedy

    @pytest.mark.parametrize("line", [f'{{"text": "{SECRET}"', f'["{SECRET}"]', SECRET, '"\\'])
    def test_json_line_that_is_no_object_is_named_by_its_number(self, write_csv, line):
        error = failure(text_config(write_csv("data.jsonl", f'{{"text": "a", "label": 1}}\n{line}\n')))
        assert error.problem == "line 2 is not a JSON object"

    def test_json_column_of_mixed_types(self, write_csv):
        lines = f'{{"text": "{SECRET}", "label": 1}}\n{{"text": 3, "label": 0}}\n'
        error = failure(text_config(write_csv("data.jsonl", lines)))
        assert (error.key, error.value) == ("task.text", "text")

    def test_file_that_is_no_parquet(self, write_csv):
        assert "Parquet" in failure(text_config(write_csv("data.parquet", SECRET))).problem


class TestWrongLabels:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("values", [(0.5, 1.25), (1.0, 2.0)])
    def test_floats_are_no_classes(self, tmp_path, name, values):
        records = [{"text": SECRET, "label": value} for value in values]
        error = failure(text_config(write_file(tmp_path, name, records)))
        assert (error.key, error.value) == ("task.label", "label")
        assert "not classes" in error.problem

    def test_lists_are_no_classes(self, tmp_path):
        records = [{"text": SECRET, "label": [SECRET]}, {"text": SECRET, "label": []}]
        assert failure(text_config(write_file(tmp_path, "data.jsonl", records))).key == "task.label"

    def test_one_label_is_nothing_to_learn(self, tmp_path):
        records = [{"text": SECRET, "label": 3}] * 2
        assert "the same label" in failure(text_config(write_file(tmp_path, "data.parquet", records))).problem

    def test_label_that_only_the_test_data_has_is_named(self, tmp_path):
        train = write_file(tmp_path, "train.csv", RECORDS)
        test = write_file(tmp_path, "test.csv", [{"text": SECRET, "label": 9}, {"text": SECRET, "label": 11}])
        config = text_config(train, test=test)
        names = label_names(read(config, "task.train", config.train), "label")
        with pytest.raises(UserError, match=r"'11' is not a label of the task.*task\.train; they have 9, 10") as error:
            label_indices(read(config, "task.test", config.test), "label", names)
        assert error.value.key == "task.test"
        assert "Miller" not in str(error.value)


class TestHub:
    """Ids go through `datasets.load_dataset`, here replaced by one that knows a data set in memory."""

    @pytest.fixture
    def asked(self, monkeypatch):
        import datasets

        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])}
        )

        def split(texts, labels):
            return datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features=features)

        splits = datasets.DatasetDict(
            {
                "train": split(["a", "b", "c"], [1, 0, 1]),
                "validation": split(["d"], [0]),
                "hidden": split([SECRET, SECRET], [-1, -1]),
            }
        )
        calls = []

        def load_dataset(identifier, configuration=None, *, split=None):
            calls.append((identifier, configuration, split))
            return splits if split is None else splits[split]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    def config(self, train="org/name", **keys):
        return text_config(train, text="sentence", **keys)

    def test_default_splits_are_train_and_validation_where_there_is_no_test(self, asked):
        assert texts_and_labels(self.config()) == ([["a", "b", "c"]], ["p", "n", "p"], ["n", "p"])
        assert read(self.config(), "task.test", "org/name").table.column("sentence").to_pylist() == ["d"]
        assert asked[0] == ("org/name", None, None)

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("glue:sst2[train]", ("glue", "sst2", "train")),
            ("org/na-me.2[train]", ("org/na-me.2", None, "train")),
            ("org/name:a-b_c", ("org/name", "a-b_c", None)),
        ],
    )
    def test_configuration_and_split_are_parsed_from_the_name(self, asked, name, call):
        texts_and_labels(self.config(name))
        assert asked == [call]

    def test_a_subset_of_a_data_set_is_read_in_its_own_order(self, monkeypatch):
        import datasets

        data = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": ["x", "y", "x"]}).select([2, 1])
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
        assert texts_and_labels(self.config("org/name[train]"))[0] == [["c", "b"]]

    def test_missing_column(self, asked):
        assert failure(text_config("org/name")).remedy == "the columns are: sentence, label"

    def test_withheld_labels(self, asked):
        error = failure(self.config("org/name[hidden]"))
        assert error.problem == "record 0 (counted from 0) has no label in column 'label'"
        assert "[validation]" in error.remedy

    def test_no_default_split_lists_the_splits(self, monkeypatch):
        import datasets

        only = datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"sentence": ["a"], "label": [0]})})
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: only)
        assert "org/name[dev]" in failure(self.config()).remedy

    @pytest.mark.parametrize("error", [ConnectionError(SECRET), ValueError(SECRET), FileNotFoundError(SECRET)])
    def test_what_the_hub_refuses_is_one_clear_error(self, monkeypatch, error):
        import datasets

        def load_dataset(*args, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        message = str(failure(self.config()))
        assert type(error).__name__ in message
        assert ".parquet" in message

    def test_without_the_package_the_remedy_is_to_install_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert failure(self.config()).remedy == 'check the path, or run pip install "lorica[hub]"'
