"""Atomic and durable writes, and the folders where Lorica keeps its own files."""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorica.errors import UserError
from lorica.paths import user_path

INCOMPLETE = ".incomplete"
"""Ending of hidden files and folders that are not renamed yet; a killed process leaves them behind."""


def home_folder() -> Path:
    """`$LORICA_HOME`, or `~/.lorica`: caches, and ledgers of data sets that have no folder of their own.

    Raises:
        UserError: there is no such path, or this account has no home folder.
    """
    return user_path("LORICA_HOME", os.environ.get("LORICA_HOME") or "~/.lorica")


def cache_folder() -> Path:
    """Folder of the caches, which may be deleted at any time."""
    return home_folder() / "cache"


def sha256_of(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` into the `UserError` that says what cannot be written.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free disk space" if full else "make its folder writable"
        raise UserError(
            "file", str(path), f"cannot be written ({error.strerror})", f"{remedy}, or choose another folder"
        ) from error


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write to a temporary file, sync it and rename it: after a crash, the file has the old or the new content.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(INCOMPLETE, f".{path.name}.", path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def create_private(path: Path) -> None:
    """Create an empty file if there is none, and let only its owner read and write it, whatever the umask.

    A file that belongs to another account keeps its permissions.

    Raises:
        OSError: the folder is not writable.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        with suppress(PermissionError):
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> Path:
    """Create a folder if there is none, let only its owner access it, whatever the umask, and return it.

    A folder that belongs to another account keeps its permissions.

    Raises:
        OSError: the folder cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    with suppress(PermissionError):
        path.chmod(0o700)
    return path


@contextmanager
def throwaway_folder() -> Iterator[Path]:
    """A folder that is deleted afterwards; in memory if possible, where synced writes do not wait for a disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lorica-", dir=memory) as folder:
        yield Path(folder)


def append_line(path: Path, line: str, private: bool = False) -> None:
    """Append one line and sync it.

    Args:
        private: only the owner may read the file.

    Raises:
        UserError: the disk is full, or the file is not writable.
    """
    with write_errors(path):
        if private:
            create_private(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to. Synced, it replaces `folder` when the context ends without an error.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    temporary = folder.with_name(f".{folder.name}{INCOMPLETE}")
    with write_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sync_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)


def sync_folder(folder: Path) -> None:
    """Sync a folder and all files in it, so that after a power failure a renamed folder is not empty."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_incomplete(folder: Path) -> None:
    """Delete what killed processes left in a folder before they could rename it."""
    for path in folder.glob(f".*{INCOMPLETE}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a JSON object in UTF-8, or is nested too deeply.
    """
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def to_json(value: Any, **options: Any) -> str:
    """JSON with null for infinity and NaN, which JSON does not have.

    >>> to_json({"loss": math.nan})
    '{"loss": null}'
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
