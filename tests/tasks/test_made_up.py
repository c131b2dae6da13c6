"""Made-up records fit every task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorica.config import TaskConfig
from lorica.tasks.loading import load_training
from tests.tasks.test_whole_runs import write_rows

TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text-classification": ({"labels": ["no", "yes"]}, {"text": "fine film", "label": "yes"}),
    "a pair of texts": (
        {"type": "text-classification", "text": ["one", "two"], "labels": ["0", "1"], "max_length": 4},
        {"one": "fine", "two": "film", "label": 1},
    ),
    "text-regression": ({}, {"text": "fine film", "label": 0.5}),
    "question-answering": (
        {"max_question": 4, "stride": 2, "max_length": 16},
        {"question": "fine", "context": "a fine film", "answers": {"text": ["fine"], "answer_start": [2]}},
    ),
    "language-modelling": ({}, {"text": "a fine film"}),
    "prompt and completion": (
        {"type": "language-modelling", "text": ["one", "two"]},
        {"one": "a fine", "two": "film"},
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_three_texts_of_different_lengths(name: str, tmp_path: Any, text_base: str) -> None:
    options, row = TASKS[name]
    train = write_rows(tmp_path / "train.jsonl", [row] * 4)
    config = TaskConfig(**{"type": name, "train": train, "test": "server"} | options)
    made_up = load_training(config, text_base).test
    assert len(made_up) == 3
    inputs = next(iter(made_up.micro_batches(np.arange(3), 10**6))).inputs
    assert inputs["attention_mask"].shape[0] == 3
    if "max_length" not in options:
        assert len(set(inputs["attention_mask"].sum(1).tolist())) == 3


def test_three_images(grey_base: str) -> None:
    config = TaskConfig(
        type="image-classification",
        train="lorica:digits/train",
        test="server",
        labels=[str(digit) for digit in range(10)],
    )
    made_up = load_training(config, grey_base).test
    pixels = next(iter(made_up.micro_batches(np.arange(3), 10**6))).inputs["pixel_values"]
    assert pixels.shape == (3, 1, 8, 8)
    assert float(pixels.std(0).mean()) > 0.1
