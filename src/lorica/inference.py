"""Use the adapter of a finished run: predict from new inputs, and evaluate on labelled data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.adapters.base_files import resolve_base
from lorica.adapters.export import load_exported, read_export
from lorica.adapters.memory import pass_tokens
from lorica.errors import UserError
from lorica.tasks.cache import nothing_cached
from lorica.tasks.formats.image_folder import IMAGE_SUFFIXES
from lorica.tasks.kind import TaskKind, kind_of
from lorica.tasks.readers import READERS, Source, read
from lorica.tasks.records import Passes, evaluating


def predict(
    folder: str | Path,
    inputs: Sequence[str],
    base: str | None = None,
    device: str = "auto",
    chat: bool = False,
    answer_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """What the model of an adapter makes of new inputs. Records are prepared as in training, and not kept.

    Args:
        folder: the adapter.
        inputs: one data file (or image folder) with the columns that the adapter was trained on, labels not needed; or
            the texts of one record, in the order of these columns; or image files, each a record.
        base: as for `load_adapter`.
        device: as for `load_adapter`.
        chat: language modelling: the text is a user's turn, which the tokenizer's chat template writes out.
        answer_tokens: language modelling: most tokens of an answer; by default `task.answer_tokens`, or 64.

    Returns:
        One dictionary a record: `label` and `score` (its probability), `number`, `answer` or `text`.

    Raises:
        UserError: the adapter cannot be loaded, or an input cannot be used.
    """
    export = read_export(folder, base)
    decoded = {} if answer_tokens is None else {"answer_tokens": answer_tokens}
    kind = kind_of(export.task.model_copy(update=decoded))
    source = _source(kind, list(inputs), chat)
    model = load_exported(folder, export, device)
    processor = kind.processor(resolve_base(export.model.base))
    with nothing_cached(), evaluating(model):
        return kind.predictions(model, source, export.label_names, processor, _passes(model))


def evaluate(folder: str | Path, data: str, base: str | None = None, device: str = "auto") -> dict[str, float]:
    """The task's metrics and mean loss of an adapter on labelled data: those that a run reports on its test set.

    Args:
        folder: the adapter.
        data: any source that `task.test` takes, with the columns that the adapter was trained on.
        base: as for `load_adapter`.
        device: as for `load_adapter`.

    Raises:
        UserError: the adapter cannot be loaded, or the data cannot be used.
    """
    export = read_export(folder, base)
    kind = kind_of(export.task)
    source = read(export.task, "data", data)
    model = load_exported(folder, export, device)
    processor = kind.processor(resolve_base(export.model.base))
    objective, passes = kind.objective(processor), _passes(model)
    with nothing_cached(), evaluating(model):
        records = kind.records(source, export.label_names, processor, keep_texts=True)
        found = objective.evaluate(model, records, passes.tokens, passes.device)
    return {objective.metric: found[objective.metric]} | found


def _passes(model: Any) -> Passes:
    return Passes(pass_tokens(None, model, model.device), model.device)


def _source(kind: TaskKind, inputs: list[str], chat: bool) -> Source:
    import pyarrow as pa

    columns = list(kind.input_keys())
    first = Path(inputs[0])
    if len(inputs) == 1 and (first.suffix.lower() in READERS or _is_folder(first) or inputs[0].startswith("lorica:")):
        return read(kind.config, "input", inputs[0], inputs_only=True)
    if "image" in kind.columns:
        for name in inputs:
            if not Path(name).is_file():
                raise UserError("input", name, "no such image", "give image files, or one file with many images")
        paths = [str(Path(name).absolute()) for name in inputs]
        return Source("input", inputs[0], pa.table({columns[0]: paths}), Path())
    for text in inputs:
        # Otherwise a misspelt file name would be predicted from.
        if " " not in text and Path(text).suffix.lower() in {*READERS, *IMAGE_SUFFIXES}:
            raise UserError("input", text, "it looks like a file, but there is no such text file", "check the path")
    if len(inputs) != len(columns):
        problem = f"{len(inputs)} texts, but a record has {len(columns)}: {', '.join(columns)}"
        raise UserError("input", inputs[0], problem, "give each as one argument, in quotation marks, or a data file")
    texts = {
        column: [[{"role": "user", "content": t}] if chat else t] for column, t in zip(columns, inputs, strict=True)
    }
    return Source("input", inputs[0], pa.table(texts), Path())


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    # A long text is no path.
    except OSError:
        return False
