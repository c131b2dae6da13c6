"""From a source's name to its columns: local files, image folders, the Hugging Face hub, the embedded digits."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.kind import kind_of

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMATS = "a .csv, .jsonl, .json or .parquet file, an image folder, a Hugging Face dataset id or lorica:digits/train"
LINES = 65536
HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^\[\]:]+))?(\[(?P<split>.+)\])?")


@dataclass(frozen=True)
class Source:
    """The columns of one source, as read: no tokenizer and no model has seen them.

    Attributes:
        key: `task.train`, `task.test` or `task.test.NAME`.
        name: the source as the configuration spells it.
        table: the columns that the task needs, at least one row, no nulls.
        folder: what relative image paths are relative to.
        private: an owner's records on its own machine. Whether one has a certain label is not for an error to tell.
    """

    key: str
    name: str
    table: pa.Table
    folder: Path
    private: bool = False

    def error(self, problem: str, remedy: str) -> UserError:
        """A mistake in this source."""
        return UserError(self.key, self.name, problem, remedy)


def read(config: TaskConfig, key: str, name: str, also: Mapping[str, str] | None = None) -> Source:
    """Read the columns that the task needs from a source; rows keep the source's order.

    Local sources never reach for the network.

    Args:
        key: `task.train`, `task.test` or `task.test.NAME`, for errors.
        name: the source, as the configuration has it under `key`.
        also: further columns, each with the configuration's key that names it.

    Raises:
        UserError: the source does not exist, is of no known kind, cannot be parsed or is empty; a column is missing;
            a record has no value in a column that the task needs.
    """
    path = Path(name).expanduser()
    folder = path.parent
    kind = kind_of(config)
    wanted = kind.column_keys() | dict(also or {})
    if name.startswith("lorica:"):
        table = _read_embedded(name, key, config, wanted)
    elif path.is_dir():
        table = _read_image_folder(path, key, config, wanted)
        folder = path
    elif path.suffix.lower() in READERS:
        if not path.is_file():
            raise UserError(key, name, "no such file", f"give {FORMATS}")
        own = kind.read_file(path, key)
        if own is None:
            table = READERS[path.suffix.lower()](path, key, wanted)
        else:
            table = own.select(_check_columns(own.column_names, path.name, wanted))
    elif path.is_file():
        raise UserError(key, name, f"files that end in {path.suffix!r} are not supported", f"give {FORMATS}")
    elif match := HUB_ID.fullmatch(name):
        table = _read_hub(match, key, wanted)
    else:
        raise UserError(key, name, "no such file or folder", f"give {FORMATS}")
    source = Source(key, name, _without_dictionaries(table), folder)
    _check_complete(source)
    return source


def _check_columns(available: list[str], name: str, wanted: dict[str, str]) -> list[str]:
    """The wanted columns, once each of them is known to be among the available ones, and only once."""
    for column, key in wanted.items():
        if column not in available:
            nearest = difflib.get_close_matches(column, available, n=1, cutoff=0.5)
            question = f"did you mean {nearest[0]!r}? The columns are" if nearest else "the columns are"
            raise UserError(key, column, f"no such column in {name}", f"{question}: {', '.join(available)}")
        if available.count(column) > 1:
            raise UserError(key, column, f"{name} has several columns with this name", "rename all but one of them")
    return list(wanted)


def _without_dictionaries(table: pa.Table) -> pa.Table:
    import pyarrow as pa

    kinds = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in table.schema]
    fields = [pa.field(name, kind) for name, kind in zip(table.column_names, kinds, strict=True)]
    return table.cast(pa.schema(fields, metadata=table.schema.metadata))


def _check_complete(source: Source) -> None:
    if source.table.num_rows == 0:
        raise source.error("it has no records", "give a data set with at least one record")
    for name in source.table.column_names:
        column = source.table.column(name)
        if column.null_count:
            index = column.is_null().index(True).as_py()
            raise source.error(
                f"record {index} (counted from 0) has no value in column {name!r}",
                f"add the value or remove the record ({column.null_count} values are missing in this column)",
            )


def _read_csv(path: Path, key: str, wanted: dict[str, str]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv

    convert = csv.ConvertOptions(
        # Types are not guessed: a text may look like a number or a date.
        column_types=dict.fromkeys(wanted, pa.string()),
        # An empty cell is a missing value; "" in quotes is an empty text, and NA or null are texts like any other.
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    try:
        table = csv.read_csv(
            path,
            # Parsing errors carry a row number only where one thread reads.
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        )
    except pa.ArrowInvalid as error:
        if "Empty CSV file" in str(error):
            raise UserError(key, str(path), "the file is empty", "give a CSV file with a header line") from None
        # The parser's own message quotes the row.
        row = re.search(r"Row #(\d+)", str(error))
        place = f" at row {row[1]} (the header is row 1)" if row else ""
        remedy = "quote cells that hold a comma, a quote or a line break, and encode the file as UTF-8"
        raise UserError(key, str(path), f"not a readable CSV file{place}", remedy) from None
    if not wanted.keys() & set(table.column_names):
        # Without a header, the first line is a record: it must not be listed as the columns' names.
        raise UserError(
            key,
            str(path),
            f"its first line contains none of the columns {', '.join(map(repr, wanted))}",
            f"start the file with a line of column names, and set {' and '.join(dict.fromkeys(wanted.values()))} to "
            "the columns of the task",
        )
    return table.select(_check_columns(table.column_names, path.name, wanted))


def _read_json_lines(path: Path, key: str, wanted: dict[str, str]) -> pa.Table:
    import pyarrow as pa

    available: dict[str, None] = {}
    values: dict[str, list[Any]] = {column: [] for column in wanted}
    chunks: dict[str, list[pa.Array]] = {column: [] for column in wanted}

    def pack() -> None:
        """Arrow holds a tenth of what Python objects take."""
        for column, column_key in wanted.items():
            try:
                chunks[column].append(pa.array(values[column]))
            except (ValueError, TypeError, OverflowError):
                raise _mixed(column_key, column, path) from None
            values[column].clear()

    # Not pyarrow's reader: it turns texts that look like dates into dates.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                problem = f"line {number} is not a JSON object"
                raise UserError(key, str(path), problem, "write one JSON object per line, as UTF-8")
            available.update(dict.fromkeys(record))
            for column in wanted:
                values[column].append(record.get(column))
            if number % LINES == 0:
                pack()
    if not available:
        raise UserError(key, str(path), "it has no records", "write one JSON object per line")
    _check_columns(list(available), path.name, wanted)
    pack()
    arrays = {}
    for column, column_key in wanted.items():
        kinds = {chunk.type for chunk in chunks[column] if not pa.types.is_null(chunk.type)}
        if kinds == {pa.int64(), pa.float64()}:
            kinds = {pa.float64()}
        if len(kinds) > 1:
            raise _mixed(column_key, column, path)
        kind = kinds.pop() if kinds else pa.null()
        arrays[column] = pa.chunked_array([chunk.cast(kind) for chunk in chunks[column]], type=kind)
    return pa.table(arrays)


def _mixed(key: str, column: str, path: Path) -> UserError:
    problem = f"column of {path.name} mixes types, or has values that are neither text nor 64-bit integers"
    return UserError(key, column, problem, "write all values as text, or all as integers")


def _read_parquet(path: Path, key: str, wanted: dict[str, str]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        available = parquet.read_schema(path).names
        columns = _check_columns(available, path.name, wanted)
        # `columns` may also match fields inside other columns, whose names hold dots.
        return parquet.read_table(path, columns=columns, partitioning=None).select(columns)
    except (pa.ArrowException, OSError):
        raise UserError(key, str(path), "not a readable Parquet file", "create the file again") from None


READERS = {".csv": _read_csv, ".jsonl": _read_json_lines, ".json": _read_json_lines, ".parquet": _read_parquet}


def _read_image_folder(path: Path, key: str, config: TaskConfig, wanted: dict[str, str]) -> pa.Table:
    """`FOLDER/label/image`, and Tiny-ImageNet's layouts: `FOLDER/label/images/image`, and `FOLDER/images/image` with
    the labels in `val_annotations.txt`.
    """
    import pyarrow as pa

    annotations = path / "val_annotations.txt"
    if annotations.is_file():
        lines = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines() if line.strip()]
        wrong = next((number for number, fields in enumerate(lines, start=1) if len(fields) < 2), None)
        if wrong is not None:
            problem = f"line {wrong} of {annotations.name} is not an image and its label, separated by a tab"
            raise UserError(key, str(path), problem, f"correct {annotations}")
        labelled = [(f"images/{fields[0]}", fields[1]) for fields in lines]
    else:
        files = [file for pattern in ("*/*", "*/images/*") for file in path.glob(pattern) if _is_image(file, path)]
        named = [file.relative_to(path) for file in sorted(files)]
        labelled = [(str(name), name.parts[0]) for name in named]
    if not labelled:
        layout = f"FOLDER/label/image, where the image ends in {', '.join(sorted(IMAGE_SUFFIXES))}"
        raise UserError(key, str(path), "no images in the subfolders of this folder", f"arrange the images as {layout}")
    names, labels = zip(*labelled, strict=True)
    table = pa.table({config.image: list(names), config.label: list(labels)})
    return table.select(_check_columns(table.column_names, str(path), wanted))


def _is_image(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _read_embedded(name: str, key: str, config: TaskConfig, wanted: dict[str, str]) -> pa.Table:
    from lorica.tasks import digits

    split = name.removeprefix("lorica:digits/")
    if split not in ("train", "test"):
        raise UserError(key, name, "no such embedded data set", "use lorica:digits/train or lorica:digits/test")
    table = digits.table(split, config.image, config.label)
    return table.select(_check_columns(table.column_names, name, wanted))


def _read_hub(match: re.Match[str], key: str, wanted: dict[str, str]) -> pa.Table:
    name, identifier, split = match[0], match["id"], match["split"]
    try:
        import datasets
    except ImportError:
        problem = "no such file or folder, and the package `datasets` for Hugging Face datasets is not installed"
        raise UserError(key, name, problem, 'check the path, or run pip install "lorica[hub]"') from None
    try:
        loaded = datasets.load_dataset(identifier, match["config"], split=split)
    # The library raises errors of a dozen types, from its own to its HTTP client's, and some quote records.
    except Exception as error:
        raise UserError(
            key,
            name,
            f"no such file or folder, and it cannot be loaded from the Hugging Face hub ({type(error).__name__})",
            "check the network and the id (ID, ID:CONFIG or ID[SPLIT]), or download the data set and give a local "
            ".csv, .jsonl or .parquet file",
        ) from None
    if split is None:
        preferred = ["train"] if key == "task.train" else ["test", "validation"]
        found = [candidate for candidate in preferred if candidate in loaded]
        if not found:
            problem = f"it has no split {' or '.join(preferred)}"
            raise UserError(key, name, problem, f"choose one of its splits: {identifier}[{'|'.join(loaded)}]")
        loaded = loaded[found[0]]
    columns = _check_columns(loaded.column_names, name, wanted)
    table = loaded.select_columns(columns).with_format("arrow")[:]
    # Label names travel in the schema's metadata, as in the Parquet files that `datasets` writes.
    return table.replace_schema_metadata(loaded.features.arrow_schema.metadata)
