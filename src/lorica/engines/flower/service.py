"""A systemd service that runs an owner's node: a unit and its environment file, for this machine."""

from __future__ import annotations

import getpass
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template

from lorica.adapters.base_files import EMBEDDED
from lorica.engines.flower.sealed import NODE_CONFIG, check_settings, option
from lorica.errors import UserError
from lorica.files import home_folder, private_folder, write_atomically
from lorica.owner.settings import NodeSettings
from lorica.paths import user_path

UNIT, ENVIRONMENT = "lorica-node.service", "lorica-node.env"
GPUS = ("/dev/nvidiactl", "/dev/kfd")


def write_service(folder: Path, arguments: Sequence[str]) -> Path:
    """Write `lorica-node.service` and `lorica-node.env`, for the account and the Lorica that run this command.

    The unit lets the node write to the folders of its ledger, its data and its own files, and to Lorica's home, and to
    no other. The node's folder and Lorica's home are created, since a unit's folders must exist.

    Args:
        folder: where both files go, and where the environment file stays.
        arguments: those of `lorica flower node`.

    Returns:
        The path of the unit.

    Raises:
        UserError: as `lorica flower node`, a path in the node's configuration is relative, or a file of the same name
            exists.
    """
    settings = check_settings(arguments)
    for key in ("data", "base", "policy", "identity", "ledger", "folder"):
        path = getattr(settings, key)
        # The embedded model is no path.
        if path is None or path.startswith(EMBEDDED):
            continue
        if not Path(path).expanduser().is_absolute():
            problem = "a service starts in another folder"
            raise UserError(f"node-config.{key}", path, problem, f"set {key} to {Path(path).absolute()}")
    folder = user_path("DIR", folder).absolute()
    for name in (UNIT, ENVIRONMENT):
        if (folder / name).exists():
            raise UserError("DIR", str(folder), f"{name} exists there", f"delete {name}, or choose another folder")
    home, place = home_folder().absolute(), settings.place.absolute()
    for needed in (home, place):
        private_folder(needed)
    names = {
        "version": version("lorica"),
        "unit": str(folder / UNIT),
        "environment": str(folder / ENVIRONMENT),
        "program": _in_unit(Path(sys.executable).parent / "lorica"),
        "user": getpass.getuser(),
        "data": _in_unit(Path(str(settings.data)).expanduser()),
        "place": _in_unit(place),
        "writable": " ".join(_in_unit(path) for path in _writable(settings, home)),
        # A node that computes on a GPU needs its device files.
        "devices": "PrivateDevices=yes" if not any(Path(gpu).exists() for gpu in GPUS) else "DevicePolicy=auto",
        "options": _in_environment(shlex.join(_from_anywhere(_without(arguments, NODE_CONFIG)))),
        "config": _in_environment(str(option(arguments, NODE_CONFIG))),
        "home": _in_environment(str(home)),
        "flower": _in_environment(str(home / "flwr")),
    }
    templates = files("lorica") / "engines" / "flower" / "templates"
    for name, mode in ((ENVIRONMENT, 0o600), (UNIT, 0o644)):
        text = Template((templates / f"{name}.template").read_text(encoding="utf-8")).substitute(names)
        write_atomically(folder / name, text.encode(), mode)
    return folder / UNIT


def _writable(settings: NodeSettings, home: Path) -> list[Path]:
    """The folders that a node writes to: SQLite also writes beside its files."""
    return sorted({home, settings.place.absolute(), settings.ledger_path.absolute().parent})


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """Command-line arguments without an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != name and not argument.startswith(f"{name}="):
            kept.append(argument)
        skip = not skip and argument == name
    return kept


def _from_anywhere(arguments: Sequence[str]) -> list[str]:
    """Arguments with absolute paths in place of those of files here."""
    return [str(Path(value).absolute()) if Path(value).exists() else value for value in arguments]


def _in_unit(path: Path) -> str:
    """A path in a unit, where `%` starts a specifier."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _in_environment(value: str) -> str:
    """A value in an environment file."""
    return '"' + "".join(f"\\{letter}" if letter in '"\\$`' else letter for letter in value) + '"'
