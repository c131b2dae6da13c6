"""Image classification records: decoded, resized and normalised once."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.errors import UserError
from lorica.tasks.labels import is_text
from lorica.tasks.readers import Source
from lorica.tasks.records import Batch, Records, digest, stack_digests

# Decoded images that exist beside the result at a time.
SLICE = 256
# What convolutional models count as a patch, for the size of their micro-batches.
DEFAULT_PATCH = 16


@dataclass(frozen=True, eq=False)
class ImageRecords(Records):
    """Images as the model takes them; record i is `pixels[rows[i]]`.

    Attributes:
        pixels: (m, channels, height, width) float32, shared between subsets.
        rows: (n,) int64.
        patches: patches per image.
    """

    pixels: Tensor
    rows: np.ndarray
    patches: int

    @property
    def lengths(self) -> np.ndarray:
        return np.broadcast_to(np.int64(self.patches), self.rows.shape)

    def subset(self, indices: np.ndarray) -> ImageRecords:
        return replace(self, labels=self.labels[indices], digests=self.digests[indices], rows=self.rows[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        pixels = self.pixels[torch.from_numpy(self.rows[indices])]
        return Batch({"pixel_values": pixels}, torch.from_numpy(self.labels[indices]))


@dataclass(frozen=True)
class Preprocessing:
    """How a model takes images.

    Attributes:
        base: model folder or hub id, for error messages.
        processor: the model's image processor from transformers.
        channels: 1 (grey) or 3 (RGB).
        patch: height and width of a patch.
    """

    base: str
    processor: Any
    channels: int
    patch: tuple[int, int]


def load_preprocessing(base: str) -> Preprocessing:
    """The image processor and the input shape of a model folder or hub id; a folder is read without the network.

    Raises:
        UserError: one of them cannot be loaded, or the model takes neither one nor three channels.
    """
    from transformers import AutoConfig, AutoImageProcessor

    local = Path(base).is_dir()
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=local)
        # With torchvision installed, transformers would resize with it by default, and get slightly other pixels.
        processor = AutoImageProcessor.from_pretrained(base, local_files_only=local, backend="pil")
    except (OSError, ValueError, ImportError):
        raise UserError(
            "model.base",
            base,
            "its configuration or its image processor cannot be loaded",
            "give a hub id that can be reached, or a folder with config.json and preprocessor_config.json",
        ) from None
    # Colours are converted here, to the model's number of channels; processors only know RGB.
    processor.do_convert_rgb = False
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3)
    if channels not in (1, 3):
        raise UserError("model.base", base, f"it takes images of {channels} channels", "give a model for 1 or 3")
    patch = getattr(vision, "patch_size", None) or DEFAULT_PATCH
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return Preprocessing(base, processor, channels, (height, width))


def process(
    source: Source, column: str, labels: np.ndarray, label_names: list[str], preprocessing: Preprocessing
) -> ImageRecords:
    """Decode, resize and normalise a column of images.

    The column holds encoded bytes, `{bytes, path}` as Hugging Face datasets store images, or paths relative to the
    source. Images are turned as their EXIF orientation says and converted to the model's number of channels.

    Args:
        labels: (n,) int64 positions in `label_names`.

    Raises:
        UserError: the column holds no images; an image is missing, cannot be decoded, or has more than 8 bits per
            channel (which part of their range matters is the data owner's decision); the image processor does not
            bring all images to one size.
    """
    values = source.table.column(column)
    _check_type(source, column, values.type)
    mode = "L" if preprocessing.channels == 1 else "RGB"
    names = [name.encode() for name in label_names]
    pixels, digests = torch.empty(0), []
    for start in range(0, len(labels), SLICE):
        encoded = [
            _encoded(source, column, start + offset, value)
            for offset, value in enumerate(values.slice(start, SLICE).to_pylist())
        ]
        digests += [
            digest([content, names[label]])
            for content, label in zip(encoded, labels[start : start + SLICE], strict=True)
        ]
        images = [_decode(source, column, start + offset, content, mode) for offset, content in enumerate(encoded)]
        processed = _normalise(images, preprocessing)
        if start == 0:
            pixels = torch.empty(len(labels), *processed.shape[1:])
        if processed.shape[1:] != pixels.shape[1:]:
            raise _not_one_size(preprocessing)
        pixels[start : start + SLICE] = processed
    height, width = pixels.shape[-2:]
    patches = math.ceil(height / preprocessing.patch[0]) * math.ceil(width / preprocessing.patch[1])
    return ImageRecords(labels, stack_digests(digests), pixels, np.arange(len(labels)), patches)


def _check_type(source: Source, column: str, kind: Any) -> None:
    import pyarrow as pa

    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    binary = str(kind) in ("binary", "large_binary", "binary_view")
    if not (binary or is_text(kind) or "bytes" in fields):
        problem = f"the column of {source.name} holds {kind}, not images"
        raise UserError("task.image", column, problem, "name a column of encoded images or of paths to image files")


def _encoded(source: Source, column: str, index: int, value: bytes | str | dict[str, Any]) -> bytes:
    """The encoded image behind one value of an image column."""
    content = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    try:
        return (source.folder / (content or "")).read_bytes()
    # A path with a null byte is a ValueError.
    except (OSError, ValueError):
        problem = f"the image of record {index} (counted from 0), column {column!r}, is not there"
        raise source.error(problem, f"give paths relative to {source.folder}, or remove the record") from None


def _decode(source: Source, column: str, index: int, content: bytes, mode: str) -> Any:
    from PIL import Image, ImageOps

    place = f"record {index} (counted from 0), column {column!r},"
    try:
        image = Image.open(io.BytesIO(content))
        # Converting these modes would cut their values off at 255.
        deep = image.mode.startswith(("I", "F"))
        converted = ImageOps.exif_transpose(image).convert(mode)
    # Decoders raise whatever a broken file makes them stumble over.
    except Exception:
        raise source.error(f"{place} is not a readable image", "write the image again or remove the record") from None
    if deep:
        raise source.error(f"{place} has more than 8 bits per channel", "convert the images to 8 bits")
    return converted


def _normalise(images: list[Any], preprocessing: Preprocessing) -> Tensor:
    try:
        pixels = preprocessing.processor(images=images, return_tensors="np")["pixel_values"]
    except ValueError:
        raise _not_one_size(preprocessing) from None
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))


def _not_one_size(preprocessing: Preprocessing) -> UserError:
    return UserError(
        "model.base",
        preprocessing.base,
        f"its image processor does not bring all images to one size with {preprocessing.channels} channel(s)",
        "set size (height and width), image_mean and image_std (one value per channel) in preprocessor_config.json",
    )
