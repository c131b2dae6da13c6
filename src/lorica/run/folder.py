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
from lorica.files import write_atomically
from lorica.strict_yaml import read_yaml_file


def claim_folder(folder: Path, config: ExperimentConfig) -> None:
    """Check that the run folder is empty or contains the same experiment.

    Raises:
        UserError: the folder contains another experiment, or was not written by Lorica.
    """
    path = folder / "config.yaml"
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not path.is_file():
        raise UserError(
            "name", config.name, f"{folder} exists and is not a run folder", "choose another name or output"
        )
    found = _experiment(read_yaml_file(path, "name"))
    wanted = _experiment(config.model_dump(mode="json"))
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise UserError(
            "name",
            config.name,
            f"{folder} contains another experiment, which differs in: {', '.join(different)}",
            f"choose another name, or delete {folder}",
        )


def _experiment(content: dict[str, Any]) -> dict[str, Any]:
    """The keys that must stay the same when a run is resumed: not where it runs, nor how many clients it waits for."""
    kept = {key: value for key, value in content.items() if key not in ("output", "engine", "flower")}
    federation = {key: value for key, value in content.get("federation", {}).items() if key != "min_clients"}
    return kept | {"federation": federation}


def started_from(folder: Path) -> dict[str, str] | None:
    """Name and SHA-256 of the adapter that a run started from; None for a new run, or one without such an adapter."""
    path = folder / "environment.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("start") if path.is_file() else None
    return None if found is None else dict(found)


def open_run(folder: Path, config: ExperimentConfig, device: str, start: dict[str, str] | None) -> str:
    """Create or reopen the run folder, and return the id under which the ledger records the run.

    Args:
        start: name and SHA-256 of the adapter that the run starts from.
    """
    path = folder / "environment.json"
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    environment: dict[str, Any] = {
        "run": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "git": _git_revision(),
    } | {package: version(package) for package in ("lorica", "torch", "transformers", "peft", "dp-accounting")}
    environment |= {} if start is None else {"start": start}
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    write_atomically(path, json.dumps(environment, indent=2).encode())
    return str(environment["run"])


def keep_rounds(path: Path, last: int) -> None:
    """Drop the lines of rounds after `last`; those rounds will be repeated."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _round_of(line) <= last]
        if kept != lines:
            write_atomically(path, "".join(line + "\n" for line in kept).encode())


def _round_of(line: str) -> float:
    try:
        return float(json.loads(line)["round"])
    except ValueError:
        # A crash can leave an incomplete last line.
        return float("inf")


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
