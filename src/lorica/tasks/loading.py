"""From the section `task` of a configuration to a task: read its sources, prepare records, choose the objective."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.groups import group_keys
from lorica.tasks.kind import TaskKind, kind_of
from lorica.tasks.labels import label_names
from lorica.tasks.made_up import made_up
from lorica.tasks.owners import read_training
from lorica.tasks.readers import Source, read
from lorica.tasks.records import Objective, Records, Task

Prepare = Callable[[Source], Records]


def load_task(
    config: TaskConfig, base: str, by: str | None = None, group: str | None = None, tested: bool = False
) -> Task:
    """Read the training and the test data and prepare them for a model.

    Args:
        base: a model folder, which is read without the network, or a hub id; for its tokenizer or image processor.
        by: the column that says which owner's record it is; by default the files of `task.train` say so.
        tested: the owners test on records of their own too.
        group: the column of the privacy unit above the record, whose values become `Task.groups`.

    Raises:
        UserError: a source, a column, a label or a record cannot be used, or the model's tokenizer or image processor
            cannot be loaded. Names records by their index only, and labels only where the test data has one that the
            training data lacks.
    """
    kind = kind_of(config)
    train, owners = read_training(config, by, group)
    tests = _read_tests(config)
    names = names_of_labels(kind, train)
    prepare, objective = _preparation(kind, base, names, tested)
    records = prepare(train)
    prepared = {name: prepare(source) for name, source in tests.items()}
    groups = None if group is None else group_keys(train, group)
    return Task(records, prepared, names, objective, owners, groups)


def load_tests(config: TaskConfig, base: str) -> Task:
    """The side of a task that a server has whose clients are elsewhere: the public test sets, and no training records.

    Labels are those of `task.labels`, or else of the first test set.

    Raises:
        UserError: as `load_task`.
    """
    kind = kind_of(config)
    tests = _read_tests(config)
    names = names_of_labels(kind, next(iter(tests.values())))
    prepare, objective = _preparation(kind, base, names, tested=False)
    prepared = {name: prepare(source) for name, source in tests.items()}
    nothing = next(iter(prepared.values())).subset(np.arange(0))
    return Task(nothing, prepared, names, objective)


def load_training(config: TaskConfig, base: str, group: str | None = None, tested: bool = False) -> Task:
    """The side of a task that an owner has on its own machine: its records, and made-up ones in place of a test set.

    Args:
        config: names the labels. They never come from the records: their number would tell something of them. A record
            with another label contributes zero (`lorica.tasks.labels`).
        group, tested: as for `load_task`.

    Raises:
        UserError: as `load_task`, or the labels are not named.
    """
    kind = kind_of(config)
    if kind.labels == "classes" and config.labels is None:
        problem = "required, because labels are not read from the records of an owner"
        raise UserError("task.labels", None, problem, "list all labels in the experiment's task.labels")
    train, owners = read_training(config, group=group, private=True)
    names = names_of_labels(kind, train)
    prepare, objective = _preparation(kind, base, names, tested)
    groups = None if group is None else group_keys(train, group)
    return Task(prepare(train), {"": prepare(made_up(kind, names))}, names, objective, owners, groups)


def names_of_labels(kind: TaskKind, source: Source) -> list[str]:
    """`task.labels`, or what a source's labels are called; of a number that is predicted its column; else nothing."""
    if kind.labels == "none":
        return []
    if kind.labels == "number":
        return [kind.config.label]
    return kind.config.labels or label_names(source, kind.config.label)


def _read_tests(config: TaskConfig) -> dict[str, Source]:
    test = config.test if isinstance(config.test, dict) else {"": config.test}
    return {name: read(config, f"task.test.{name}".rstrip("."), source) for name, source in test.items()}


def _preparation(kind: TaskKind, base: str, names: list[str], tested: bool) -> tuple[Prepare, Objective]:
    """How a source becomes records, and what is minimised on them."""
    processor = kind.processor(base)

    def prepare(source: Source) -> Records:
        # Texts are kept where answers are compared with them, and nowhere else.
        return kind.records(source, names, processor, keep_texts=tested or source.key != "task.train")

    return prepare, kind.objective(processor)
