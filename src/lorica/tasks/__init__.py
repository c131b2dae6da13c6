"""What is learned, from which records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorica.config import TaskConfig
from lorica.tasks.classification import Classification, Regression
from lorica.tasks.groups import group_keys
from lorica.tasks.labels import label_indices, label_names, label_numbers
from lorica.tasks.owners import read_training
from lorica.tasks.readers import Source, read
from lorica.tasks.records import Batch, Objective, Records, Task

__all__ = ["Batch", "Objective", "Records", "Task", "load_task"]


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
    test = config.test if isinstance(config.test, dict) else {"": config.test}
    tests = {name: read(config, f"task.test.{name}".rstrip("."), source) for name, source in test.items()}
    objective: Objective
    if config.type == "question-answering":
        from lorica.tasks.question_answering import QuestionAnswering

        prepare, names = _questions(config, base, tested), list[str]()
        objective = QuestionAnswering(config.null_threshold, config.max_answer)
    elif config.type == "language-modelling":
        from lorica.tasks.language_modelling import LanguageModelling
        from lorica.tasks.text import load_tokenizer

        tokenizer = load_tokenizer(base)
        prepare, names = _conversations(config, tokenizer), []
        objective = LanguageModelling(tokenizer, config.answer_tokens, config.answer_format)
    elif config.type == "text-regression":
        prepare, names = _numbers(config, base), [config.label]
        objective = Regression(tuple(config.metrics or ("pearson", "spearman")))
    else:
        names = label_names(train, config.label)
        prepare = _texts(config, base, names) if config.type == "text-classification" else _images(config, base, names)
        objective = Classification(tuple(config.metrics or ("accuracy",)))
    records = prepare(train)
    prepared = {name: prepare(source) for name, source in tests.items()}
    groups = None if group is None else group_keys(train, group)
    return Task(records, prepared, names, objective, owners, groups)


def _texts(config: TaskConfig, base: str, names: list[str]) -> Callable[[Source], Records]:
    from lorica.tasks import text

    tokenizer = text.load_tokenizer(base)

    def prepare(source: Source) -> Records:
        labels = label_indices(source, config.label, names)
        return text.tokenise(source, config.text, labels, [names[i] for i in labels], tokenizer, config.max_length)

    return prepare


def _numbers(config: TaskConfig, base: str) -> Callable[[Source], Records]:
    from lorica.tasks import text

    tokenizer = text.load_tokenizer(base)

    def prepare(source: Source) -> Records:
        numbers = label_numbers(source, config.label)
        return text.tokenise(source, config.text, numbers, numbers.astype(str).tolist(), tokenizer, config.max_length)

    return prepare


def _questions(config: TaskConfig, base: str, tested: bool) -> Callable[[Source], Records]:
    from lorica.tasks import question_answering, text

    tokenizer = text.load_tokenizer(base)
    columns = (config.question, config.context, config.answers)
    lengths = (config.max_length, config.stride, config.max_question)

    def prepare(source: Source) -> Records:
        # Texts are kept where answers are compared with them, and nowhere else.
        keep_texts = tested or source.key != "task.train"
        return question_answering.tokenise_questions(source, *columns, tokenizer, *lengths, keep_texts)

    return prepare


def _conversations(config: TaskConfig, tokenizer: Any) -> Callable[[Source], Records]:
    from lorica.tasks.causal import tokenise_causal

    return lambda source: tokenise_causal(source, config.text, tokenizer, config.max_length)


def _images(config: TaskConfig, base: str, names: list[str]) -> Callable[[Source], Records]:
    from lorica.tasks import images

    preprocessing = images.load_preprocessing(base)

    def prepare(source: Source) -> Records:
        return images.process(source, config.image, label_indices(source, config.label, names), names, preprocessing)

    return prepare
