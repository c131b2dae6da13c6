"""The embedded backbone: small, loadable offline without a warning, as documented, and good but not finished."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, ViTForImageClassification

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src/lorica/defaults/glyph-vit"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/pretrain_glyph_vit.py, which is not part of the package."""
    return load_script(ROOT / "scripts/pretrain_glyph_vit.py")


@pytest.fixture(scope="module")
def model() -> ViTForImageClassification:
    """The committed backbone in evaluation mode."""
    return ViTForImageClassification.from_pretrained(FOLDER, local_files_only=True).eval()


def test_weights_are_small_and_the_documented_ones() -> None:
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert len(weights) <= 2_000_000
    text = (FOLDER / "PROVENANCE.md").read_text(encoding="utf-8")
    assert hashlib.sha256(weights).hexdigest() in text
    assert f"{len(weights)} bytes" in text


def test_loads_offline_without_a_key_out_of_place_or_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The library keeps its records from the root logger, where caplog listens.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, report = ViTForImageClassification.from_pretrained(FOLDER, local_files_only=True, output_loading_info=True)
    AutoImageProcessor.from_pretrained(FOLDER, local_files_only=True)
    assert not any(report.values()), report
    assert caplog.records == []
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}


def test_parameters_are_finite(model: ViTForImageClassification) -> None:
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_image_processor_takes_grey_images_of_eight_by_eight() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    assert grey.mode == "L"
    values = AutoImageProcessor.from_pretrained(FOLDER)(grey, return_tensors="pt")["pixel_values"]
    expected = np.asarray(grey.resize((16, 16), Image.Resampling.BILINEAR)) / 127.5 - 1
    assert values.shape == (1, 1, 16, 16)
    np.testing.assert_allclose(values[0, 0].numpy(), expected, atol=1e-6)


def test_handwriting_is_partly_read_before_any_fine_tuning(
    model: ViTForImageClassification, script: ModuleType
) -> None:
    digits = load_digits()
    accuracy = script.accuracy(model, script.pixel_values(digits.images), digits.target)
    assert 0.5 < accuracy < 0.85
    documented = re.search(r"handwritten digits.*?\| (0\.\d+),", (FOLDER / "PROVENANCE.md").read_text(encoding="utf-8"))
    assert documented is not None
    # A few images lie on the decision boundary, and processors round differently.
    assert accuracy == pytest.approx(float(documented[1]), abs=0.005)


def test_every_font_renders_every_digit_as_block_counts(script: ModuleType) -> None:
    generator = np.random.default_rng(0)
    for font in script.FONTS:
        for digit in range(10):
            counts = script.render_glyph(font, digit, generator)
            assert counts.shape == (8, 8)
            assert counts.dtype == np.uint8
            assert counts.max() <= 16
            assert counts[0].any()
            assert counts[-1].any()


def test_rendering_depends_on_the_seed_alone(script: ModuleType) -> None:
    first, labels = script.render_glyphs(20, script.TRAINING_FONTS, np.random.default_rng(3))
    again, _ = script.render_glyphs(20, script.TRAINING_FONTS, np.random.default_rng(3))
    other, _ = script.render_glyphs(20, script.TRAINING_FONTS, np.random.default_rng(4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 2))
