"""The embedded data set: scikit-learn's 1797 handwritten digits, which need no download."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

TEST_RECORDS = 360


def load(split: str) -> tuple[list[Image], np.ndarray]:
    """The digits of one split.

    Args:
        split: `train` (1437 records) or `test` (360 records, the same shares of every digit, always the same ones).

    Returns:
        8×8 grey images (mode `L`; the data's 0 to 16 becomes 0 to 255) and (n,) int64 labels 0 to 9.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=TEST_RECORDS, stratify=digits.target, random_state=0
    )
    rows = np.sort(train if split == "train" else test)
    pixels = np.rint(digits.images[rows] * 255 / 16).astype(np.uint8)
    return [Image.fromarray(image) for image in pixels], digits.target[rows].astype(np.int64)


def table(split: str, image: str, label: str) -> pa.Table:
    """The digits of one split as columns `image` (PNG bytes) and `label` (integers)."""
    import pyarrow as pa

    images, labels = load(split)
    return pa.table({image: [_png(picture) for picture in images], label: labels})


def _png(image: Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return encoded.getvalue()
