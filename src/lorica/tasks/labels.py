"""Labels: from a column of names or integers to positions in the list of label names."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from lorica.errors import UserError
from lorica.tasks.readers import Source

if TYPE_CHECKING:
    import pyarrow as pa

# Python reads no integer of more than 4,300 digits.
INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

# Cross entropy ignores it: the loss is zero, and so is the gradient.
UNKNOWN = -100

# How data sets mark a record without a label: SNLI has "-" and -1, transformers -100, and pandas reads the rest as
# missing values.
UNLABELLED = frozenset(
    {"-", "-1", "-100"}
    | {"", "#N/A", "#N/A N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
# What is longer or more is a text, not a class.
LONGEST_LABEL = 1000
MOST_LABELS = 100_000
SHOWN = 100


def label_names(source: Source, column: str) -> list[str]:
    """The names of all labels of a training source.

    The names that the source declares (the `ClassLabel` feature of Hugging Face datasets) in their order; otherwise
    the distinct labels as text, sorted, by value if all are integers.

    Raises:
        UserError: the column holds no classes, or fewer than two of them, or a record has no label.
    """
    texts = label_texts(source, column)
    declared = _declared_names(source, column)
    if declared is None:
        _refuse_unlabelled(source, column, texts, ())
    distinct = set(texts.unique().to_pylist())
    if len(distinct) < 2:
        raise UserError(
            "task.label",
            column,
            f"all records of {source.name} have the same label",
            "give training data with at least two labels",
        )
    if declared is not None:
        return declared
    if len(distinct) > MOST_LABELS or max(map(len, distinct)) > LONGEST_LABEL:
        raise _not_classes(
            source, column, f"has more than {MOST_LABELS:,} different values, or longer ones than {LONGEST_LABEL:,}"
        )
    return sorted_names(distinct)


def sorted_names(distinct: Collection[str]) -> list[str]:
    """Names in order: by value if all are integers, else as text."""
    if all(map(INTEGER.fullmatch, distinct)):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def label_indices(source: Source, column: str, names: list[str]) -> np.ndarray:
    """(n,) int64: the position in `names` of each record's label.

    In a private source, a label that is missing or not in `names` is `UNKNOWN`: an error, or its absence, would tell a
    server who chose the names whether the label occurs.

    Raises:
        UserError: the column holds no classes, a record has no label, or one that is not in `names`.
    """
    import pyarrow as pa
    from pyarrow import compute

    texts = label_texts(source, column)
    indices = compute.index_in(texts, value_set=pa.array(names, pa.large_string()))
    if source.private:
        known: np.ndarray = indices.fill_null(UNKNOWN).to_numpy().astype(np.int64)
        return known
    _refuse_unlabelled(source, column, texts, names)
    unknown = sorted(set(texts.filter(compute.is_null(indices)).unique().to_pylist()))
    if unknown:
        raise source.error(
            f"{_short(unknown[0])!r} is not a label of the task",
            f"remove the records with this label, or add it to task.labels or task.train; they have {_listed(names)}",
        )
    found: np.ndarray = indices.to_numpy().astype(np.int64)
    return found


def label_numbers(source: Source, column: str) -> np.ndarray:
    """(n,) float32: the numbers of a column, which a CSV file has as text.

    In a private source, what is not a finite number is NaN, so that the record's gradient is NaN and contributes zero.

    Raises:
        UserError: the column holds no numbers, or -1 for all records; names the record by its index.
    """
    import pyarrow as pa

    values = source.table.column(column)
    # Beyond the range of float32 a number is infinite.
    with np.errstate(over="ignore"):
        if is_text(values.type):
            numbers = np.array([_number(text) for text in values.to_pylist()]).astype(np.float32)
        elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
            numbers = values.to_numpy().astype(np.float32)
        else:
            problem = f"the column of {source.name} holds {values.type}, not numbers"
            raise UserError("task.label", column, problem, "choose a column of numbers")
    finite = np.isfinite(numbers)
    if source.private:
        return np.where(finite, numbers, np.float32(np.nan))
    if not finite.all():
        index = int(np.argmin(finite))
        what = "number" if is_text(values.type) and np.isnan(numbers[index]) else "finite number"
        raise source.error(
            f"record {index} (counted from 0) has no {what} in column {column!r}",
            f"correct or remove the record (there are {int((~finite).sum())} of them)",
        )
    if len(numbers) > 1 and (numbers == -1).all():
        raise source.error(
            f"all records have -1 in column {column!r}, which marks a record without a label",
            "the labels of this split may be withheld: choose another split, as in ID[validation]",
        )
    return numbers


def _number(text: str | None) -> float:
    return float(text) if text is not None and NUMBER.fullmatch(text.strip()) else np.nan


def label_texts(source: Source, column: str) -> pa.ChunkedArray:
    """Each record's label as text (large_string); in a private source, null where there is none.

    Raises:
        UserError: the column holds something else than text, integers or booleans, or numbers written as text that
            are not all integers; a label lies outside the names that the source declares.
    """
    import pyarrow as pa
    from pyarrow import compute

    values = source.table.column(column)
    kind = values.type
    if pa.types.is_floating(kind) and not source.private:
        missing = compute.is_nan(values)
        if missing.index(True).as_py() >= 0:
            raise _unlabelled(source, column, missing)
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise _not_classes(source, column, f"holds {kind}")
    declared = _declared_names(source, column)
    if declared is not None and pa.types.is_integer(kind):
        # The greatest unsigned integers have no place among the signed ones.
        indices = compute.cast(values, pa.int64(), safe=False).fill_null(UNKNOWN)
        known = compute.and_(compute.greater_equal(indices, 0), compute.less(indices, len(declared)))
        if source.private:
            indices = compute.if_else(known, indices, pa.scalar(None, pa.int64()))
        elif not compute.all(known).as_py():
            raise _unlabelled(source, column, compute.invert(known))
        return pa.chunked_array([pa.array(declared, pa.large_string())]).take(indices)
    texts = values.cast(pa.large_string())
    if source.private:
        return texts
    distinct = set(texts.unique().to_pylist())
    if all(map(NUMBER.fullmatch, distinct)) and any("." in name or "e" in name.lower() for name in distinct):
        raise _not_classes(source, column, "holds numbers that are not all integers")
    return texts


def _refuse_unlabelled(source: Source, column: str, texts: pa.ChunkedArray, names: Collection[str]) -> None:
    import pyarrow as pa
    from pyarrow import compute

    marks = pa.array(sorted(UNLABELLED - {name.strip() for name in names}), pa.large_string())
    found = compute.is_in(compute.utf8_trim_whitespace(texts), value_set=marks)
    index = found.index(True).as_py()
    if index >= 0:
        raise _unlabelled(source, column, found, texts[index].as_py())


def _unlabelled(source: Source, column: str, missing: pa.ChunkedArray, mark: str | None = None) -> UserError:
    index, count = missing.index(True).as_py(), missing.to_numpy().sum()
    what = f"has no label in column {column!r}"
    if mark is not None:
        what = f"has {mark!r} in column {column!r}, which marks a record without a label"
    listed = "" if mark is None else f", list {mark!r} in task.labels if it is a label"
    return source.error(
        f"record {index} (counted from 0) {what}",
        f"correct or remove the records without a label ({count} of {len(missing)}){listed}, or choose another split "
        "if the labels of this one are withheld, as in ID[validation]",
    )


def without_label(labels: np.ndarray) -> int:
    """How many records contribute nothing, because their label is unknown or not a finite number."""
    return int((labels == UNKNOWN).sum() if np.issubdtype(labels.dtype, np.integer) else (~np.isfinite(labels)).sum())


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of the text types."""
    return str(kind) in ("string", "large_string", "string_view")


