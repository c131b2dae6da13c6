"""What is learned, from which records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lorica.config import TaskConfig
from lorica.tasks.classification import Classification, Regression
from lorica.tasks.groups import group_keys
from lorica.tasks.labels import label_indices, label_names, label_numbers
from lorica.tasks.made_up import made_up
from lorica.tasks.owners import read_training
from lorica.tasks.readers import Source, read
from lorica.tasks.records import Batch, Objective, Records, Task

__all__ = ["Batch", "Objective", "Records", "Task", "load_task", "load_tests", "load_training"]


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
    train, owners = read_training(config, by, group)
    tests = _read_tests(config)
    names = names_of_labels(config, train)
    prepare, objective = _preparation(config, base, names, tested)
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
    tests = _read_tests(config)
    names = names_of_labels(config, next(iter(tests.values())))
    prepare, objective = _preparation(config, base, names, tested=False)
    prepared = {name: prepare(source) for name, source in tests.items()}
    nothing = next(iter(prepared.values())).subset(np.arange(0))
    return Task(nothing, prepared, names, objective)


def load_training(config: TaskConfig, base: str, group: str | None = None, tested: bool = False) -> Task:
    """The side of a task that an owner has on its own machine: its records, and made-up ones in place of a test set.

    Args:
        config: names the labels, since the owner's records need not have all of them.
        group, tested: as for `load_task`.

    Raises:
        UserError: as `load_task`.
    """
    train, owners = read_training(config, group=group)
    names = names_of_labels(config, train)
    prepare, objective = _preparation(config, base, names, tested)
    groups = None if group is None else group_keys(train, group)
    return Task(prepare(train), {"": prepare(made_up(config, names))}, names, objective, owners, groups)


def names_of_labels(config: TaskConfig, source: Source) -> list[str]:
    """`task.labels`, or what a source's labels are called; of a number that is predicted its column; else nothing."""
    if config.type in ("question-answering", "language-modelling"):
        return []
    if config.type == "text-regression":
        return [config.label]
    return config.labels or label_names(source, config.label)


def _read_tests(config: TaskConfig) -> dict[str, Source]:
    test = config.test if isinstance(config.test, dict) else {"": config.test}
    return {name: read(config, f"task.test.{name}".rstrip("."), source) for name, source in test.items()}


def _preparation(config: TaskConfig, base: str, names: list[str], tested: bool) -> tuple[Prepare, Objective]:
    """How a source becomes records, and what is minimised on them."""
    if config.type == "question-answering":
        from lorica.tasks.question_answering import QuestionAnswering

        return _questions(config, base, tested), QuestionAnswering(config.null_threshold, config.max_answer)
    if config.type == "language-modelling":
        from lorica.tasks.language_modelling import LanguageModelling
        from lorica.tasks.text import load_tokenizer

        tokenizer = load_tokenizer(base)
        objective = LanguageModelling(tokenizer, config.answer_tokens, config.answer_format)
        return _conversations(config, tokenizer), objective
    if config.type == "text-regression":
        return _numbers(config, base), Regression(tuple(config.metrics or ("pearson", "spearman")))
    prepare = _texts(config, base, names) if config.type == "text-classification" else _images(config, base, names)
    return prepare, Classification(tuple(config.metrics or ("accuracy",)))


def _texts(config: TaskConfig, base: str, names: list[str]) -> Prepare:
    from lorica.tasks import text

    tokenizer = text.load_tokenizer(base)

    def prepare(source: Source) -> Records:
        labels = label_indices(source, config.label, names)
        return text.tokenise(source, config.text, labels, [names[i] for i in labels], tokenizer, config.max_length)

    return prepare


def _numbers(config: TaskConfig, base: str) -> Prepare:
    from lorica.tasks import text

    tokenizer = text.load_tokenizer(base)

    def prepare(source: Source) -> Records:
        numbers = label_numbers(source, config.label)
        return text.tokenise(source, config.text, numbers, numbers.astype(str).tolist(), tokenizer, config.max_length)

    return prepare


def _questions(config: TaskConfig, base: str, tested: bool) -> Prepare:
    from lorica.tasks import question_answering, text

    tokenizer = text.load_tokenizer(base)
    columns = (config.question, config.context, config.answers)
    lengths = (config.max_length, config.stride, config.max_question)

    def prepare(source: Source) -> Records:
        # Texts are kept where answers are compared with them, and nowhere else.
        keep_texts = tested or source.key != "task.train"
        return question_answering.tokenise_questions(source, *columns, tokenizer, *lengths, keep_texts)

    return prepare


def _conversations(config: TaskConfig, tokenizer: Any) -> Prepare:
    from lorica.tasks.causal import tokenise_causal

    return lambda source: tokenise_causal(source, config.text, tokenizer, config.max_length)


def _images(config: TaskConfig, base: str, names: list[str]) -> Prepare:
    from lorica.tasks import images

    preprocessing = images.load_preprocessing(base)

    def prepare(source: Source) -> Records:
        return images.process(source, config.image, label_indices(source, config.label, names), names, preprocessing)

    return prepare
