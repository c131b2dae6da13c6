"""Tasks from file to report: a tiny base model, whole runs, each task's own metrics."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lorica
from lorica.errors import UserError
from lorica.testing.models import TEXT
from tests.tasks.conftest import WORDS, write_tokenizer

pytestmark = pytest.mark.usefixtures("checked_once")
SEEDED = {"epsilon": None, "noise_multiplier": 1.0, "delta": 1e-2, "noise": "reproducible"}


def tiny_bert(folder: Path, **settings: Any) -> str:
    """An encoder of random weights with a tokenizer, as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _bert_files(tuple(settings.items())).items():
        (folder / name).write_bytes(content)
    return str(folder)


@cache
def _bert_files(settings: tuple[tuple[str, Any], ...]) -> dict[str, bytes]:
    torch.manual_seed(0)
    own = {key: value for key, value in TEXT.items() if key != "num_labels"} | dict(settings)
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_tokenizer(folder)
        transformers.BertModel(transformers.BertConfig(**own)).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def sentences(count: int, seed: int) -> list[str]:
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, draws.integers(2, 6))) for _ in range(count)]


def experiment(folder: Path, task: dict[str, Any], **keys: Any) -> lorica.Experiment:
    content = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "model": {"base": tiny_bert(folder / "encoder"), "pooling": "mean", "threads": 1},
        "lora": {"r": 2},
        # The sentences are made of few words, so that some are in both.
        "task": {"test_overlap": "allow"} | task,
        "federation": {"clients": 2, "partition": "iid", "rounds": 2, "local_steps": 2, "batch_size": 8},
        "privacy": SEEDED | {"ledger": str(folder / "ledger")},
    }
    return lorica.Experiment.load(content | keys)


@pytest.mark.integration
def test_regression_reports_correlations(tmp_path: Path) -> None:
    """STS-B's shape: two texts, a number; the target is the share of common words."""

    def rows(count: int, seed: int) -> list[dict[str, Any]]:
        pairs = list(zip(sentences(count, seed), sentences(count, seed + 1), strict=True))
        scores = [len(set(a.split()) & set(b.split())) / 2 for a, b in pairs]
        return [{"one": a, "two": b, "score": score} for (a, b), score in zip(pairs, scores, strict=True)]

    task = {"type": "text-regression", "text": ["one", "two"], "label": "score"}
    task |= {"train": write_rows(tmp_path / "train.jsonl", rows(60, 0))}
    task |= {"test": write_rows(tmp_path / "test.jsonl", rows(40, 9))}
    result = experiment(tmp_path, task).run()
    last = result.metrics[-1]
    assert last["metric"] == "pearson"
    assert result.score == last["pearson"] == last["score"]
    assert -1 <= last["spearman"] <= 1
    assert last["loss"] > 0
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "Pearson correlation" in page
    model = lorica.load_adapter(result.adapter)
    assert model.classifier.out_features == 1
    with pytest.raises(UserError, match=r"federation\.partition = 'dirichlet'"):
        experiment(tmp_path, task, name="skewed", federation={"clients": 2, "partition": "dirichlet"}).run()


