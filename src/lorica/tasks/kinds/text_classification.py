"""The label of a text, or of a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorica.tasks.kind import TaskKind
from lorica.tasks.labels import UNKNOWN, label_indices
from lorica.tasks.made_up import TEXTS
from lorica.tasks.metrics import OF_CLASSES
from lorica.tasks.readers import Source

if TYPE_CHECKING:
    from lorica.tasks.records import Objective, Passes, Records


class TextClassification(TaskKind):
    """One label of several for a text or a pair of texts, by cross entropy."""

    columns = ("text", "label")
    labels = "classes"
    model_class = "AutoModelForSequenceClassification"
    pooled = True
    pipeline_tag = "text-classification"
    peft_task = "SEQ_CLS"
    metric_choices = tuple(OF_CLASSES)
    default_metrics = ("accuracy",)

    def processor(self, base: str) -> Any:
        from lorica.tasks.text import load_tokenizer

        return load_tokenizer(base)

    def records(self, source: Source, label_names: list[str], processor: Any, keep_texts: bool) -> Records:
        from lorica.tasks.text import tokenise

        labels = label_indices(source, self.config.label, label_names)
        names = [label_names[label] if label != UNKNOWN else "" for label in labels]
        return tokenise(source, self.config.text, labels, names, processor, self.config.max_length)

    def objective(self, processor: Any) -> Objective:
        from lorica.tasks.classification import Classification

        return Classification(tuple(self.metrics))

    def predictions(
        self, model: Any, source: Source, label_names: list[str], processor: Any, passes: Passes
    ) -> list[dict[str, Any]]:
        from lorica.tasks.classification import predicted_labels
        from lorica.tasks.text import tokenise_unlabelled

        records = tokenise_unlabelled(source, self.config.text, processor, self.config.max_length)
        return predicted_labels(model, records, label_names, passes)

    def made_up(self, label_names: list[str]) -> dict[str, list[Any]]:
        return dict.fromkeys(self.config.text, TEXTS) | {self.config.label: [label_names[0]] * len(TEXTS)}

    @classmethod
    def prepare_model(cls, model: Any, base: str) -> None:
        from lorica.tasks.models import pad_as_configured

        pad_as_configured(model)
