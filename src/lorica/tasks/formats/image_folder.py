"""Folders of images, whose subfolders are the labels."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.errors import UserError
from lorica.tasks.formats.paths import check_regular
from lorica.tasks.formats.text_files import check_text

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
ANNOTATIONS = "val_annotations.txt"
LAYOUT = f"FOLDER/label/image, where the image ends in {', '.join(sorted(IMAGE_SUFFIXES))}"


def read_image_folder(path: Path, key: str, image: str, label: str) -> pa.Table:
    """`FOLDER/label/image`, and Tiny-ImageNet's layouts: `FOLDER/label/images/image`, and `FOLDER/images/image` with
    the labels in `val_annotations.txt`. A warning says which files are in no such place or of another format.

    Args:
        key: the configuration's key that names the folder, for errors.
        image, label: what to call the columns: paths relative to the folder, and labels.

    Raises:
        UserError: there are no images, one is a FIFO or a device, or a line of the annotations is not an image and its
            label.
    """
    import pyarrow as pa

    annotations = path / ANNOTATIONS
    labelled = _annotated(annotations, key) if annotations.exists() else _by_folder(path, key)
    skipped = _skipped(path, {name for name, _ in labelled} | {ANNOTATIONS})
    if not labelled:
        problem = f"no images in the subfolders of this folder{skipped and f' (it has {skipped})'}"
        raise UserError(key, str(path), problem, f"arrange the images as {LAYOUT}")
    if skipped:
        logger.warning("%s: skipped %s; images are read from %s", path.name, skipped, LAYOUT)
    names, labels = zip(*labelled, strict=True)
    return pa.table({image: list(names), label: list(labels)})


def has_images(folder: Path) -> bool:
    """Whether a folder's subfolders hold images."""
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.glob("*/*"))


def _annotated(annotations: Path, key: str) -> list[tuple[str, str]]:
    check_regular(annotations, key)
    check_text(annotations, key)
    labelled = []
    # Not splitlines, which also ends lines at characters that may be in a name.
    for number, line in enumerate(annotations.read_text(encoding="utf-8-sig").split("\n"), start=1):
        fields = line.rstrip("\r").split("\t")
        if not line.strip():
            continue
        if len(fields) < 2:
            problem = f"line {number} of {annotations.name} is not an image and its label, separated by a tab"
            raise UserError(key, str(annotations.parent), problem, f"correct {annotations}")
        labelled.append((f"images/{fields[0]}", fields[1]))
    return labelled


def _by_folder(path: Path, key: str) -> list[tuple[str, str]]:
    files = [file for pattern in ("*/*", "*/images/*") for file in path.glob(pattern) if _is_image(file, path)]
    for file in files:
        check_regular(file, key)
    named = [file.relative_to(path) for file in sorted(files)]
    return [(str(name), name.parts[0]) for name in named]


def _is_image(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _skipped(folder: Path, taken: set[str]) -> str:
    """How many other files there are of each suffix, hidden ones left out; "" for none."""
    found: Counter[str] = Counter()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place).relative_to(folder)
        names = [name for name in files if not name.startswith(".") and str(here / name) not in taken]
        found.update(Path(name).suffix.lower() or "without a suffix" for name in names)
    return ", ".join(f"{count:,} × {suffix}" for suffix, count in found.most_common(10))
