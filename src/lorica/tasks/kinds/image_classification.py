"""The label of an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.tasks.kind import TaskKind
from lorica.tasks.labels import UNKNOWN, label_indices
from lorica.tasks.made_up import noise_image
from lorica.tasks.metrics import OF_CLASSES
from lorica.tasks.readers import Source

if TYPE_CHECKING:
    from lorica.tasks.records import Objective, Passes, Records


class ImageClassification(TaskKind):
    """One label of several for an image, by cross entropy."""

    columns = ("image", "label")
    labels = "classes"
    model_class = "AutoModelForImageClassification"
    pipeline_tag = "image-classification"
    metric_choices = tuple(OF_CLASSES)
    default_metrics = ("accuracy",)

    def processor(self, base: str) -> Any:
        from lorica.tasks.images import load_preprocessing

        return load_preprocessing(base)

    def records(self, source: Source, label_names: list[str], processor: Any, keep_texts: bool) -> Records:
        from lorica.tasks.images import process

        labels = label_indices(source, self.config.label, label_names)
        return process(source, self.config.image, labels, label_names, processor)

    def objective(self, processor: Any) -> Objective:
        from lorica.tasks.classification import Classification

        return Classification(tuple(self.metrics))

    def predictions(
        self, model: Any, source: Source, label_names: list[str], processor: Any, passes: Passes
    ) -> list[dict[str, Any]]:
        import numpy as np

        from lorica.tasks.classification import predicted_labels
        from lorica.tasks.images import process

        unlabelled = np.full(source.table.num_rows, UNKNOWN)
        records = process(source, self.config.image, unlabelled, label_names, processor)
        return predicted_labels(model, records, label_names, passes)

    def save_processor(self, processor: Any, folder: Path) -> None:
        from lorica.tasks.images import save_preprocessing

        save_preprocessing(processor, folder)

    def made_up(self, label_names: list[str]) -> dict[str, list[Any]]:
        images = [noise_image(seed) for seed in range(3)]
        return {self.config.image: images, self.config.label: [label_names[0]] * len(images)}
