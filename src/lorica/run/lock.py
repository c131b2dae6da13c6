"""The lock of a run folder: one process at a time runs, resumes or finishes a run."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from lorica.errors import UserError

LOCK = ".lock"
logger = logging.getLogger(__name__)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_MOST_ATTEMPTS = 100
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder.

    The operating system releases the lock when the process ends, however it ends, so no lock outlives a killed run.
    Readers of the folder need no lock. The lock's file is deleted in the end, and so are folders that were created for
    it and are still empty. A folder that cannot be written, or whose file system has no locks, is not locked.

    Raises:
        UserError: another process holds the lock; names it.
    """
    created = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        descriptor = _acquire(folder)
    except OSError as error:
        if error.errno not in (*_READ_ONLY, *_UNSUPPORTED):
            problem = f"the run folder cannot be created ({error.strerror})"
            raise UserError("output", str(folder), problem, "choose another name or output folder") from error
        if error.errno in _UNSUPPORTED:
            logger.warning("%s is on a file system without locks: do not start this run a second time", folder)
        yield
        return
    try:
        yield
    finally:
        # Before the lock is released: a process that locks the deleted file notices it.
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            for path in created:
                path.rmdir()


def _acquire(folder: Path) -> int:
    """An open file that holds the lock."""
    path = folder / LOCK
    for attempt in itertools.count():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            # Another process has just deleted the empty folder; or the current folder of this one is deleted.
            if attempt == _MOST_ATTEMPTS:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                _write_holder(descriptor)
                return descriptor
        except BlockingIOError:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            raise UserError(
                "name",
                folder.name,
                f"{folder} is in use by {holder}",
                "wait until that run has ended, or choose another name for this one",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise AssertionError("unreachable")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at its path; its last holder may have deleted it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    content = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content.encode(), 0)


def _read_holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {found['process']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        # The other process has not written it yet.
        return "another process"
