"""What every registered kind of task has to be: complete, readable by its own reader, honest about what it measures."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pyarrow import parquet

from lorica.adapters.base_model import load_base
from lorica.config import ModelConfig, TaskConfig, load, validate
from lorica.errors import UserError
from lorica.privacy.plan import Refused
from lorica.privacy.policy import Policy
from lorica.registry import TASK_KINDS, registered
from lorica.tasks.kind import kind_named, kind_of
from lorica.tasks.loading import load_training
from lorica.tasks.made_up import made_up
from lorica.tasks.metrics import OF_CLASSES, OF_NUMBERS
from lorica.tasks.readers import read
from tests.models import VISION
from tests.tasks.conftest import write_vit
from tests.tasks.test_whole_runs import tiny_bert, tiny_reader, tiny_writer

ROOT = Path(__file__).parent.parent.parent
KINDS = list(registered(TASK_KINDS))
NAMES = ["no", "yes"]
# Long enough for three windows of a question, short enough for the tiny models.
LENGTHS = {"max_length": 16, "stride": 2, "max_question": 4}
# Settings that change what is measured.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "text-classification": [{}, {"metrics": list(OF_CLASSES)}],
    "image-classification": [{}, {"metrics": ["macro_f1"]}],
    "text-regression": [{}, {"metrics": ["spearman"]}],
    "question-answering": [{}, {"null_threshold": 0.0}],
    "language-modelling": [{}, {"answer_tokens": 2}],
}


def tiny_vit(folder: Path) -> str:
    write_vit(folder, 1)
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{key: value for key, value in VISION.items() if key != "num_labels"})
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


BASES = {
    "AutoModelForSequenceClassification": tiny_bert,
    "AutoModelForImageClassification": tiny_vit,
    "AutoModelForQuestionAnswering": tiny_reader,
    "AutoModelForCausalLM": tiny_writer,
}


def with_made_up_rows(folder: Path, name: str, **keys: Any) -> TaskConfig:
    """A task whose training file holds what the kind makes up."""
    config = TaskConfig(type=name, train=str(folder / "train.parquet"), test="elsewhere", labels=NAMES, **keys)
    parquet.write_table(made_up(kind_of(config), NAMES).table, config.train)
    return config


def test_the_kinds_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert set(VARIANTS) <= set(KINDS)
    for name in VARIANTS:
        assert f"| `{name}` |" in page


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_says_all_that_there_is_to_say(name: str) -> None:
    kind = kind_named(name)
    assert kind.columns
    assert set(kind.columns) <= set(TaskConfig.model_fields)
    assert kind.labels in ("classes", "number", "none")
    assert ("label" in kind.columns) == (kind.labels != "none")
    assert hasattr(transformers, kind.model_class)
    assert kind.default_metrics
    assert set(kind.metric_choices) <= {*OF_CLASSES, *OF_NUMBERS}
    assert set(kind.default_metrics) <= set(kind.metric_choices or kind.default_metrics)
    assert kind.__doc__


@pytest.mark.parametrize("name", KINDS)
def test_made_up_rows_are_read_by_the_kinds_own_reader(name: str, tmp_path: Path) -> None:
    config = with_made_up_rows(tmp_path, name, **LENGTHS)
    kind = kind_of(config)
    source = read(config, "task.train", str(config.train))
    assert set(source.table.column_names) == set(kind.column_keys())
    assert set(kind.column_keys().values()) == {f"task.{key}" for key in kind.columns}
    assert source.table.num_rows == 3
    task = load_training(config, BASES[kind.model_class](tmp_path / "base"))
    assert len(task.train) == len(task.test) == 3
    # The same rows from a file and from memory.
    assert task.train.fingerprint() == task.test.fingerprint()


# The made-up rows have one label.
@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name in KINDS for keys in VARIANTS.get(name, [{}])])
def test_a_private_test_computes_what_the_policy_asks_about(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    config = with_made_up_rows(tmp_path, name, **LENGTHS | keys)
    kind = kind_of(config)
    base = BASES[kind.model_class](tmp_path / "base")
    task = load_training(config, base, tested=True)
    pooling = "mean" if kind.pooled else "auto"
    settings = ModelConfig(base=base, pooling=pooling, head="freeze" if kind.own_head else "train")
    model = load_base(settings, name, task.label_names, 0).model
    found = task.objective.evaluate(model, task.train, 64, "cpu")
    assert set(found) == {"loss", *kind.metrics}
    assert task.objective.metric in kind.metrics
    assert len(set(kind.metrics)) == len(kind.metrics)

    def review(metrics: list[str]) -> None:
        """An owner of this task who allows tests with these metrics is asked for one."""
        proposal = {
            "name": "proposal",
            "model": {"base": base},
            "task": config.model_dump(),
            "federation": {"private_test": 0.1},
        }
        policy = {"max_epsilon": 9, "delta": 1e-5, "base_models": None, "tasks": [{"type": name}], "metrics": metrics}
        Policy(**policy).review_task(load(proposal), "sha256:")

    review(list(found))
    for missing in found:
        with pytest.raises(Refused, match=r"policy\.metrics"):
            review([metric for metric in found if metric != missing])


def test_the_kind_in_the_documentation_is_a_whole_one() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition("## Add a kind of task")[2]
    code = textwrap.dedent(section.partition("```python\n")[2].partition("```")[0])
    names: dict[str, Any] = {}
    exec(code, names)
    assert not inspect.isabstract(names["Severity"])
    config = TaskConfig(type="text-regression", train="a", test="b", text=["one", "two"], label="rate")
    kind = names["Severity"](config)
    assert kind.metrics == ["pearson", "spearman"]
    assert made_up(kind, []).table.column_names == list(kind.column_keys())
    assert kind.objective(None).metric == "pearson"


@pytest.mark.parametrize("value", ["text-clasification", None, 3, ["text-classification"]])
def test_an_unknown_kind_is_one_clear_error(value: Any) -> None:
    content = {"name": "x", "model": {"base": "b"}, "task": {"type": value, "train": "a", "test": "b"}}
    with pytest.raises(UserError, match="no such kind of task") as caught:
        load(content)
    assert (caught.value.key, caught.value.value) == ("task.type", value)
    assert all(name in str(caught.value) for name in KINDS)
    if isinstance(value, str):
        assert "Did you mean 'text-classification'?" in str(caught.value)
    with pytest.raises(UserError, match=r"policy\.tasks\.type"):
        validate(Policy, {"max_epsilon": 1, "delta": 0.1, "base_models": None, "tasks": [{"type": value}]}, "policy")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"metrics": ["acuracy"]},
            "task.metrics = ['acuracy']: acuracy is not a metric of text-classification. Did you",
        ),
        ({"metrics": ["pearson"]}, "pearson is not a metric of text-classification"),
        ({"type": "question-answering", "metrics": ["f1"]}, "question-answering has fixed metrics. Remove"),
        ({"type": "language-modelling", "metrics": ["accuracy"]}, "language-modelling has fixed metrics"),
    ],
)
def test_metrics_of_another_kind_are_refused(keys: dict[str, Any], message: str) -> None:
    task = {"type": "text-classification", "train": "a", "test": "b"} | keys
    with pytest.raises(UserError) as caught:
        load({"name": "x", "model": {"base": "b"}, "task": task})
    assert caught.value.key == "task.metrics"
    assert message in str(caught.value)


def test_a_configuration_is_checked_without_pytorch() -> None:
    """A mistake in a file is told at once, and not after the seconds that these take to import."""
    program = """
import sys
from lorica.registry import TASK_KINDS, registered
from lorica.tasks.kind import kind_named
for name in registered(TASK_KINDS):
    kind_named(name)
print(*({"torch", "transformers", "scipy", "sklearn", "pyarrow"} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
