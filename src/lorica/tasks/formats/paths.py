"""Paths of data: what is no path is refused, and what is no file is never opened."""

from __future__ import annotations

import stat
from pathlib import Path

from lorica.errors import UserError
from lorica.paths import user_path


def local_path(name: str, key: str) -> Path:
    """The path of a source, `~` expanded; whether anything is there is another question.

    Raises:
        UserError: it is empty, or no path.
    """
    if not name:
        raise UserError(key, name, "it is empty", "give the path of a file or a folder")
    return user_path(key, name)


def check_regular(path: Path, key: str) -> None:
    """Refuse what is not a file of bytes; a FIFO or a device is never opened, since reading it may not end.

    Raises:
        UserError: there is no such file, or it is a folder, a FIFO, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        raise UserError(key, str(path), "no such file", "check the path") from None
    if stat.S_ISDIR(mode):
        raise UserError(key, str(path), "it is a folder, not a file", "give the path of a file")
    if not stat.S_ISREG(mode):
        problem = "it is a FIFO, a socket or a device, not a file"
        raise UserError(key, str(path), problem, "write the data to a file, and give its path")
