"""Every command of the guides and of the first page works in its order, on stand-ins for models and data."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from typer.testing import CliRunner

from lorica.cli import app
from tests.causal import CHAT, VOCABULARY, tokenizer
from tests.tasks.conftest import WORDS
from tests.test_examples import EXAMPLES, _bert, _roberta

GUIDES = EXAMPLES.parent / "docs" / "guides"
PAGES = [GUIDES.parent / "README.md", *sorted(GUIDES.glob("*.md"))]
SMALL = ["federation.rounds=1", "federation.local_steps=1", "federation.batch_size=16"]
SMALL += ["privacy.epsilon=null", "privacy.noise_multiplier=1.0"]
each_guide = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [content for named, content in found if named == language]


def commands(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "")).splitlines()
    return [shlex.split(line.partition(" > ")[0], comments=True)[1:] for line in lines if line.startswith("lorica ")]


def holds(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and holds(whole[key], part[key]) for key in part)
    return bool(whole == part)


@each_guide
def test_its_configuration_is_that_of_the_example_it_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in blocks(page, "yaml"):
        (*_, named) = re.findall(r"\[examples/([\w-]+\.yaml)\]", text[: text.index(block)])
        example = yaml.safe_load((EXAMPLES / named).read_text(encoding="utf-8"))
        assert holds(example, yaml.safe_load(block)), f"{block} is not in {named}"


# Data and models, as the guides describe them.


def _texts(index: int, labels: list[str], *columns: str) -> dict[str, str]:
    draws = np.random.default_rng(index)
    return {column: " ".join(draws.choice(WORDS, 6)) + f" {index}" for column in columns[:-1]} | {
        columns[-1]: labels[index % len(labels)]
    }


def _write_csv(path: str, rows: list[dict[str, str]]) -> None:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_lines(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _write_texts() -> None:
    for name, start, count in (("reviews", 0, 240), ("public-reviews", 1000, 20)):
        _write_csv(
            f"{name}.csv",
            [_texts(index, ["negative", "positive"], "review", "sentiment") for index in range(start, start + count)],
        )
    _write_csv("new-reviews.csv", [{"review": "a fine film"}, {"review": "dull at all"}])
    ratings = [f"{number / 10}" for number in range(10, 50)]
    for name, start, count in (("ratings", 2000, 240), ("public-ratings", 3000, 20)):
        _write_csv(f"{name}.csv", [_texts(index, ratings, "review", "rating") for index in range(start, start + count)])


def _write_pairs() -> None:
    verdicts = ["entailment", "neutral", "contradiction"]
    for name, start, count in (("claims", 0, 240), ("public-claims", 1000, 20)):
        _write_csv(
            f"{name}.csv",
            [_texts(index, verdicts, "report", "claim", "verdict") for index in range(start, start + count)],
        )


def _write_images() -> None:
    draws = np.random.default_rng(0)
    for folder, each in (("scans", 24), ("public-scans", 2)):
        for label in range(10):
            target = Path(folder, str(label))
            target.mkdir(parents=True)
            for number in range(each):
                pixels = draws.integers(0, 256, (8, 8), dtype=np.uint8)
                # The guide predicts `public-scans/3/0.png` and `public-scans/5/1.png`.
                Image.fromarray(pixels).save(target / f"{number}.png")


def _write_questions() -> None:
    for name, start, count in (("questions", 0, 240), ("public-questions", 1000, 20)):
        rows = []
        for index in range(start, start + count):
            words = [*np.random.default_rng(index).choice(WORDS, 8), str(index)]
            answers = {"text": [words[2]], "answer_start": [len(" ".join(words[:2])) + 1]}
            rows.append({"question": f"{words[2]} {index}", "context": " ".join(words), "answers": answers})
        _write_lines(f"{name}.jsonl", rows)


def _write_chats() -> None:
    for name, start, count in (("chats", 0, 240), ("public-chats", 1000, 20)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"what is it {index}"},
                    {"role": "assistant", "content": "it is a fine film"},
                ]
            }
            for index in range(start, start + count)
        ]
        _write_lines(f"{name}.jsonl", rows)


def _qwen(folder: Path) -> None:
    words = tokenizer()
    words.chat_template = CHAT
    words.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(vocab_size=VOCABULARY + 1, **sizes, **heads)
    ).save_pretrained(folder)


DATA = {
    "README": _write_texts,
    "text": _write_texts,
    "pairs": _write_pairs,
    "images": _write_images,
    "questions": _write_questions,
    "chat": _write_chats,
}
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
BASES: dict[str, Callable[[Path], None]] = {
    ENCODER: _bert,
    "FacebookAI/roberta-base": _roberta,
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen,
}


def stand_in(base: str, folder: Path) -> str:
    """A tiny model of the same family, with random weights."""
    if base.startswith("lorica:"):
        return base
    if not folder.exists():
        folder.mkdir()
        torch.manual_seed(0)
        BASES[base](folder)
    return str(folder)


@pytest.mark.usefixtures("checked_once", "without_report")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.integration if page.stem == "text" else pytest.mark.slow)
        for page in PAGES
    ],
)
def test_its_commands_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    DATA[page.stem]()
    ran = []
    for command in commands(page):
        arguments = list(command)
        if arguments[0] == "init":
            if "--base" not in arguments:
                arguments += ["--base", ENCODER]
            arguments[-1] = stand_in(arguments[-1], tmp_path / "base")
        if arguments[0] == "run":
            arguments += SMALL
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"lorica {shlex.join(command)}\n{result.output}"
        if arguments[0] == "predict":
            assert result.stdout.strip()
        ran.append(arguments[0])
    assert {"init", "run", "predict", "evaluate"} <= set(ran)
    # That of images is for a model of photographs, and the guide trains one of grey images.
    if page.stem != "images":
        for block in blocks(page, "python"):
            exec(block, {})
