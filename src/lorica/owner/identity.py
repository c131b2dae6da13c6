"""An owner's identity key on disk: the private key, and the public line for the other owners' policies."""

from __future__ import annotations

import os
import re
import shlex
import stat
from pathlib import Path

from lorica.errors import UserError
from lorica.files import write_atomically
from lorica.paths import user_path
from lorica.secure_sum.identity import Identity

PRIVATE, PUBLIC = "identity.key", "identity.pub"


def make_identity(folder: Path, name: str) -> str:
    """Write `identity.key`, readable by this account only, and `identity.pub`. An existing key is kept.

    Returns:
        The public line, for the `members` of all owners' policies.

    Raises:
        UserError: the files cannot be written or read, or the name is invalid.
    """
    path = user_path("DIR", folder) / PRIVATE
    if not re.fullmatch("[A-Za-z0-9_.@-]{1,100}", name):
        raise UserError("--name", name, "not 1 to 100 characters", "use letters, digits, -, _, . and @")
    if path.exists():
        identity = read_identity(path)
    else:
        identity = Identity.new()
        _write_new(path, identity.to_pem())
    line = str(identity.public(name))
    write_atomically(path.with_name(PUBLIC), f"{line}\n".encode())
    return line


def read_identity(path: Path) -> Identity:
    """Read a private key.

    Raises:
        UserError: the file cannot be read, is not a private key, or is readable by other accounts.
    """
    try:
        content = path.read_bytes()
        others = stat.S_IMODE(path.stat().st_mode) & 0o077
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError("node-config.identity", str(path), problem, "create one with `lorica flower keys`") from error
    if others:
        raise UserError(
            "node-config.identity", str(path), "other accounts can read it", f"run chmod 600 {shlex.quote(str(path))}"
        )
    try:
        return Identity.from_pem(content)
    except ValueError as error:
        problem = str(error)
        raise UserError("node-config.identity", str(path), problem, "create one with `lorica flower keys`") from None


def _write_new(path: Path, content: bytes) -> None:
    """Create a file that only this account can read, whatever the umask. Fails if the file exists."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError("DIR", str(path.parent), problem, "choose another folder") from error
