"""What is learned, from which records."""

from __future__ import annotations

import numpy as np

from lorica.config import TaskConfig
from lorica.tasks.labels import label_indices, label_names
from lorica.tasks.owners import read_training
from lorica.tasks.readers import Source, read
from lorica.tasks.records import Batch, Records, Task

__all__ = ["Batch", "Records", "Task", "load_task"]


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
    test = read(config, "test")
    names = label_names(train, config.label)
    train_labels, test_labels = (label_indices(source, config.label, names) for source in (train, test))

    if config.type == "text-classification":
        from lorica.tasks import text

        tokenizer = text.load_tokenizer(base)

        def prepare(source: Source, labels: np.ndarray) -> Records:
            return text.tokenise(source, config.text, labels, names, tokenizer, config.max_length)
    else:
        from lorica.tasks import images

        preprocessing = images.load_preprocessing(base)

        def prepare(source: Source, labels: np.ndarray) -> Records:
            return images.process(source, config.image, labels, names, preprocessing)

    return Task(prepare(train, train_labels), prepare(test, test_labels), names, owners)
