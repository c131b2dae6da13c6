"""What a kind of task is: one class that says all that sets it apart, registered like a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.registry import TASK_KINDS, registered, remedy_for_unknown

if TYPE_CHECKING:
    import pyarrow as pa

    from lorica.tasks.readers import Source
    from lorica.tasks.records import Objective, Passes, Records


class TaskKind(ABC):
    """What a record is, what is predicted of it, by which model, and how well.

    A package registers a subclass as an entry point in the group `lorica.tasks`, under the name that `task.type` takes.
    Its module is imported when a configuration is checked, so it leaves PyTorch and transformers to its methods.

    Attributes:
        config: the section `task`.
        columns: keys of the section `task` that name columns; nothing else of a source is read.
        targets: those of them that name what is predicted, which a source to predict from lacks.
        labels: what `task.label` holds. `classes`: names from `task.labels` or the data. `number`: one to predict.
            `none`: the kind has no label.
        model_class: transformers' automatic class that loads a base model for the task.
        heads: modules at the top of such a model that may hold its head, the last linear map.
        own_head: the head is the base's own map onto its vocabulary, which is neither trained nor adapted.
        pooled: a linear map on the mean of the last hidden states fits too (`model.pooling: mean`).
        metric_choices: what `task.metrics` may name; nothing where it may not be set.
        default_metrics: what is reported where it is not set.
        pipeline_tag: what the Hugging Face hub calls such tasks; None where it has no name for them.
        peft_task: PEFT's name for such tasks (`task_type` of an exported adapter); None where PEFT has none.
    """

    columns: ClassVar[tuple[str, ...]]
    targets: ClassVar[tuple[str, ...]] = ("label",)
    labels: ClassVar[Literal["classes", "number", "none"]] = "none"
    model_class: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")
    own_head: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    metric_choices: ClassVar[tuple[str, ...]] = ()
    default_metrics: ClassVar[tuple[str, ...]]
    pipeline_tag: ClassVar[str | None] = None
    peft_task: ClassVar[str | None] = None

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    @property
    def metrics(self) -> list[str]:
        """What the objective's `evaluate` reports beside `loss`: what an owner allows with `metrics` of its policy.

        Shares or correlations, of which 1 is perfect; only a name that ends in `loss` or `perplexity` may be another
        number.
        """
        return list(self.config.metrics or self.default_metrics)

    def read_file(self, path: Path, key: str) -> pa.Table | None:
        """All columns of a file whose format only this kind of task has; None for any other file.

        Args:
            key: the configuration's key that names the file, for errors.
        """
        return None

    @abstractmethod
    def processor(self, base: str) -> Any:
        """What makes inputs of raw records, such as a tokenizer; loaded once.

        Args:
            base: a model folder, which is read without the network, or a hub id.

        Raises:
            UserError: it cannot be loaded.
        """

    @abstractmethod
    def records(self, source: Source, label_names: list[str], processor: Any, keep_texts: bool) -> Records:
        """The records of a source, ready for the model.

        Args:
            label_names: names of all labels, for `labels = "classes"`.
            keep_texts: keep what only evaluation needs, such as answers as texts.

        Raises:
            UserError: a column or a record cannot be used; names records by their index only.
        """

    @abstractmethod
    def objective(self, processor: Any) -> Objective:
        """What is minimised, and how a model is evaluated.

        The loss of a row of the model's input may depend on that row alone (`Batch.by_example`), since the clip bounds
        nothing else.
        """

    @abstractmethod
    def predictions(
        self, model: Any, source: Source, label_names: list[str], processor: Any, passes: Passes
    ) -> list[dict[str, Any]]:
        """What a model makes of each record of a source that has the columns of `input_keys` only.

        Args:
            model: a trained one in evaluation mode, on `passes.device`; gradients are off.

        Raises:
            UserError: a column or a record cannot be used.
        """

    @abstractmethod
    def made_up(self, label_names: list[str]) -> dict[str, list[Any]]:
        """Column -> three values that nobody wrote, of different lengths if they are texts (`lorica.tasks.made_up`)."""

    @classmethod
    def outputs(cls, label_names: list[str]) -> int:
        """How many numbers the head gives."""
        return len(label_names)

    @classmethod  # noqa: B027 - most models need nothing
    def prepare_model(cls, model: Any, base: str) -> None:
        """Set what the task needs on a loaded base model, or refuse it (`UserError`).

        Args:
            base: the model as the configuration names it, for errors.
        """

    def save_processor(self, processor: Any, folder: Path) -> None:
        """Write the processor's files beside an adapter, as transformers reads them."""
        processor.save_pretrained(folder)

    def input_keys(self) -> dict[str, str]:
        """The columns that a prediction needs, each with the configuration's key that names it."""
        return {name: key for name, key in self.column_keys().items() if key.removeprefix("task.") not in self.targets}

    def column_keys(self) -> dict[str, str]:
        """The columns that are read, each with the configuration's key that names it."""
        keys: dict[str, str] = {}
        for key in self.columns:
            names = getattr(self.config, key)
            keys |= dict.fromkeys([names] if isinstance(names, str) else names, f"task.{key}")
        return keys


def kinds() -> list[type[TaskKind]]:
    """The classes of all kinds that are registered."""
    return [entry.load() for entry in registered(TASK_KINDS).values()]


def kind_named(name: str) -> type[TaskKind]:
    """The class that is registered under a name.

    Raises:
        UserError: there is none.
    """
    known = registered(TASK_KINDS)
    if name not in known:
        raise UserError("task.type", name, "no such kind of task", remedy_for_unknown(name, known))
    kind: type[TaskKind] = known[name].load()
    return kind


def kind_of(config: TaskConfig) -> TaskKind:
    """The kind of a configured task."""
    return kind_named(config.type)(config)
