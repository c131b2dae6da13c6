"""Image classification records: decoded and resized once, kept as bytes on disk, normalised in each batch."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.errors import UserError
from lorica.pretrained import from_pretrained
from lorica.tasks.cache import Arrays, cached_arrays
from lorica.tasks.labels import UNKNOWN, is_text
from lorica.tasks.readers import Source
from lorica.tasks.records import Batch, Records, digest, stack_digests

# Encoded images, and bytes of decoded ones, that exist beside the result at a time.
SLICE = 256
DECODED = 256 * 2**20
# Others have decoders that run programs (EPS) or belong to scientific data.
DECODERS = ("PNG", "JPEG", "MPO", "JPEG2000", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LONGEST_PATH = 200
# What convolutional models count as a patch, for the size of their micro-batches.
DEFAULT_PATCH = 16


@dataclass(frozen=True, eq=False)
class ImageRecords(Records):
    """Images of the model's size; record i is `pixels[rows[i]]`.

    Attributes:
        pixels: (m, channels, height, width) uint8 before normalisation, or float32 after it; memory-mapped, shared
            between subsets.
        rows: (n,) int64.
        patches: patches per image.
        scale, mean, deviation: a byte x becomes `(scale · x - mean) / deviation`, the last two (channels, 1, 1)
            float32; float pixels stay as they are.
    """

    pixels: np.ndarray
    rows: np.ndarray
    patches: int
    scale: float = 1.0
    mean: Tensor = field(default_factory=lambda: torch.zeros(1))
    deviation: Tensor = field(default_factory=lambda: torch.ones(1))

    @property
    def lengths(self) -> np.ndarray:
        return np.broadcast_to(np.int64(self.patches), self.rows.shape)

    def subset(self, indices: np.ndarray) -> ImageRecords:
        return replace(self, labels=self.labels[indices], digests=self.digests[indices], rows=self.rows[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        pixels = torch.from_numpy(self.pixels[self.rows[indices]])
        if pixels.dtype == torch.uint8:
            pixels = (self.scale * pixels.float() - self.mean) / self.deviation
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

    what = "its configuration or its image processor"
    remedy = "give the id of a model on the hub, or a folder with config.json and preprocessor_config.json"
    config = from_pretrained(AutoConfig.from_pretrained, base, what, remedy)
    # With torchvision installed, transformers would resize with it by default, and get slightly other pixels.
    processor = from_pretrained(AutoImageProcessor.from_pretrained, base, what, remedy, backend="pil")
    # Colours are converted here, to the model's number of channels; processors only know RGB.
    processor.do_convert_rgb = False
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3)
    if channels not in (1, 3):
        raise UserError(
            "model.base",
            base,
            f"it requires images with {channels} channels",
            "use a model for images with 1 or 3 channels",
        )
    patch = getattr(vision, "patch_size", None) or DEFAULT_PATCH
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return Preprocessing(base, processor, channels, (height, width))


def save_preprocessing(preprocessing: Preprocessing, folder: Path) -> None:
    """Write the image processor's file, for transformers, which turns other images than RGB into RGB itself."""
    processor = copy.copy(preprocessing.processor)
    processor.do_convert_rgb = preprocessing.channels == 3
    processor.save_pretrained(folder)


def process(
    source: Source, column: str, labels: np.ndarray, label_names: list[str], preprocessing: Preprocessing
) -> ImageRecords:
    """Decode and resize a column of images, once for the same content and processor.

    The column holds encoded bytes, `{bytes, path}` as Hugging Face datasets store images, or paths relative to the
    source. Images are turned as their EXIF orientation says and converted to the model's number of channels.

    Args:
        labels: (n,) int64 positions in `label_names`, or `UNKNOWN`.

    Raises:
        UserError: the column holds no images; an image is missing, cannot be decoded, or has more than 8 bits per
            channel (which part of their range matters is the data owner's decision); the image processor does not
            bring all images to one size.
    """
    values = source.table.column(column)
    _check_type(source, column, values.type)
    mode = "L" if preprocessing.channels == 1 else "RGB"
    names = [name.encode() for name in label_names]

    def encoded(start: int) -> list[bytes]:
        slice_ = values.slice(start, SLICE).to_pylist()
        return [_encoded(source, column, start + offset, value) for offset, value in enumerate(slice_)]

    digests = stack_digests(
        [
            digest([content, names[label] if (label := labels[start + offset]) != UNKNOWN else b""])
            for start in range(0, len(labels), SLICE)
            for offset, content in enumerate(encoded(start))
        ]
    )

    def make(arrays: Arrays) -> None:
        shape = None
        for start in range(0, len(labels), SLICE):
            for images in _decoded(source, column, start, encoded(start), mode):
                pixels = _resized(images, preprocessing)
                shape = shape or (pixels.dtype, pixels.shape[1:])
                if (pixels.dtype, pixels.shape[1:]) != shape:
                    raise _not_one_size(preprocessing)
                arrays.append("pixels", pixels)

    processor = preprocessing.processor
    content = hashlib.sha256(digests.tobytes()).hexdigest()
    pixels = cached_arrays(["images", content, processor.to_json_string(), mode], make)["pixels"]
    height, width = pixels.shape[-2:]
    patches = math.ceil(height / preprocessing.patch[0]) * math.ceil(width / preprocessing.patch[1])
    return ImageRecords(labels, digests, pixels, np.arange(len(labels)), patches, *_normalisation(preprocessing))


