"""The run folder on disk: claim it, open it, and drop the lines of rounds that will be repeated."""

from __future__ import annotations

import json
import platform
import subprocess
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.files import INCOMPLETE, remove_incomplete, write_atomically
from lorica.reporting.checksums import remedy
from lorica.run.data import DATA, belongs_to, check_fingerprints, write_fingerprints
from lorica.run.lock import LOCK
from lorica.strict_yaml import read_yaml_file

ENVIRONMENT = "environment.json"


def claim_folder(folder: Path, config: ExperimentConfig) -> None:
    """Check that the run folder is empty, or contains the same experiment on the same data.

    Raises:
        UserError: the folder contains another experiment, was not written by Lorica or is damaged, or the data have
            changed since the run started.
    """
    path = folder / "config.yaml"
    if not folder.exists() or all(file.name == LOCK or file.name.endswith(INCOMPLETE) for file in folder.iterdir()):
        return
    if not path.is_file():
        raise UserError(
            "name", config.name, f"{folder} exists and is not a run folder", "choose another name or output"
        )
    found = _experiment(_read_config(path))
    wanted = _experiment(config.model_dump(mode="json"))
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise UserError(
            "name",
            config.name,
            f"{folder} contains another experiment, which differs in: {', '.join(different)}",
            f"choose another name, or delete {folder}",
        )
    check_fingerprints(folder, config.task)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml_file(path, "name")
    except UserError as error:
        raise _damaged(path, error.problem) from error
    if not isinstance(content, dict) or not content:
        raise _damaged(path, "it contains no experiment")
    return content


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(path.name, str(path), f"the file is damaged ({problem})", remedy(path.name))


def _experiment(content: dict[str, Any]) -> dict[str, Any]:
    """The keys that must stay the same when a run is resumed: not where it runs, nor how many clients it waits for."""
    kept = {key: value for key, value in content.items() if key not in ("output", "engine", "flower")}
    federation = {key: value for key, value in content.get("federation", {}).items() if key != "min_clients"}
    return kept | {"federation": federation}


def started_from(folder: Path) -> dict[str, str] | None:
    """Name and SHA-256 of the adapter that a run started from; None for a new run, or one without such an adapter.

    Raises:
        UserError: environment.json is damaged.
    """
    found = (_environment(folder) or {}).get("start")
    if found is not None and not isinstance(found, dict):
        raise _damaged(folder / ENVIRONMENT, "it names no adapter as its start")
    return found


def _environment(folder: Path) -> dict[str, Any] | None:
    """The content of environment.json; None if there is none."""
    path = folder / ENVIRONMENT
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def open_run(
    folder: Path, config: ExperimentConfig, device: str, data: dict[str, str], start: dict[str, str] | None
) -> str:
    """Create or reopen the run folder, and return the id under which the ledger records the run.

    environment.json is written last: a run that was killed before that starts anew.

    Args:
        data: fingerprints of the data (`lorica.run.data`), taken before they were read.
        start: name and SHA-256 of the adapter that the run starts from.

    Raises:
        UserError: environment.json is damaged, or missing although rounds are finished.
    """
    path = folder / ENVIRONMENT
    for place in (folder, folder / "checkpoint"):
        remove_incomplete(place)
    found = _environment(folder)
    if found is not None:
        if "run" not in found:
            raise _damaged(path, "it has no id of a run")
        run = str(found["run"])
        if not belongs_to(folder, run):
            raise _damaged(path, f"the id of its run is not that in {DATA}")
        return run
    if any((folder / "checkpoint").glob("round-*")):
        raise _damaged(path, "it is missing, and with it the id under which the ledger has charged the finished rounds")
    environment: dict[str, Any] = {
        "run": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "git": git_revision(),
    } | {package: version(package) for package in ("lorica", "torch", "transformers", "peft", "dp-accounting")}
    environment |= {} if start is None else {"start": start}
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    write_fingerprints(folder, str(environment["run"]), data)
    write_atomically(path, json.dumps(environment, indent=2).encode())
    return str(environment["run"])


def keep_rounds(path: Path, first: int, last: int) -> None:
    """Drop the lines of rounds after `last`; those rounds will be repeated.

    A file that is missing stays missing: it may have been deleted because it was damaged.

    Args:
        first: the round of the first line; a later one if the file was deleted in between.

    Raises:
        UserError: a line of an earlier round is damaged or missing.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    lines = content.splitlines()
    numbers = [_round_of(line) for line in lines]
    # A crash can leave an incomplete last line, and lines of a round without a checkpoint.
    while numbers and (numbers[-1] is None or numbers[-1] > last):
        numbers.pop()
    start = numbers[0] if numbers else first
    if start is None or numbers != list(range(start, last + 1)):
        raise UserError(
            path.name,
            str(path),
            f"the file is damaged: it does not contain rounds {first} to {last}",
            f"restore it from a copy, or delete it; the run then goes on, and its report begins with round {last + 1}",
        )
    kept = b"".join(line + b"\n" for line in lines[: len(numbers)])
    if kept != content:
        write_atomically(path, kept)


def _round_of(line: bytes) -> int | None:
    """The round of a line; None if it is damaged."""
    try:
        return int(json.loads(line)["round"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None


def git_revision() -> str | None:
    """The commit of the checkout that Lorica runs from, with `-dirty` after local changes; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
