"""Records that nobody wrote, to check a model on where no public ones are at hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from lorica.tasks.kind import TaskKind
from lorica.tasks.readers import Source

TEXTS = ["a b c d e f", "g h i", "j k"]
PIXELS = 16


def made_up(kind: TaskKind, label_names: list[str]) -> Source:
    """Three records with the columns that a task needs: letters, grey noise, the first label or 0."""
    import pyarrow as pa

    return Source("made-up", "records that nobody wrote", pa.table(kind.made_up(label_names)), Path())


def noise_image(seed: int) -> bytes:
    """A square of grey noise, as an encoded image."""
    from PIL import Image

    encoded = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (PIXELS, PIXELS), dtype=np.uint8)
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()