def declared_features(source: Source) -> dict[str, Any]:
    """What Hugging Face datasets wrote about the columns into the file; empty if nothing.

    Raises:
        UserError: it cannot be read.
    """
    metadata = (source.table.schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return {}
    try:
        features = (json.loads(metadata).get("info") or {}).get("features") or {}
        if isinstance(features, dict):
            return features
    except (ValueError, RecursionError, AttributeError):
        pass
    raise source.error("its Hugging Face metadata is damaged", "create the file again")


def _declared_names(source: Source, column: str) -> list[str] | None:
    feature = declared_features(source).get(column)
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    if names is None:
        return None
    valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not valid or len(set(names)) < len(names) or len(names) < 2:
        problem = f"the label names that it declares for column {column!r} are not different texts, two at least"
        raise source.error(problem, "create the file again, or list the labels as text")
    return list(names)


def _not_classes(source: Source, column: str, problem: str) -> UserError:
    remedy = "choose a column of integers or label names, or set task.type=text-regression to predict numbers"
    return UserError("task.label", column, f"the column of {source.name} {problem}, which are not classes", remedy)


def _short(name: str) -> str:
    return name if len(name) <= SHOWN else f"{name[:SHOWN]}…"


def _listed(names: list[str]) -> str:
    return ", ".join(map(_short, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