@pytest.mark.integration
def test_several_test_sets_and_metrics(tmp_path: Path) -> None:
    """MNLI's shape: matched and mismatched; F1 as the main metric."""

    def rows(count: int, seed: int) -> list[dict[str, Any]]:
        return [{"text": text, "label": int("good" in text)} for text in sentences(count, seed)]

    task = {"type": "text-classification", "metrics": ["f1", "accuracy"]}
    task |= {"train": write_rows(tmp_path / "train.jsonl", rows(80, 0))}
    tests = {
        name: write_rows(tmp_path / f"{name}.jsonl", rows(40, seed)) for seed, name in enumerate(("near", "far"), 5)
    }
    result = experiment(tmp_path, task | {"test": tests}).run()
    last = result.metrics[-1]
    assert last["metric"] == "f1"
    assert last["score"] == last["f1"]
    assert {"accuracy", "loss", "far_f1", "far_accuracy", "far_loss"} < set(last)
    assert "near_f1" not in last
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "far accuracy" in page
    with pytest.raises(UserError, match=r"task\.test\.far"):
        experiment(tmp_path, task | {"test": tests | {"far": str(tmp_path / "absent.jsonl")}}, name="absent").run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["pearson"]}, "pearson is not a metric of text-classification"),
        ({"metrics": ["accuracy"], "type": "text-regression"}, "accuracy is not a metric of text-regression"),
        ({"test": {}}, "give a source"),
        ({"test": {"a b": "x.csv"}}, "give a source, or a mapping of names"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    task = {"type": "text-classification", "train": "x.csv", "test": "x.csv"} | change
    with pytest.raises(UserError, match=message):
        lorica.Experiment.load({"name": "x", "model": {"base": "x"}, "task": task})


def test_numbers_are_read_from_text_and_named_by_index_where_they_are_none(tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    train.write_text("text,label\nfine film,1.5\nbad plot,-2e-1\ngood,secret\n")
    task = {"type": "text-regression", "train": str(train), "test": str(train)}
    with pytest.raises(UserError, match=r"record 2 .* has no number in column 'label'") as error:
        experiment(tmp_path, task).run()
    assert "secret" not in str(error.value)


def tiny_reader(folder: Path) -> str:
    torch.manual_seed(0)
    write_tokenizer(folder)
    config = transformers.BertConfig(**({key: value for key, value in TEXT.items() if key != "num_labels"}))
    transformers.BertForQuestionAnswering(config).save_pretrained(folder)
    return str(folder)


def tiny_writer(folder: Path) -> str:
    torch.manual_seed(0)
    write_tokenizer(folder, frame=False, eos_token="[SEP]")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_questions_are_answered(tmp_path: Path) -> None:
    """SQuAD's columns; long contexts make several windows, which share one clip and one place in a batch."""

    def rows(count: int, seed: int) -> list[dict[str, Any]]:
        draws = np.random.default_rng(seed)
        found = []
        for context in sentences(count, seed):
            context = " ".join([context] * int(draws.integers(1, 6)))
            words = context.split()
            place = int(draws.integers(len(words)))
            start = len(" ".join(words[:place])) + (place > 0)
            known = draws.random() < 0.8
            answers = {"text": [words[place]] if known else [], "answer_start": [start] if known else []}
            found.append({"question": words[place], "context": context, "answers": answers})
        return found

    task = {"type": "question-answering", "max_length": 16, "stride": 4, "max_question": 4, "null_threshold": 0.0}
    task |= {"train": write_rows(tmp_path / "train.jsonl", rows(60, 0))}
    task |= {"test": write_rows(tmp_path / "test.jsonl", rows(30, 9))}
    model = {"base": tiny_reader(tmp_path / "base"), "threads": 1}
    result = experiment(tmp_path, task, model=model).run()
    last = result.metrics[-1]
    assert last["metric"] == "f1"
    assert last["score"] == last["f1"] >= last["exact_match"]
    assert sum(row["records"] for row in result.privacy["clients"]) == 60
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "Test F1" in page
    assert not (result.folder / "partition.json").exists()
    loaded = lorica.load_adapter(result.adapter)
    assert loaded.qa_outputs.out_features == 2


@pytest.mark.integration
def test_conversations_are_continued(tmp_path: Path) -> None:
    def rows(count: int, seed: int) -> list[dict[str, Any]]:
        return [{"ask": text, "say": " ".join(reversed(text.split()))} for text in sentences(count, seed)]

    task = {"type": "language-modelling", "text": ["ask", "say"], "max_length": 24, "answer_tokens": 4}
    task |= {"train": write_rows(tmp_path / "train.jsonl", rows(60, 0))}
    task |= {"test": write_rows(tmp_path / "test.jsonl", rows(20, 9))}
    model = {"base": tiny_writer(tmp_path / "base"), "threads": 1, "head": "freeze"}
    result = experiment(tmp_path, task, model=model).run()
    last = result.metrics[-1]
    assert last["metric"] == "exact_match"
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    assert 0 <= last["token_accuracy"] <= 1
    assert lorica.load_adapter(result.adapter).get_output_embeddings() is not None
    shown = experiment(tmp_path, task | {"answer_tokens": None}, model=model, name="plain").run()
    assert shown.metrics[-1]["metric"] == "token_accuracy"
    with pytest.raises(UserError, match=r"model\.head"):
        experiment(tmp_path, task, model=model | {"head": "train"}, name="head").run()


@pytest.mark.usefixtures("without_report")
def test_a_group_is_the_unit_of_everything(tmp_path: Path) -> None:
    """Sampling rates, plans, the ledger and the statement count groups; no group is divided among clients."""

    def rows(count: int, seed: int) -> list[dict[str, Any]]:
        texts = sentences(count, seed)
        return [{"text": text, "label": int("good" in text), "who": f"p{i % 40}"} for i, text in enumerate(texts)]

    train = write_rows(tmp_path / "train.jsonl", rows(160, 0))
    task = {"type": "text-classification", "train": train, "test": train}
    privacy = {"epsilon": 3.0, "delta": 1e-2, "ledger": str(tmp_path / "ledger")}
    groups = privacy | {"unit": "group", "group": "who", "group_records": 3}
    result = experiment(tmp_path, task, privacy=groups).run()
    rates = [row["sampling_rate"] for row in result.privacy["clients"]]
    assert rates == [8 / 20, 8 / 20]
    assert result.privacy["unit"] == "group who, at most 3 records"
    assert result.privacy["relation"].startswith("zero-out: all records of one group")
    assert "each group" in result.privacy["clipping"]
    card = (result.adapter / "README.md").read_text(encoding="utf-8")
    assert "all records of one group" in card
    assert all(row["lifetime_epsilon"] <= 3.0 for row in result.privacy["clients"])
    # A run for single records: from then on there is one ε neither for patients nor for records.
    single = privacy | {"epsilon": None, "noise_multiplier": 1.0}
    records = experiment(tmp_path, task, privacy=single, name="records").run()
    assert not any("lifetime_epsilon" in row for row in records.privacy["clients"])
    assert any("another unit" in line for line in records.privacy["not_covered"])
    again = experiment(tmp_path, task, privacy=groups | {"max_lifetime_epsilon": 100.0}, name="again")
    with pytest.raises(UserError, match=r"max_lifetime_epsilon.*inf"):
        again.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "group"}, "set unit: group and group: COLUMN together"),
        ({"group": "who"}, "set unit: group and group: COLUMN together"),
        ({"unit": "group", "group": "whose"}, r"privacy\.group = 'whose': no such column.*[Dd]id you mean 'who'"),
    ],
)
def test_a_group_needs_its_column(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [{"text": text, "label": index % 2, "who": index} for index, text in enumerate(sentences(40, 0))]
    train = write_rows(tmp_path / "train.jsonl", rows)
    task = {"type": "text-classification", "train": train, "test": train}
    with pytest.raises(UserError, match=message):
        experiment(tmp_path, task, privacy={"epsilon": 8.0, "delta": 1e-2} | change).run()


@pytest.mark.integration
def test_an_owners_own_test_results_stay_with_the_owner(tmp_path: Path) -> None:
    """Held-out records are trained on by nobody, and what comes of them is in no file of the run."""
    rows = [{"text": text, "label": int("good" in text)} for text in sentences(100, 0)]
    train = write_rows(tmp_path / "data.jsonl", rows)
    task = {"type": "text-classification", "train": train, "test": train}
    federation = {"clients": 2, "partition": "iid", "rounds": 2, "local_steps": 1, "batch_size": 8, "private_test": 0.2}
    result = experiment(tmp_path, task, federation=federation, privacy=SEEDED).run()
    assert all(30 <= row["records"] < 50 for row in result.privacy["clients"])
    assert any("federation.private_test" in line for line in result.privacy["assumptions"])
    path = tmp_path / "data.jsonl.private-metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["client"], line["round"]) for line in lines] == [(c, r) for r in range(3) for c in range(2)]
    assert all(0 <= line["accuracy"] <= 1 and line["loss"] > 0 for line in lines)
    files = [path for path in result.folder.rglob("*") if path.is_file() and path.suffix != ".png"]
    public = "".join(path.read_text(errors="replace") for path in files)
    # At the start all predictions are equal, and so are private and public loss.
    assert all(str(line["loss"]) not in public for line in lines if line["round"])
    groups = SEEDED | {"unit": "group", "group": "text"}
    grouped = experiment(tmp_path, task, federation=federation, privacy=groups, name="grouped")
    with pytest.raises(UserError, match=r"federation\.private_test"):
        grouped.run()
