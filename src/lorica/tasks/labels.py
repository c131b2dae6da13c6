"""Labels: from a column of names or integers to positions in the list of label names."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np

from lorica.errors import UserError
from lorica.tasks.readers import Source

if TYPE_CHECKING:
    import pyarrow as pa

INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


# Cross entropy ignores it: the loss is zero, and so is the gradient.
UNKNOWN = -100


def label_names(source: Source, column: str) -> list[str]:
    """The names of all labels of a training source.

    The names that the source declares (the `ClassLabel` feature of Hugging Face datasets) in their order; otherwise
    the distinct labels as text, sorted, by value if all are integers.

    Raises:
        UserError: the column holds no classes, or fewer than two of them.
    """
    distinct = set(label_texts(source, column).unique().to_pylist())
    if len(distinct) < 2:
        raise UserError(
            "task.label",
            column,
            f"all records of {source.name} have the same label",
            "give training data with at least two labels",
        )
    declared = _declared_names(source.table, column)
    if declared is not None:
        return declared
    if all(map(INTEGER.fullmatch, distinct)):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def label_indices(source: Source, column: str, names: list[str]) -> np.ndarray:
    """(n,) int64: the position in `names` of each record's label.

    In a private source, a label that is not in `names` is `UNKNOWN`: an error, or its absence, would tell a server who
    chose the names whether the label occurs.

    Raises:
        UserError: the column holds no classes, or a label that is not in `names`.
    """
    import pyarrow as pa
    from pyarrow import compute

    texts = label_texts(source, column)
    indices = compute.index_in(texts, value_set=pa.array(names, pa.large_string()))
    if source.private:
        known: np.ndarray = indices.fill_null(UNKNOWN).to_numpy().astype(np.int64)
        return known
    unknown = sorted(set(texts.filter(compute.is_null(indices)).unique().to_pylist()))
    if unknown:
        raise source.error(
            f"{unknown[0]!r} is not a label of the task",
            f"remove the records with this label, or add it to task.labels or task.train; they have {_listed(names)}",
        )
    found: np.ndarray = indices.to_numpy().astype(np.int64)
    return found


def label_numbers(source: Source, column: str) -> np.ndarray:
    """(n,) float32: the numbers of a column, which a CSV file has as text.

    In a private source, what is not a finite number is NaN, so that the record's gradient is NaN and contributes zero.

    Raises:
        UserError: the column holds no numbers; names the record by its index.
    """
    import pyarrow as pa

    values = source.table.column(column)
    if is_text(values.type):
        texts = values.to_pylist()
        wrong = next((index for index, text in enumerate(texts) if not NUMBER.fullmatch(text.strip())), None)
        if source.private:
            return np.array([float(text) if NUMBER.fullmatch(text.strip()) else np.nan for text in texts], np.float32)
        if wrong is not None:
            raise source.error(
                f"record {wrong} (counted from 0) has no number in column {column!r}", "correct or remove the record"
            )
        return np.array([float(text) for text in texts], dtype=np.float32)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        problem = f"the column of {source.name} holds {values.type}, not numbers"
        raise UserError("task.label", column, problem, "choose a column of numbers")
    numbers: np.ndarray = values.to_numpy().astype(np.float32)
    if source.private:
        return numbers
    if not np.isfinite(numbers).all():
        index = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise source.error(
            f"record {index} (counted from 0) has no finite number in column {column!r}", "correct or remove the record"
        )
    return numbers


def label_texts(source: Source, column: str) -> pa.ChunkedArray:
    """Each record's label as text (large_string).

    Raises:
        UserError: the column holds something else than text, integers or booleans, or numbers written as text that
            are not all integers; a label lies outside the names that the source declares.
    """
    import pyarrow as pa

    values = source.table.column(column)
    kind = values.type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise _not_classes(source, column, f"holds {kind}")
    declared = _declared_names(source.table, column)
    if declared is not None and pa.types.is_integer(kind):
        indices = values.to_numpy()
        if source.private:
            names = [*declared, ""]
            inside = np.where((indices < 0) | (indices >= len(declared)), len(declared), indices)
            return pa.chunked_array([pa.array(names, pa.large_string()).take(pa.array(inside))])
        outside = np.flatnonzero((indices < 0) | (indices >= len(declared)))
        if len(outside):
            raise source.error(
                f"record {outside[0]} (counted from 0) has no label in column {column!r}",
                "the labels of this split may be withheld; choose another split, as in ID[validation]",
            )
        return pa.chunked_array([pa.array(declared, pa.large_string()).take(pa.array(indices))])
    texts = values.cast(pa.large_string())
    if source.private:
        return texts
    distinct = set(texts.unique().to_pylist())
    if all(map(NUMBER.fullmatch, distinct)) and not all(map(INTEGER.fullmatch, distinct)):
        raise _not_classes(source, column, "holds numbers that are not all integers")
    return texts


def without_label(labels: np.ndarray) -> int:
    """How many records contribute nothing, because their label is unknown or not a finite number."""
    return int((labels == UNKNOWN).sum() if np.issubdtype(labels.dtype, np.integer) else (~np.isfinite(labels)).sum())


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of the text types."""
    return str(kind) in ("string", "large_string", "string_view")


def _not_classes(source: Source, column: str, problem: str) -> UserError:
    remedy = "choose a column of integers or label names, or set task.type=text-regression to predict numbers"
    return UserError("task.label", column, f"the column of {source.name} {problem}, which are not classes", remedy)


def _declared_names(table: pa.Table, column: str) -> list[str] | None:
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if feature.get("_type") == "ClassLabel" else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
