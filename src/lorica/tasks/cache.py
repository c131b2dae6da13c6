"""Prepared records on disk: made once, read through the page cache, shared by parallel runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from lorica.errors import UserError
from lorica.files import cache_folder, sync_folder

VERSION = 2
LAYOUT = "arrays.json"
ABANDONED_SECONDS = 24 * 3600.0
_CHUNK = 2**24
_folder: ContextVar[Path | None] = ContextVar("folder of prepared records", default=None)
logger = logging.getLogger(__name__)


class Arrays:
    """Writes arrays that grow along their first axis into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layout: dict[str, tuple[str, list[int]]] = {}
        self._sums: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Add rows to an array; its type and the shape of a row are those of the first call."""
        kind, shape = self._layout.setdefault(name, (str(values.dtype), [0, *values.shape[1:]]))
        if (kind, shape[1:]) != (str(values.dtype), list(values.shape[1:])):
            raise ValueError(f"rows of {name} are {kind} {shape[1:]}, not {values.dtype} {list(values.shape[1:])}")
        content = np.ascontiguousarray(values).tobytes()
        with (self._folder / name).open("ab") as file:
            file.write(content)
        self._sums[name] = zlib.crc32(content, self._sums.get(name, 0))
        shape[0] += len(values)

    def finish(self) -> None:
        """Write what the arrays are, and sync all files."""
        content = {"arrays": self._layout, "crc32": self._sums}
        (self._folder / LAYOUT).write_text(json.dumps(content | {"layout_crc32": _sum_of(content)}))
        sync_folder(self._folder)


@contextmanager
def nothing_cached() -> Iterator[None]:
    """Within it, arrays are made in a temporary folder: what is predicted once need not be kept."""
    with tempfile.TemporaryDirectory(prefix="lorica-") as folder:
        token = _folder.set(Path(folder))
        try:
            yield
        finally:
            _folder.reset(token)


def cached_arrays(key: Iterable[str], make: Callable[[Arrays], None]) -> dict[str, np.ndarray]:
    """Arrays that `make` writes, made only where no earlier run has made them; memory-mapped, read-only.

    They lie under Lorica's cache folder, readable by the owner alone since they are private records in another form; it
    may be deleted at any time. A folder is synced and renamed into place when it is whole, so parallel runs and crashes
    leave no half of one; of two runs that make the same, one is kept. Arrays that do not match their checksums are made
    again.

    Args:
        key: everything that the arrays depend on.

    Raises:
        UserError: the disk is full, or the cache folder cannot be written.
    """
    name = hashlib.sha256(json.dumps([VERSION, *key]).encode()).hexdigest()[:40]
    final = (_folder.get() or cache_folder()) / "records" / name
    try:
        if not _is_whole(final):
            final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _remove_abandoned(final.parent)
            temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{name}."))
            try:
                arrays = Arrays(temporary)
                make(arrays)
                arrays.finish()
                try:
                    os.replace(temporary, final)
                except OSError:
                    # Another run was faster; what it made is the same.
                    if not _is_whole(final):
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        layout = json.loads((final / LAYOUT).read_text())["arrays"]
        return {array: _mapped(final / array, kind, tuple(shape)) for array, (kind, shape) in layout.items()}
    except OSError as error:
        raise UserError(
            "LORICA_HOME",
            str(cache_folder()),
            f"prepared records cannot be stored there ({error.strerror})",
            "free disk space, or set the environment variable LORICA_HOME to a folder with more space",
        ) from error


def _remove_abandoned(parent: Path) -> None:
    """Delete what killed processes left; younger folders may belong to a process that is still writing."""
    for folder in parent.glob(".*"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether all arrays are there and match their checksums. A damaged folder is deleted."""
    if not folder.exists():
        return False
    try:
        content = json.loads((folder / LAYOUT).read_text())
        whole = content.pop("layout_crc32") == _sum_of(content) and all(
            (folder / name).stat().st_size == math.prod(shape) * np.dtype(kind).itemsize
            and _sum_of_file(folder / name) == content["crc32"][name]
            for name, (kind, shape) in content["arrays"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        logger.warning("the prepared records in %s are damaged and are prepared again", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return whole


def _sum_of(content: object) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _sum_of_file(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def _mapped(path: Path, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r", shape=shape)