def _check_type(source: Source, column: str, kind: Any) -> None:
    import pyarrow as pa

    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    binary = str(kind) in ("binary", "large_binary", "binary_view")
    if not (binary or is_text(kind) or "bytes" in fields):
        problem = f"the column of {source.name} holds {kind}, not images"
        raise UserError("task.image", column, problem, "choose a column of encoded images or of paths to image files")


def _encoded(source: Source, column: str, index: int, value: bytes | str | dict[str, Any]) -> bytes:
    """The encoded image behind one value of an image column."""
    content = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    path = source.folder / (content or "")
    try:
        # A FIFO or a device is never opened: reading it may not end.
        if path.is_file():
            return path.read_bytes()
    # A path with a null byte is a ValueError.
    except (OSError, ValueError):
        pass
    problem = f"the image {_name(source, column, index)} is missing, or is not a file that can be read"
    raise source.error(problem, f"write paths relative to {source.folder}, or remove the record")


def _name(source: Source, column: str, index: int) -> str:
    """How an error calls an image: by its path, or by the number of its record."""
    value = source.table.column(column)[index].as_py()
    path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    if isinstance(path, str):
        return f"{path[:LONGEST_PATH]!r} (record {index}, counted from 0)"
    return f"of record {index} (counted from 0), column {column!r},"


def _decoded(source: Source, column: str, start: int, contents: list[bytes], mode: str) -> Iterator[list[Any]]:
    """The images from record `start` on, so many at a time that they take about `DECODED` bytes."""
    images, size = [], 0
    for index, content in enumerate(contents, start):
        images.append(_decode(source, column, index, content, mode))
        size += images[-1].width * images[-1].height * len(mode)
        if size >= DECODED:
            yield images
            images, size = [], 0
    if images:
        yield images


def _decode(source: Source, column: str, index: int, content: bytes, mode: str) -> Any:
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # More pixels than any photo, in a file of any size.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        if image.format not in DECODERS:
            raise ValueError(image.format)
        # Converting these modes would cut their values off at 255.
        deep = image.mode.startswith(("I", "F"))
        converted = ImageOps.exif_transpose(image).convert(mode)
    # Decoders raise whatever a broken file makes them stumble over.
    except Exception as error:
        what = _what_is_wrong(error, content)
        problem = f"the image {_name(source, column, index)} {what}"
        raise source.error(problem, "replace the image or remove the record") from None
    if deep:
        problem = f"the image {_name(source, column, index)} has more than 8 bits per channel"
        raise source.error(problem, "convert the images to 8 bits")
    return converted


def _what_is_wrong(error: Exception, content: bytes) -> str:
    from PIL import Image

    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "has more pixels than any photo"
    if content.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image"
    return "is empty" if not content else "is not a readable image"


def _normalisation(preprocessing: Preprocessing) -> tuple[float, Tensor, Tensor]:
    """Scale, mean and deviation of the processor's last steps, as far as it takes them."""
    processor, channels = preprocessing.processor, preprocessing.channels
    scale = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
    normalises = getattr(processor, "do_normalize", False)
    mean = processor.image_mean if normalises else [0.0] * channels
    deviation = processor.image_std if normalises else [1.0] * channels
    if not len(mean) == len(deviation) == channels:
        raise _not_one_size(preprocessing)
    return scale, torch.tensor(mean)[:, None, None], torch.tensor(deviation)[:, None, None]


def _resized(images: list[Any], preprocessing: Preprocessing) -> np.ndarray:
    """(n, channels, height, width): uint8 where the processor's last steps are those of `_normalisation`, which take a
    quarter of the room; else float32, wholly processed.
    """
    try:
        found = preprocessing.processor(images=images, return_tensors="np", do_rescale=False, do_normalize=False)
        whole = preprocessing.processor(images=images[:1], return_tensors="np")["pixel_values"]
    except ValueError:
        raise _not_one_size(preprocessing) from None
    pixels: np.ndarray = np.asarray(found["pixel_values"])
    as_bytes: np.ndarray = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    scale, mean, deviation = _normalisation(preprocessing)
    first = (scale * torch.from_numpy(as_bytes[:1]).float() - mean) / deviation
    if np.array_equal(as_bytes, pixels) and np.allclose(first.numpy(), whole, atol=1e-5):
        return as_bytes
    whole = preprocessing.processor(images=images, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(whole, dtype=np.float32)


def _not_one_size(preprocessing: Preprocessing) -> UserError:
    return UserError(
        "model.base",
        preprocessing.base,
        f"its image processor does not convert all images to one size with {preprocessing.channels} channel(s)",
        "set size (height and width), image_mean and image_std (one value per channel) in preprocessor_config.json",
    )
