"""CSV files, read strictly: a quotation mark that is not closed must not join lines in silence."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lorica.errors import UserError
from lorica.tasks.formats.columns import check_columns, check_size
from lorica.tasks.formats.text_files import check_text

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

QUOTE = (
    "put every cell that contains a quotation mark, a comma or a line break in quotation marks, and write each "
    'quotation mark inside it twice ("")'
)
LABEL_KEY = "task.label"
# More distinct ones are no labels.
MOST_LABELS = 10_000
SMALLEST_BLOCK = 2**20
LARGEST_BLOCK = 2**31 - 1


def read_csv(path: Path, key: str, wanted: dict[str, str]) -> pa.Table:
    """Read the wanted columns as text; an empty cell is a null, and `""` an empty text.

    Two parsers read the file: Python's, in strict mode, finds what is wrong and in which line; Arrow's gives the
    values, since it alone tells an empty cell from `""`. They must agree on the number of records.

    Args:
        key: the configuration's key that names the file, for errors.
        wanted: columns, each with the configuration's key that names it.

    Raises:
        UserError: the file is not UTF-8 text; a quotation mark is not closed, or joins lines that are records; a record
            has too many or too few cells; a column is missing. Names the line.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow

    check_text(path, key)
    layout = _checked_layout(path, key, wanted)
    convert = arrow.ConvertOptions(
        # Types are not guessed: a text may look like a number or a date.
        column_types=dict.fromkeys(wanted, pa.string()),
        include_columns=check_columns(layout.header, path.name, wanted),
        # An empty cell is a missing value; "" in quotes is an empty text, and NA or null are texts like any other.
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    try:
        table = arrow.read_csv(
            path,
            # A record must fit in a block; a character has up to four bytes.
            read_options=arrow.ReadOptions(
                use_threads=False, block_size=min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 8 * layout.longest))
            ),
            parse_options=arrow.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        )
    # The parser's own message quotes the row.
    except pa.ArrowInvalid:
        raise UserError(key, str(path), "not a readable CSV file", QUOTE) from None
    if table.num_rows != layout.records:
        problem = f"it can be read as {layout.records} records or as {table.num_rows}"
        raise UserError(key, str(path), problem, QUOTE)
    return table.select(list(wanted))


@dataclass
class _Layout:
    """What a file holds.

    Attributes:
        longest: characters of the longest record, line breaks included.
    """

    header: list[str]
    records: int = 0
    longest: int = 0


@dataclass
class _Joined:
    """Records of several lines, and which of them look like several records that a stray mark has joined.

    Attributes:
        column: the place of the label; None where there is none.
        labels: those of records of one line.
        suspects: first and last line of a record, and what would be the labels of its lines from the second on.
    """

    width: int
    column: int | None
    first: int | None = None
    count: int = 0
    labels: set[str] = field(default_factory=set)
    suspects: list[tuple[int, int, set[str]]] = field(default_factory=list)

    def add(self, row: list[str], lines: list[str], first: int) -> None:
        """Take note of a record."""
        if len(lines) == 1:
            if self.column is not None and len(self.labels) < MOST_LABELS:
                self.labels.add(row[self.column])
            return
        self.first = self.first or first
        self.count += 1
        if self.column is None:
            return
        apart = [next(csv.reader([line], quoting=csv.QUOTE_NONE), []) for line in lines]
        if all(len(cells) == self.width for cells in apart):
            own = {cells[self.column].strip('"') for cells in apart[1:]}
            self.suspects.append((first, first + len(lines) - 1, own))

    def error(self, path: Path, key: str) -> UserError | None:
        """The first record whose every line would by itself be a record with a label that others have."""
        for first, last, labels in self.suspects:
            if labels <= self.labels:
                problem = (
                    f"a quotation mark joins lines {first} to {last} to one record, although each of these lines is "
                    "like a record of its own"
                )
                return UserError(key, str(path), problem, QUOTE)
        return None


class _Lines:
    """The lines of a file; `current` are those since it was last cleared."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.current: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.current.append(line)
            yield line


def _checked_layout(path: Path, key: str, wanted: dict[str, str]) -> _Layout:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_cells():
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        rows = _rows(reader, path, key)
        header = next(rows, (0, []))[1]
        if not header:
            raise UserError(key, str(path), "the file is empty", "give a CSV file with a header line")
        _check_header(header, path, key, wanted)
        lines.current.clear()
        labels = [column for column, column_key in wanted.items() if column_key == LABEL_KEY and column in header]
        joined = _Joined(len(header), header.index(labels[0]) if labels else None)
        layout, size = _Layout(header), 0
        for first, row in rows:
            if row:
                if len(row) != len(header):
                    problem = f"line {first} has {len(row)} cells, but the header has {len(header)}"
                    raise UserError(key, str(path), problem, QUOTE)
                joined.add(row, lines.current, first)
                layout.records += 1
                characters = sum(map(len, lines.current))
                layout.longest = max(layout.longest, characters)
                size += characters
                check_size(path, key, layout.records, size)
            lines.current.clear()
    wrong = joined.error(path, key)
    if wrong is not None:
        raise wrong
    if joined.count:
        logger.warning(
            "%s: %d records contain line breaks; the first of them begins in line %d",
            path.name,
            joined.count,
            joined.first,
        )
    return layout


def _rows(reader: object, path: Path, key: str) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line that it begins in, counted from 1."""
    first = 1
    try:
        for row in reader:  # type: ignore[attr-defined]
            yield first, row
            first = reader.line_num + 1  # type: ignore[attr-defined]
    # Two messages: after a closing mark the cell goes on, or the file ends before one.
    except csv.Error as error:
        last = reader.line_num  # type: ignore[attr-defined]
        if "end of data" in str(error):
            problem = f"the quotation mark that opens a cell in line {first} is never closed"
        elif first == last:
            problem = f"line {first} has a cell that goes on after its closing quotation mark"
        else:
            problem = f"the quotation mark that opens a cell in line {first} closes in the middle of line {last}"
        raise UserError(key, str(path), problem, QUOTE) from None


def _check_header(header: list[str], path: Path, key: str, wanted: dict[str, str]) -> None:
    if wanted.keys() & set(header):
        return
    names = ", ".join(map(repr, wanted))
    # Without a header, the first line is a record: it must not be listed as the columns' names.
    separators = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    other = next((word for mark, word in separators.items() if wanted.keys() & set(header[0].split(mark))), None)
    if len(header) == 1 and other is not None:
        raise UserError(key, str(path), f"its cells are separated by {other}", "save it with commas between the cells")
    raise UserError(
        key,
        str(path),
        f"its first line contains none of the columns {names}",
        f"start the file with a line of column names, and set {' and '.join(dict.fromkeys(wanted.values()))} to "
        "the columns of the task",
    )


@contextmanager
def _long_cells() -> Iterator[None]:
    """Python's parser refuses cells of more than 131,072 characters by default."""
    before = csv.field_size_limit(LARGEST_BLOCK)
    try:
        yield
    finally:
        csv.field_size_limit(before)
