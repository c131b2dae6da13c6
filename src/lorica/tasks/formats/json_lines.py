"""JSONL files: one JSON object a line, read strictly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.errors import UserError
from lorica.tasks.formats.columns import check_columns, check_size
from lorica.tasks.formats.text_files import check_text

if TYPE_CHECKING:
    import pyarrow as pa

# Records that are Python objects at a time.
LINES = 65536
ONE_PER_LINE = "write one JSON object per line, as UTF-8"


def read_json_lines(path: Path, key: str, wanted: dict[str, str]) -> pa.Table:
    """Read the wanted columns; a key that a line lacks, null and NaN are nulls. Blank lines are skipped.

    Args:
        key: the configuration's key that names the file, for errors.
        wanted: columns, each with the configuration's key that names it.

    Raises:
        UserError: the file is not UTF-8 text; a line is not one JSON object, has a key twice, is nested too deeply, or
            has half of a surrogate pair; a column is missing or mixes types. Names the line.
    """
    import pyarrow as pa

    check_text(path, key)
    available: dict[str, None] = {}
    values: dict[str, list[Any]] = {column: [] for column in wanted}
    tables: list[pa.Table] = []
    records = size = 0

    def pack() -> None:
        """Arrow holds a tenth of what Python objects take."""
        arrays = {column: _array(values[column], column, column_key, path) for column, column_key in wanted.items()}
        tables.append(pa.table(arrays))
        for column in values.values():
            column.clear()

    # Not pyarrow's reader: it turns texts that look like dates into dates. Lines end at \n alone.
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _record(line, number, path, key)
            available.update(dict.fromkeys(record))
            for column in wanted:
                value = record.get(column)
                values[column].append(None if isinstance(value, float) and math.isnan(value) else value)
            records, size = records + 1, size + len(line)
            check_size(path, key, records, size)
            if records % LINES == 0:
                pack()
    if not available:
        raise UserError(key, str(path), "it has no records", "write one JSON object per line")
    check_columns(list(available), path.name, wanted)
    pack()
    return pa.table({column: _joined(tables, column, column_key, path) for column, column_key in wanted.items()})


class _KeyTwice(Exception):
    pass


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: says, in words that quote nothing, why it is not one that can be used.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError:
        raise ValueError("is not JSON") from None
    except _KeyTwice:
        raise ValueError("has a key twice") from None
    # Python reads no integer of more than 4,300 digits.
    except ValueError:
        raise ValueError("has a number of thousands of digits") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("has half of a surrogate pair, which is no character") from None
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _KeyTwice
    return found


def _record(line: str, number: int, path: Path, key: str) -> dict[str, Any]:
    try:
        record = loads(line)
    except ValueError as error:
        problem = f"line {number} {error}".replace("is not JSON", "is not a JSON object")
        raise UserError(key, str(path), problem, ONE_PER_LINE) from None
    if not isinstance(record, dict):
        raise UserError(key, str(path), f"line {number} is not a JSON object", ONE_PER_LINE)
    return record


def _array(values: list[Any], column: str, key: str, path: Path) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        raise _mixed(key, column, path) from None


def _joined(tables: list[pa.Table], column: str, key: str, path: Path) -> pa.ChunkedArray:
    """One column of all parts; an integer is a number with or without a point, and lists may have been empty."""
    import pyarrow as pa

    parts = [table.select([column]) for table in tables]
    kinds = {part.schema.field(0).type for part in parts} - {pa.null()}
    if any(map(pa.types.is_boolean, kinds)) and len(kinds) > 1:
        raise _mixed(key, column, path)
    try:
        return pa.concat_tables(parts, promote_options="permissive").column(column)
    except pa.ArrowException:
        raise _mixed(key, column, path) from None


def _mixed(key: str, column: str, path: Path) -> UserError:
    problem = f"column of {path.name} mixes types, or has values that are neither text nor 64-bit integers"
    return UserError(key, column, problem, "write all values as text, or all as integers")
