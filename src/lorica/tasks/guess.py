"""What a data file seems to be for: its task, its columns, its owners."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.errors import UserError
from lorica.registry import TASK_KINDS, registered, remedy_for_unknown
from lorica.tasks.formats.image_folder import IMAGE_SUFFIXES
from lorica.tasks.labels import INTEGER, NUMBER, is_text, sorted_names

if TYPE_CHECKING:
    import pyarrow as pa

MOST_LABELS = 50
LABELS = ("label", "labels", "target", "class", "category", "sentiment", "score", "rating", "stars", "y")
OWNERS = (
    "hospital",
    "clinic",
    "site",
    "bank",
    "branch",
    "institution",
    "organisation",
    "organization",
    "owner",
    "client",
)
PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence")),
    *(("text_a", "text_b"), ("one", "two")),
)
COMPLETIONS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))


def guess_task(
    table: pa.Table, task: str | None, text: list[str] | None, label: str | None, by: str | None
) -> dict[str, Any]:
    """The section `task` for a table of data, without its files.

    Args:
        task, text, label: what is known already.
        by: a column that says whose record it is, and is nothing to learn from.

    Raises:
        UserError: a column does not exist, or nothing says what to learn; names the option of `lorica init`.
    """
    import pyarrow as pa

    names = table.column_names
    for option, wanted in (
        ("--label", label),
        ("--by", by),
        *(("--text", one) for one in text or []),
    ):
        if wanted is not None and wanted not in names:
            raise UserError(option, wanted, "no such column", f"choose one of: {', '.join(names)}")
    if task is not None and task not in registered(TASK_KINDS):
        remedy = remedy_for_unknown(task, registered(TASK_KINDS))
        raise UserError("--task", task, "no such kind of task", remedy)
    found = task
    if found in (None, "question-answering") and {"question", "context", "answers"} <= set(names):
        return {"type": "question-answering", "max_length": 384, "stride": 128}
    talks = [name for name in names if pa.types.is_nested(table.column(name).type) and _is_talk(table, name)]
    pair = next((list(two) for two in COMPLETIONS if set(two) <= set(names)), None)
    if found == "language-modelling" or (found is None and label is None and (talks or pair)):
        columns = text or talks[:1] or pair or [_longest(table, [])]
        return {"type": "language-modelling", "text": columns, "max_length": _length(table, columns, 1024)}
    label = label or next((name for name in LABELS if name in names), None)
    if label is None:
        problem = f"none of its columns is called {', '.join(LABELS[:4])}, …: {', '.join(names)}"
        raise UserError("--label", None, problem, "name the column to predict: --label COLUMN")
    image = next((name for name in names if name != label and _is_image(table, name)), None)
    if found == "image-classification" or (found is None and image is not None and text is None):
        labels = {"labels": _labels(table, label)} if _labels(table, label) else {}
        return {"type": "image-classification", "image": image or "image", "label": label} | labels
    others = [name for name in names if name not in (label, by)]
    columns = text or next((list(two) for two in PAIRS if set(two) <= set(others)), None) or [_longest(table, [label])]
    section = {"text": columns, "label": label, "max_length": _length(table, columns, 512)}
    if found == "text-regression" or (found is None and _is_number(table, label)):
        return {"type": "text-regression"} | section
    labels = {"labels": _labels(table, label)} if _labels(table, label) else {}
    return {"type": "text-classification"} | section | labels


def guess_owners(table: pa.Table) -> str | None:
    """A column whose name says that it holds the owner of each record."""
    return next((name for name in OWNERS if name in table.column_names), None)


def texts_of(table: pa.Table, column: str, most: int = 10_000) -> list[str]:
    return [str(value) for value in table.column(column).slice(0, most).to_pylist() if value is not None]


def _is_talk(table: pa.Table, column: str) -> bool:
    first = table.column(column).slice(0, 1).to_pylist()
    return bool(first and isinstance(first[0], list) and first[0] and {"role", "content"} <= set(first[0][0]))


def _is_image(table: pa.Table, column: str) -> bool:
    import pyarrow as pa

    kind = table.column(column).type
    if pa.types.is_struct(kind):
        return "bytes" in {field.name for field in kind}
    if not is_text(kind):
        return str(kind) in ("binary", "large_binary", "binary_view")
    texts = texts_of(table, column, 100)
    return bool(texts) and all(Path(text).suffix.lower() in IMAGE_SUFFIXES for text in texts)


def _is_number(table: pa.Table, column: str) -> bool:
    """Whether a column holds numbers of which some are not integers, so that they are no classes."""
    texts = set(texts_of(table, column))
    return all(map(NUMBER.fullmatch, texts)) and not all(map(INTEGER.fullmatch, texts))


def _labels(table: pa.Table, column: str) -> list[str]:
    """The labels' names; none where there are too many to list, or the file declares them itself."""
    if b"huggingface" in (table.schema.metadata or {}):
        return []
    distinct = {str(value) for value in table.column(column).unique().to_pylist() if value is not None}
    return sorted_names(distinct) if 2 <= len(distinct) <= MOST_LABELS else []


def _longest(table: pa.Table, without: list[str]) -> str:
    """The column of text with the longest texts."""
    columns = [name for name in table.column_names if name not in without and is_text(table.column(name).type)]
    lengths = {name: sum(map(len, texts_of(table, name, 1000))) for name in columns}
    if not lengths:
        problem = f"no other column holds text: {', '.join(table.column_names)}"
        raise UserError("--text", None, problem, "give data with a column of text, or name the column: --text COLUMN")
    longest: str = max(lengths, key=lambda name: lengths[name])
    return longest


def _length(table: pa.Table, columns: list[str], most: int) -> int:
    """Tokens for 95 % of the texts, at about 1.5 a word, as a multiple of 32."""
    rows = zip(*(texts_of(table, column) for column in columns), strict=False)
    words = sorted(sum(len(text.split()) for text in row) for row in rows)
    usual = words[int(0.95 * (len(words) - 1))] if words else 0
    return min(most, 32 * math.ceil((1.5 * usual + 4) / 32))
