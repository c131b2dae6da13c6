"""From a source's name to its columns: local files, image folders, the Hugging Face hub, the embedded digits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.formats.columns import check_columns
from lorica.tasks.formats.csv_file import read_csv
from lorica.tasks.formats.image_folder import read_image_folder
from lorica.tasks.formats.json_lines import read_json_lines
from lorica.tasks.formats.parquet_file import names_images, read_parquet
from lorica.tasks.formats.paths import check_regular, local_path
from lorica.tasks.kind import TaskKind, kind_of

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = "a .csv, .jsonl, .json or .parquet file, an image folder, a Hugging Face dataset id or lorica:digits/train"
HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^\[\]:]+))?(\[(?P<split>.+)\])?")


@dataclass(frozen=True)
class Source:
    """The columns of one source, as read: no tokenizer and no model has seen them.

    Attributes:
        key: `task.train`, `task.test` or `task.test.NAME`.
        name: the source as the configuration spells it.
        table: the columns that the task needs, at least one row; no nulls, but for labels of a private source.
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


def read(
    config: TaskConfig,
    key: str,
    name: str,
    also: Mapping[str, str] | None = None,
    private: bool = False,
    inputs_only: bool = False,
) -> Source:
    """Read the columns that the task needs from a source; rows keep the source's order.

    Local sources never reach for the network.

    Args:
        key: `task.train`, `task.test` or `task.test.NAME`, for errors.
        name: the source, as the configuration has it under `key`.
        also: further columns, each with the configuration's key that names it.
        private: an owner's records on its own machine, which may lack labels (`Source.private`).
        inputs_only: read only what a prediction needs (`TaskKind.input_keys`).

    Raises:
        UserError: the source does not exist, is of no known kind, cannot be parsed or is empty; a column is missing;
            a record has no value in a column that the task needs.
    """
    path = local_path(name, key)
    kind = kind_of(config)
    wanted = (kind.input_keys() if inputs_only else kind.column_keys()) | dict(also or {})
    try:
        table = _read_table(config, kind, path, key, name, wanted)
        folder = path if path.is_dir() else path.parent
    except OSError as error:
        problem, remedy = f"it cannot be read ({error.strerror})", "check the path and its permissions"
        raise UserError(key, name, problem, remedy) from None
    source = Source(key, name, _plain(table, key, name), folder, private)
    _check_complete(source, optional={config.label} if private and kind.labels != "none" else set())
    return source


def named_images(config: TaskConfig, key: str, name: str) -> list[str]:
    """The image files that a table names, as it spells them; empty for a source that holds its images.

    Raises:
        UserError: as `read`.
    """
    path = local_path(name, key)
    suffix = path.suffix.lower()
    if "image" not in kind_of(config).columns or suffix not in READERS or not path.is_file():
        return []
    if suffix == ".parquet" and not names_images(path, config.image):
        return []
    table = READERS[suffix](path, key, {config.image: "task.image"})
    return [value for value in table.column(config.image).to_pylist() if isinstance(value, str)]


def _read_table(
    config: TaskConfig, kind: TaskKind, path: Path, key: str, name: str, wanted: dict[str, str]
) -> pa.Table:
    suffix = path.suffix.lower()
    if name.startswith("lorica:"):
        return _read_embedded(name, key, config, wanted)
    if path.is_dir():
        if "image" not in kind.columns:
            raise UserError(key, name, "it is a folder without data files", f"give {FORMATS}")
        found = read_image_folder(path, key, config.image, config.label)
        return found.select(check_columns(found.column_names, str(path), wanted))
    if suffix in READERS:
        check_regular(path, key)
        own = kind.read_file(path, key)
        if own is None:
            return READERS[suffix](path, key, wanted)
        return own.select(check_columns(own.column_names, path.name, wanted))
    if path.exists():
        raise UserError(key, name, f"files that end in {path.suffix!r} are not supported", f"give {FORMATS}")
    if match := HUB_ID.fullmatch(name):
        return _read_hub(match, key, wanted)
    raise UserError(key, name, "no such file or folder", f"give {FORMATS}")


def _plain(table: pa.Table, key: str, name: str) -> pa.Table:
    """The table with dictionaries written out, once its content is known to be what its types say."""
    import pyarrow as pa

    kinds = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in table.schema]
    columns = []
    for field, kind in zip(table.schema, kinds, strict=True):
        try:
            # Files may declare bytes to be text.
            table.column(field.name).validate(full=True)
            columns.append(table.column(field.name).cast(kind))
        except pa.ArrowException:
            problem = f"column {field.name!r} is damaged, or has text that is not encoded in UTF-8"
            raise UserError(key, name, problem, "create the file again") from None
    fields = [pa.field(field.name, kind) for field, kind in zip(table.schema, kinds, strict=True)]
    return pa.table(columns, schema=pa.schema(fields, metadata=table.schema.metadata))


def _check_complete(source: Source, optional: set[str]) -> None:
    if source.table.num_rows == 0:
        raise source.error("it has no records", "give a data set with at least one record")
    for name in source.table.column_names:
        column = source.table.column(name)
        if column.null_count and name not in optional:
            index = column.is_null().index(True).as_py()
            raise source.error(
                f"record {index} (counted from 0) has no value in column {name!r}",
                f"add the value or remove the record ({column.null_count} values are missing in this column)",
            )


READERS = {".csv": read_csv, ".jsonl": read_json_lines, ".json": read_json_lines, ".parquet": read_parquet}


def _read_embedded(name: str, key: str, config: TaskConfig, wanted: dict[str, str]) -> pa.Table:
    from lorica.tasks import digits

    split = name.removeprefix("lorica:digits/")
    if split not in ("train", "test"):
        raise UserError(key, name, "no such embedded data set", "use lorica:digits/train or lorica:digits/test")
    table = digits.table(split, config.image, config.label)
    return table.select(check_columns(table.column_names, name, wanted))


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
    columns = check_columns(loaded.column_names, name, wanted)
    table = loaded.select_columns(columns).with_format("arrow")[:]
    # Label names travel in the schema's metadata, as in the Parquet files that `datasets` writes.
    return table.replace_schema_metadata(loaded.features.arrow_schema.metadata)
