"""Parquet files: the needed columns alone, and never more than fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.errors import UserError
from lorica.tasks.formats.columns import check_columns, check_size

if TYPE_CHECKING:
    import pyarrow as pa

# What is decoded at a time: a value that is stored once may stand in any number of rows.
PIECE = 64 * 2**20
FEWEST_ROWS, MOST_ROWS = 64, 65536


def names_images(path: Path, column: str) -> bool:
    """Whether a column of images holds their paths; false, too, if the file is damaged or has no such column."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        kind = parquet.read_schema(path).field(column).type
    except (KeyError, pa.ArrowException, OSError):
        return False
    return str(kind) in ("string", "large_string", "string_view")


def read_parquet(path: Path, key: str, wanted: dict[str, str]) -> pa.Table:
    """Read the wanted columns, piece by piece, so that a file that expands without bound is refused in time.

    Args:
        key: the configuration's key that names the file, for errors.
        wanted: columns, each with the configuration's key that names it.

    Raises:
        UserError: the file is damaged or no Parquet, a column is missing, or there is more than a run could use.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = check_columns(schema.names, path.name, wanted)
            _check_stored(file, path, key, columns)
            pieces, waiting, size, records = [], [], 0, 0
            for group in range(file.num_row_groups):
                rows = _rows_at_a_time(file.metadata.row_group(group), columns)
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                    # `columns` may also match fields inside other columns, whose names hold dots.
                    waiting.append(_decoded(batch.select(columns)))
                    records, size = records + batch.num_rows, size + waiting[-1].nbytes
                    check_size(path, key, records, size)
                    if sum(one.num_rows for one in waiting) >= MOST_ROWS or waiting[-1].nbytes >= PIECE // 4:
                        pieces.append(pa.Table.from_batches(waiting).combine_chunks())
                        waiting = []
            if waiting:
                pieces.append(pa.Table.from_batches(waiting).combine_chunks())
            kept = pa.schema([schema.field(column) for column in columns])
            table = pa.concat_tables(pieces) if pieces else kept.empty_table()
            return table.replace_schema_metadata(schema.metadata)
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError):
        raise UserError(key, str(path), "not a readable Parquet file", "create the file again") from None


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with dictionaries written out, so that its size is what it takes."""
    import pyarrow as pa

    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _leaves(group: Any, columns: list[str]) -> list[Any]:
    every = [group.column(index) for index in range(group.num_columns)]
    return [leaf for leaf in every if any(leaf.path_in_schema.split(".")[0] == name.split(".")[0] for name in columns)]


def _check_stored(file: Any, path: Path, key: str, columns: list[str]) -> None:
    """What the file says of itself; it may expand further."""
    metadata = file.metadata
    size = values = 0
    for number in range(metadata.num_row_groups):
        for leaf in _leaves(metadata.row_group(number), columns):
            size, values = size + leaf.total_uncompressed_size, values + leaf.num_values
    check_size(path, key, metadata.num_rows, max(size, 8 * values))


def _rows_at_a_time(group: Any, columns: list[str]) -> int:
    """So many that no more than `PIECE` bytes come of them if each value is the largest that there can be."""
    largest = max((leaf.total_uncompressed_size for leaf in _leaves(group, columns)), default=1)
    return int(min(MOST_ROWS, max(FEWEST_ROWS, PIECE // max(largest, 1))))
