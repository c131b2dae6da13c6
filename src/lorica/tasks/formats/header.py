"""The names of a file's columns, before anything is known of a task."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from lorica.errors import UserError
from lorica.tasks.formats.paths import check_regular
from lorica.tasks.formats.text_files import check_text


def column_names(path: Path, key: str) -> list[str]:
    """The columns of a CSV or Parquet file, or the keys of the first record of a JSONL file.

    Args:
        key: what the user calls the file, for errors.

    Raises:
        UserError: the file is missing, of another format, or its beginning cannot be read.
    """
    check_regular(path, key)
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(path).names)
        if suffix in (".csv", ".jsonl", ".json"):
            check_text(path, key)
            with path.open(encoding="utf-8-sig", newline="") as lines:
                if suffix == ".csv":
                    return next(csv.reader(lines, strict=True))
                return list(json.loads(next(line for line in lines if line.strip())))
    except UserError:
        raise
    # pyarrow's and the parsers' own errors quote the file.
    except Exception:
        raise UserError(key, str(path), "its first record cannot be read", "create the file again") from None
    raise UserError(key, str(path), f"files that end in {suffix!r} are not supported", "give CSV, JSONL or Parquet")
