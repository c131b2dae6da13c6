"""Training data of several owners: one file each, or one column that says whose record it is."""

from __future__ import annotations

import glob
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.formats.image_folder import has_images
from lorica.tasks.formats.paths import local_path
from lorica.tasks.kind import kind_of
from lorica.tasks.labels import declared_features, is_text, sorted_names
from lorica.tasks.readers import READERS, Source, read
from lorica.tasks.records import Owners

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


def read_training(
    config: TaskConfig, by: str | None = None, group: str | None = None, private: bool = False
) -> tuple[Source, Owners]:
    """Read all sources that `task.train` names as one, and whose records are whose.

    Args:
        by: the column that says whose record it is; owners are its values, sorted, by value if all are integers. By
            default every source is an owner, in order.
        group: one more column to read, `privacy.group`.
        private: the records are those of an owner on its own machine (`Source.private`).

    Raises:
        UserError: as `read`, for each source; no source matches; a source is named twice; columns of the same name hold
            different types; the column `by` holds neither text, integers nor booleans.
    """
    names = source_names(config.train)
    also = {column: key for column, key in ((by, "federation.by"), (group, "privacy.group")) if column is not None}
    sources = [read(config, "task.train", name, also, private) for name in names]
    joined = sources[0] if len(sources) == 1 else _join(sources, config)
    if by is not None:
        return joined, _owners_of(joined, by)
    sizes = [source.table.num_rows for source in sources]
    return joined, Owners(names, np.repeat(np.arange(len(names)), sizes))


def source_names(train: str | list[str]) -> list[str]:
    """The sources that `task.train` names: of a list each, of a pattern its matches, of a folder its data files.

    Matches and files are sorted by name. A folder with images in its subfolders is one source, and so is anything that
    is neither a pattern (`*`, `?`) nor a folder.

    Raises:
        UserError: the list is empty, a source is in it twice, or nothing matches the pattern.
    """
    if isinstance(train, list):
        if not train:
            raise UserError("task.train", train, "it is empty", "give at least one source")
        if len({os.path.realpath(local_path(name, "task.train")) for name in train}) < len(train):
            raise UserError("task.train", train, "it contains a source twice", "give each source once")
        return train
    path = local_path(train, "task.train")
    try:
        return _of_folder_or_pattern(path, train)
    except OSError as error:
        problem, remedy = f"it cannot be read ({error.strerror})", "check the path and its permissions"
        raise UserError("task.train", train, problem, remedy) from None


def _of_folder_or_pattern(path: Path, train: str) -> list[str]:
    if path.is_dir() and not has_images(path):
        seen = [file for file in path.iterdir() if file.name[0] != "." and not _is_own(file.name)]
        files = [file for file in seen if file.suffix.lower() in READERS]
        if files and len(files) < len(seen):
            others = sorted(file.name for file in seen if file not in files)
            logger.warning("%s: skipped %d other files or folders, such as %s", path.name, len(others), others[0])
        return sorted(map(str, files)) or [train]
    if not path.exists() and ("*" in train or "?" in train):
        found = sorted(match for match in glob.glob(str(path)) if not _is_own(match))
        if not found:
            raise UserError("task.train", train, "no file matches this pattern", "check the folder and the pattern")
        return found
    return [train]


def first_source(train: str | list[str]) -> Path:
    """What the ledger lies beside: the source or the folder of sources, or else the first of several sources."""
    if isinstance(train, str) and Path(train).expanduser().is_dir():
        return Path(train).expanduser()
    return Path(source_names(train)[0]).expanduser()


def _is_own(name: str) -> bool:
    """Whether Lorica writes such a file beside the data."""
    return ".ledger.sqlite" in name or name.endswith(".private-metrics.jsonl")


def _join(sources: list[Source], config: TaskConfig) -> Source:
    """One source with the records of all, in order; paths of images become absolute where folders differ."""
    import pyarrow as pa

    first = sources[0]
    one_folder = len({source.folder.absolute() for source in sources}) == 1
    has_paths = "image" in kind_of(config).columns and not one_folder
    tables = [_with_absolute_paths(source, config.image) if has_paths else source.table for source in sources]
    for source, table in zip(sources, tables, strict=True):
        if declared_features(source) != declared_features(first):
            problem = f"its declared features (such as label names) differ from those of {first.name}"
            raise source.error(problem, "write both files from the same data set, or remove the declared features")
        for column in table.column_names:
            kind, expected = table.schema.field(column).type, tables[0].schema.field(column).type
            if is_text(kind) != is_text(expected):
                problem = f"its column {column!r} holds {kind}, but that of {first.name} holds {expected}"
                raise source.error(problem, "write the column with the same type in all files")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        problem = "columns with the same name have different types"
        raise UserError(
            "task.train", config.train, problem, "write each column with the same type in all files"
        ) from None
    return Source(first.key, f"{first.name} and {len(sources) - 1} more", table, first.folder, first.private)


def _with_absolute_paths(source: Source, column: str) -> pa.Table:
    import pyarrow as pa

    table = source.table
    if not is_text(table.schema.field(column).type):
        return table
    paths = [str(source.folder.absolute() / path) for path in table.column(column).to_pylist()]
    return table.set_column(table.column_names.index(column), column, pa.array(paths, pa.string()))


def _owners_of(source: Source, by: str) -> Owners:
    import pyarrow as pa

    column = source.table.column(by)
    if not (is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        problem = f"the column of {source.name} holds {column.type}, which cannot identify owners"
        raise UserError("federation.by", by, problem, "choose a column of text or integers")
    values = column.cast(pa.large_string()).to_pylist()
    names = sorted_names(set(values))
    position = {name: index for index, name in enumerate(names)}
    return Owners(names, np.array([position[value] for value in values], dtype=np.int64))
