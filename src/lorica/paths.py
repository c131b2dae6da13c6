"""Paths that a user gives: `~` resolved, and refused where no file can have them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lorica.errors import UserError

LONGEST_NAME = 255
"""Bytes of a file's name, on all usual file systems."""
LONGEST_PATH = 3800
"""Bytes of a whole path. Linux takes 4,095, and Lorica adds names of its own."""


def user_path(key: str, path: str | Path) -> Path:
    """The path with `~` resolved; whether anything is there is another question.

    Args:
        key: option or key that it comes from, for the error.

    Raises:
        UserError: no file can have this path.
    """
    problem = path_problem(str(path))
    if problem is not None:
        raise UserError(key, str(path), problem, "give another path")
    return Path(path).expanduser()


def path_problem(path: str) -> str | None:
    """Why no file can have this path; None if one can.

    >>> path_problem("runs/" + "x" * 300)
    'a name in this path is longer than 255 bytes'
    """
    if "\0" in path:
        return "a path cannot contain a null character"
    try:
        content = os.fsencode(path)
    except UnicodeEncodeError:
        return f"file names on this machine cannot have these characters ({sys.getfilesystemencoding()})"
    if len(content) > LONGEST_PATH:
        return f"the path is longer than {LONGEST_PATH:,} bytes"
    if any(len(name) > LONGEST_NAME for name in content.split(b"/")):
        return f"a name in this path is longer than {LONGEST_NAME} bytes"
    try:
        Path(path).expanduser()
    except RuntimeError:
        return "there is no such home folder"
    return None
