"""A kind of task that another package brings: one class here, an entry point, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lorica
from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.inference import evaluate, predict
from lorica.privacy.policy import Policy
from lorica.registry import registered
from lorica.tasks.classification import predicted_numbers
from lorica.tasks.kind import TaskKind
from lorica.tasks.labels import label_numbers
from lorica.tasks.loading import load_training
from lorica.tasks.made_up import TEXTS
from lorica.tasks.readers import Source
from lorica.tasks.records import Batch, Passes, Records, evaluating
from lorica.tasks.text import load_tokenizer, tokenise, tokenise_unlabelled
from tests.tasks.conftest import WORDS
from tests.tasks.test_whole_runs import experiment, sentences, write_rows


class Counting(TaskKind):
    """How often something occurs in a text: a Poisson distribution whose log rate is the model's output."""

    columns = ("text", "label")
    labels = "number"
    model_class = "AutoModelForSequenceClassification"
    pooled = True
    default_metrics = ("within_one",)
    metric = "within_one"

    def processor(self, base: str) -> Any:
        return load_tokenizer(base)

    def records(self, source: Source, label_names: list[str], processor: Any, keep_texts: bool) -> Records:
        counts = label_numbers(source, self.config.label)
        texts = counts.astype(str).tolist()
        return tokenise(source, self.config.text, counts, texts, processor, self.config.max_length)

    def objective(self, processor: Any) -> Counting:
        return self

    def predictions(
        self, model: Any, source: Source, label_names: list[str], processor: Any, passes: Passes
    ) -> list[dict[str, Any]]:
        records = tokenise_unlabelled(source, self.config.text, processor, self.config.max_length)
        return [{"rate": math.exp(number)} for number in predicted_numbers(model, records, passes)]

    def made_up(self, label_names: list[str]) -> dict[str, list[Any]]:
        return dict.fromkeys(self.config.text, TEXTS) | {self.config.label: [1] * len(TEXTS)}

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        rates = outputs.logits.float()[:, 0]
        return batch.by_example(F.poisson_nll_loss(rates, batch.labels, reduction="none"))

    def evaluate(self, model: Any, records: Records, tokens: int, device: torch.device | str) -> dict[str, float]:
        loss, right = 0.0, 0
        with evaluating(model):
            for batch in records.micro_batches(np.arange(len(records)), tokens):
                outputs = model(**batch.to(device).inputs)
                loss += float(self.losses(outputs, batch.to(device)).sum())
                right += int(((outputs.logits[:, 0].exp().cpu() - batch.labels).abs() <= 1).sum())
        return {"within_one": right / len(records), "loss": loss / len(records)}


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its name, once a package that registers it is on the path."""
    package = tmp_path / "site" / "lorica_counting-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: lorica-counting\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[lorica.tasks]\ncounting = {__name__}:Counting\n")
    monkeypatch.syspath_prepend(str(package.parent))
    registered.cache_clear()
    yield "counting"
    registered.cache_clear()


def write_counts(path: Path, count: int, seed: int) -> str:
    texts = sentences(count, seed)
    return write_rows(path, [{"said": text, "vowels": sum(text.count(v) for v in "aeiou")} for text in texts])


@pytest.mark.integration
def test_a_kind_from_elsewhere_is_trained_privately_from_file_to_adapter(tmp_path: Path, counting: str) -> None:
    task = {"type": counting, "text": "said", "label": "vowels"}
    task |= {"train": write_counts(tmp_path / "train.jsonl", 80, 0), "test": write_counts(tmp_path / "t.jsonl", 40, 9)}
    privacy = {"epsilon": 3.0, "delta": 1e-2, "ledger": str(tmp_path / "ledger")}
    result = experiment(tmp_path, task, privacy=privacy).run()
    first, last = result.metrics[0], result.metrics[-1]
    assert last["metric"] == "within_one"
    assert last["score"] == last["within_one"]
    # The head starts at zero, so the first model says a rate of e⁰ = 1 for every text, at a loss of e⁰ - 0 · count.
    counts = [sum(text.count(vowel) for vowel in "aeiou") for text in sentences(40, 9)]
    assert first["loss"] == pytest.approx(1.0)
    assert first["within_one"] == pytest.approx(np.mean([abs(count - 1) <= 1 for count in counts]))
    assert last["loss"] != first["loss"]
    assert 0 < result.epsilon <= 3.0
    assert result.privacy["noise"] == "secure"
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "within one" in page.lower()
    model = lorica.load_adapter(result.adapter)
    tokens = load_tokenizer(str(tmp_path / "encoder"))([WORDS[0]], return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 1)
    [found] = predict(result.adapter, [WORDS[0]])
    assert found == {"rate": pytest.approx(model(**tokens).logits.exp().item())}
    assert evaluate(result.adapter, task["test"]) == pytest.approx({n: last[n] for n in ("within_one", "loss")})


def test_it_is_no_kind_of_task_where_its_package_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.type = 'counting': no such kind of task"):
        experiment(tmp_path, {"type": "counting", "train": "a", "test": "b"})


def test_an_owner_on_its_own_machine_can_read_and_allow_it(tmp_path: Path, counting: str) -> None:
    train = write_counts(tmp_path / "train.jsonl", 8, 0)
    policy = Policy(max_epsilon=1, delta=1e-5, base_models=None, tasks=[{"type": counting, "text": "said"}])
    assert policy.tasks[0]["text"] == ["said"]
    assert policy.tasks[0]["label"] == "label"
    config = TaskConfig(type=counting, text="said", label="vowels", train=train, test="server")
    base = experiment(tmp_path, {"type": counting, "train": train, "test": train}).config.model.base
    task = load_training(config, base)
    assert task.label_names == ["vowels"]
    assert not task.has_classes
    assert len(task.test) == 3
