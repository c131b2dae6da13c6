"""Records that nobody wrote, to check a model on where no public ones are at hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from lorica.config import TaskConfig
from lorica.tasks.readers import Source

TEXTS = ["a b c d e f", "g h i", "j k"]
PIXELS = 16


def made_up(config: TaskConfig, label_names: list[str]) -> Source:
    """Three records with the columns that a task needs: letters, grey noise, the first label or 0."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    if config.type == "image-classification":
        columns[config.image] = [_noise(seed) for seed in range(len(TEXTS))]
    elif config.type == "question-answering":
        columns[config.question] = columns[config.context] = TEXTS
        columns[config.answers] = [{"text": [text[0]], "answer_start": [0]} for text in TEXTS]
    else:
        columns |= dict.fromkeys(config.text, TEXTS)
    if config.type == "text-regression":
        columns[config.label] = [0.0] * len(TEXTS)
    elif config.type.endswith("classification"):
        columns[config.label] = [label_names[0]] * len(TEXTS)
    return Source("made-up", "records that nobody wrote", pa.table(columns), Path())


def _noise(seed: int) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (PIXELS, PIXELS), dtype=np.uint8)
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()
