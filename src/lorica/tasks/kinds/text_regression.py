"""A number for a text, or for a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorica.tasks.kind import TaskKind
from lorica.tasks.labels import label_numbers
from lorica.tasks.made_up import TEXTS
from lorica.tasks.metrics import OF_NUMBERS
from lorica.tasks.readers import Source

if TYPE_CHECKING:
    from lorica.tasks.records import Objective, Passes, Records


class TextRegression(TaskKind):
    """One number for a text or a pair of texts, by squared error."""

    columns = ("text", "label")
    labels = "number"
    model_class = "AutoModelForSequenceClassification"
    pooled = True
    pipeline_tag = "text-classification"
    peft_task = "SEQ_CLS"
    metric_choices = tuple(OF_NUMBERS)
    default_metrics = ("pearson", "spearman")

    def processor(self, base: str) -> Any:
        from lorica.tasks.text import load_tokenizer

        return load_tokenizer(base)

    def records(self, source: Source, label_names: list[str], processor: Any, keep_texts: bool) -> Records:
        from lorica.tasks.text import tokenise

        numbers = label_numbers(source, self.config.label)
        texts = numbers.astype(str).tolist()
        return tokenise(source, self.config.text, numbers, texts, processor, self.config.max_length)

    def objective(self, processor: Any) -> Objective:
        from lorica.tasks.classification import Regression

        return Regression(tuple(self.metrics))

    def predictions(
        self, model: Any, source: Source, label_names: list[str], processor: Any, passes: Passes
    ) -> list[dict[str, Any]]:
        from lorica.tasks.classification import predicted_numbers
        from lorica.tasks.text import tokenise_unlabelled

        records = tokenise_unlabelled(source, self.config.text, processor, self.config.max_length)
        return [{"number": number} for number in predicted_numbers(model, records, passes).tolist()]

    def made_up(self, label_names: list[str]) -> dict[str, list[Any]]:
        return dict.fromkeys(self.config.text, TEXTS) | {self.config.label: [0.0] * len(TEXTS)}

    @classmethod
    def prepare_model(cls, model: Any, base: str) -> None:
        from lorica.tasks.models import pad_as_configured

        pad_as_configured(model)
        # Otherwise transformers' pipelines take a single output for the logit of a probability.
        model.config.problem_type = "regression"
