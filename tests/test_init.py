"""`lorica init` and `lorica plan`: a configuration for one's own file that loads, runs, and suits records and ε."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow import parquet
from rich.console import Console
from typer.testing import CliRunner

import lorica
from lorica import cli
from lorica.config import load
from lorica.errors import UserError
from lorica.privacy.accounting import Steps, epsilon
from lorica.privacy.planning import NEAR, least_noise, option, smallest_good_batch, usual_batch_sizes
from lorica.templates.experiment import Wishes, draft_experiment
from tests.tasks.test_whole_runs import sentences, tiny_bert, write_rows

ONE_STEP = ["federation.rounds=1", "federation.local_steps=1", "model.threads=1"]
ONE_STEP += ["privacy.epsilon=null", "privacy.noise_multiplier=1.0"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reviews(path: Path, count: int = 400, **more: Callable[[int], Any]) -> str:
    texts = sentences(count, 0)
    rows = [
        {"id": index, "review": f"{text} {index}", "sentiment": "yes" if "good" in text else "no"}
        | {name: make(index) for name, make in more.items()}
        for index, text in enumerate(texts)
    ]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return str(path)
    return write_rows(path, rows)


def drafted(data: str, **wishes: Any) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(draft_experiment(data, Wishes(test="public.csv", **wishes)).text)
    return content


@pytest.mark.integration
@pytest.mark.usefixtures("checked_once", "without_report")
def test_a_drafted_experiment_runs(place: Path) -> None:
    data = reviews(place / "reviews.csv")
    draft = draft_experiment(data, Wishes(split=0.2, base=tiny_bert(place / "encoder")))
    assert draft.path == Path("reviews.yaml")
    assert {path.name for path in place.iterdir() if path.is_file()} == {"reviews.csv"}
    draft.write()
    config = load("reviews.yaml", ONE_STEP)
    assert config.task.text == ["review"]
    assert config.task.label == "sentiment"
    assert config.task.labels == ["no", "yes"]
    assert config.model.pooling == "mean"
    result = lorica.Experiment(config).run()
    assert result.privacy["private_release"]
    assert (
        sum(client["records"] for client in result.privacy["clients"])
        == parquet.read_metadata(next(iter(draft.files))).num_rows
    )


def test_a_split_keeps_equal_records_together_and_private(place: Path) -> None:
    data = write_rows(place / "twice.jsonl", [{"text": str(n // 2), "label": n // 2 % 2} for n in range(400)])
    draft = draft_experiment(data, Wishes(split=0.25))
    draft.write()
    train, test = draft.files
    texts = [set(parquet.read_table(file).column("text").to_pylist()) for file in (train, test)]
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == 200
    assert len(texts[1]) == pytest.approx(50, abs=20)
    assert train.stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match=r"twice-train\.parquet exists"):
        draft_experiment(data, Wishes(split=0.25), Path("other.yaml"))


def test_without_a_public_test_set_it_asks_for_one(place: Path) -> None:
    with pytest.raises(UserError, match="published without noise") as raised:
        draft_experiment(reviews(place / "reviews.csv"), Wishes())
    assert raised.value.key == "--test"
    data = reviews(place / "my-train.csv")
    reviews(place / "my-test.csv", 50)
    assert yaml.safe_load(draft_experiment(data, Wishes()).text)["task"]["test"] == str(place / "my-test.csv")


def test_what_a_file_is_for_is_read_from_its_columns(place: Path) -> None:
    draws = np.random.default_rng(0)
    pairs = [{"premise": "a film", "hypothesis": "not good", "label": int(n % 3)} for n in range(300)]
    task = drafted(write_rows(place / "pairs.jsonl", pairs))["task"]
    assert task["type"] == "text-classification"
    assert (task["text"], task["labels"]) == (["premise", "hypothesis"], ["0", "1", "2"])
    numbers = [{"note": text, "score": float(draws.random())} for text in sentences(300, 0)]
    task = drafted(write_rows(place / "numbers.jsonl", numbers))["task"]
    assert (task["type"], task["text"], task["label"]) == ("text-regression", ["note"], "score")
    images = write_rows(place / "images.jsonl", [{"scan": f"{n}.png", "class": "ab"[n % 2]} for n in range(300)])
    task = drafted(images)["task"]
    assert (task["type"], task["image"], task["label"]) == ("image-classification", "scan", "class")
    asked = [{"question": "what", "context": "a film", "answers": {"text": ["film"], "answer_start": [2]}}] * 300
    assert drafted(write_rows(place / "asked.jsonl", asked))["task"]["type"] == "question-answering"
    talks = [{"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "it"}]}] * 300
    draft = drafted(write_rows(place / "talks.jsonl", talks))
    assert (draft["task"]["type"], draft["task"]["text"]) == ("language-modelling", ["messages"])
    assert draft["model"]["head"] == "freeze"
    asks = [{"instruction": "say", "output": "it"}] * 300
    assert drafted(write_rows(place / "asks.jsonl", asks))["task"]["text"] == ["instruction", "output"]
    data = reviews(place / "reviews.jsonl", stars=lambda n: n % 5)
    assert drafted(data, label="stars", text=["review"])["task"]["labels"] == ["0", "1", "2", "3", "4"]
    long = [{"text": "word " * 100, "label": n % 2} for n in range(300)]
    assert drafted(write_rows(place / "long.jsonl", long))["task"]["max_length"] == 160


def test_an_image_folder_has_its_labels_in_its_folders(place: Path) -> None:
    from PIL import Image

    for index in range(60):
        path = place / "scans" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), index, dtype=np.uint8)).save(path)
    draft = draft_experiment(str(place / "scans"), Wishes(test="public", clients=2))
    task = yaml.safe_load(draft.text)["task"]
    assert (task["type"], task["labels"], task["train"]) == ("image-classification", ["a", "b"], str(place / "scans"))
    with pytest.raises(UserError, match="a folder is not split"):
        draft_experiment(str(place / "scans"), Wishes(split=0.1, clients=2))


@pytest.mark.integration
def test_owners_are_those_of_the_data_or_simulated(place: Path) -> None:
    data = reviews(place / "reviews.csv", 2000, hospital=lambda n: "abcd"[n % 4])
    division = drafted(data)["federation"]
    assert (division["clients"], division["partition"], division["by"]) == (4, "column", "hospital")
    assert drafted(data, clients=2)["federation"]["partition"] == "iid"
    load(yaml.safe_load(draft_experiment(data, Wishes(test="public.csv", clients=2)).text))


@pytest.mark.parametrize("target", [1.0, 3.0])
def test_batch_and_noise_suit_the_records_and_epsilon(place: Path, target: float) -> None:
    content = drafted(reviews(place / "reviews.csv", 1200), epsilon=target)
    batch, steps = content["federation"]["batch_size"], 60
    assert content["privacy"]["epsilon"] == target
    assert float(content["privacy"]["delta"]) < 1 / 400

    def noise(size: int) -> float:
        return option(400, size, steps, target, 1e-5).run_noise

    assert noise(batch) <= NEAR * noise(400) < noise(batch // 2)


def test_mistakes_are_named(place: Path) -> None:
    data = reviews(place / "reviews.csv")
    for wishes, message in (
        ({"label": "stars"}, "--label = 'stars': no such column. Choose one of: id, review"),
        ({"task": "text-clasification"}, "--task = .*Did you mean 'text-classification'"),
        ({"clients": 100}, "DATA = .*: a client has 4 records"),
    ):
        with pytest.raises(UserError, match=message):
            drafted(data, **wishes)
    unlabelled = write_rows(place / "unlabelled.jsonl", [{"text": "a"}] * 300)
    with pytest.raises(UserError, match="Name the column to predict: --label COLUMN"):
        drafted(unlabelled)
    (place / "reviews.yaml").write_text("mine")
    with pytest.raises(UserError, match="it exists"):
        drafted(data)
    with pytest.raises(UserError, match="no such file"):
        drafted("missing.csv")


@pytest.mark.parametrize("given", [["--text", "review,note"], ["--text", "review", "--text", "note"]])
def test_both_columns_of_a_pair_are_kept(place: Path, given: list[str]) -> None:
    reviews(place / "reviews.csv", note=lambda n: f"note {n}")
    done = CliRunner().invoke(cli.app, ["init", "reviews.csv", "--test", "public.csv", "--base", "a/b", *given])
    assert done.exit_code == 0, done.output
    assert load("reviews.yaml").task.model_dump()["text"] == ["review", "note"]


@pytest.mark.integration
def test_the_commands(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "console", Console(width=150))
    reviews(place / "reviews.csv")
    done = CliRunner().invoke(cli.app, ["init", "reviews.csv", "--test", "public.csv", "--base", "a/b"])
    assert done.exit_code == 0, done.output
    assert "lorica run reviews.yaml --dry-run" in done.stdout
    content = load("reviews.yaml")
    assert (content.model.base, content.task.train) == ("a/b", "reviews.csv")
    again = CliRunner().invoke(cli.app, ["init", "reviews.csv", "--test", "public.csv"])
    assert (again.exit_code, load("reviews.yaml")) == (2, content)
    planned = CliRunner().invoke(cli.app, ["plan", "--records", "400", "--steps", "60", "--json"])
    rows = json.loads(planned.stdout)["options"]
    for row in rows:
        rate, sigma = row["sampling_rate"], row["noise_multiplier"]
        assert epsilon([Steps(rate, sigma, 60)], 1e-5) == pytest.approx(3.0, abs=0.02)
        assert row["run_noise"] == pytest.approx(sigma / (row["batch_size"] * 60**0.5))
    assert [row["times_least"] for row in rows] == sorted((row["times_least"] for row in rows), reverse=True)
    assert "x least" in CliRunner().invoke(cli.app, ["plan", "--records", "400", "--steps", "60"]).stdout
    wrong = CliRunner().invoke(cli.app, ["plan", "--records", "400", "--steps", "many"])
    assert wrong.exit_code == 2


@pytest.mark.integration
def test_the_smallest_good_batch_is_found_among_all() -> None:
    sizes = usual_batch_sizes(400)
    assert sizes == [8, 16, 32, 64, 128, 256]
    found = smallest_good_batch(400, 60, 3.0, 1e-5, sizes)
    least = least_noise(400, 60, 3.0, 1e-5)
    noises = {size: option(400, size, 60, 3.0, 1e-5).run_noise for size in sizes}
    assert found.batch_size == min(size for size in sizes if noises[size] <= NEAR * least)
    assert smallest_good_batch(400, 60, 3.0, 1e-5, [8, 16]).batch_size == 16
    assert usual_batch_sizes(6) == [6]
