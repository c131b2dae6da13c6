"""What is learned, from which records."""

from __future__ import annotations

from collections.abc import Callable

from lorica.config import TaskConfig
from lorica.tasks.classification import Classification, Regression
from lorica.tasks.labels import label_indices, label_names, label_numbers
from lorica.tasks.owners import read_training
from lorica.tasks.readers import Source, read
from lorica.tasks.records import Batch, Objective, Records, Task

__all__ = ["Batch", "Objective", "Records", "Task", "load_task"]


def load_task(config: TaskConfig, base: str, by: str | None = None) -> Task:
    """Read the training and the test data and prepare them for a model.

    Args:
        base: a model folder, which is read without the network, or a hub id; for its tokenizer or image processor.
        by: the column that says whose record it is; by default the files of `task.train` say so.

    Raises:
        UserError: a source, a column, a label or a record cannot be used, or the model's tokenizer or image processor
            cannot be loaded. Names records by their index only, and labels only where the test data has one that the
            training data lacks.
    """
    train, owners = read_training(config, by)
    test = config.test if isinstance(config.test, dict) else {"": config.test}
    tests = {name: read(config, f"task.test.{name}".rstrip("."), source) for name, source in test.items()}
    if config.type == "text-regression":
        prepare, names = _numbers(config, base), [config.label]
        objective: Objective = Regression(tuple(config.metrics or ("pearson", "spearman")))
    else:
        names = label_names(train, config.label)
        prepare = _texts(config, base, names) if config.type == "text-classification" else _images(config, base, names)
        objective = Classification(tuple(config.metrics or ("accuracy",)))
    return Task(prepare(train), {name: prepare(source) for name, source in tests.items()}, names, objective, owners)


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


def _images(config: TaskConfig, base: str, names: list[str]) -> Callable[[Source], Records]:
    from lorica.tasks import images

    preprocessing = images.load_preprocessing(base)

    def prepare(source: Source) -> Records:
        return images.process(source, config.image, label_indices(source, config.label, names), names, preprocessing)

    return prepare
