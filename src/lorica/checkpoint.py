"""Checkpoints that are whole or absent: safetensors and JSON in a folder per round, renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lorica.adapters.state import Pair
from lorica.errors import UserError
from lorica.files import write_atomically
from lorica.messages import part

KEPT = 2
VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """The server's state after a round.

    Attributes:
        adapter: the global tensors.
        merged: site name -> `(B, A)` merged into its frozen weight.
        method_numbers, method_tensors: what the method remembers.
        server_numbers, server_tensors: what server optimiser, filters and averages remember.
    """

    round: int
    adapter: dict[str, Tensor]
    merged: dict[str, Pair]
    method_numbers: dict[str, Any]
    method_tensors: dict[str, Tensor]
    server_numbers: dict[str, Any]
    server_tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder/round-NNNNNN` and drop all but the last two.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    tensors = {f"adapter/{name}": value for name, value in checkpoint.adapter.items()}
    tensors |= {f"method/{name}": value for name, value in checkpoint.method_tensors.items()}
    tensors |= {f"server/{name}": value for name, value in checkpoint.server_tensors.items()}
    for name, (b, a) in checkpoint.merged.items():
        tensors |= {f"merged/B/{name}": b, f"merged/A/{name}": a}
    content = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
    state = {
        "version": VERSION,
        "round": checkpoint.round,
        "method": checkpoint.method_numbers,
        "server": checkpoint.server_numbers,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    final = folder / f"round-{checkpoint.round:06d}"
    temporary = folder / f".{final.name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)
    write_atomically(temporary / "state.safetensors", content)
    write_atomically(temporary / "state.json", json.dumps(state).encode())
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    for old in _rounds(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest checkpoint, or None if there is none.

    Raises:
        UserError: it is damaged; names the folder to delete so that the run resumes from the one before.
    """
    rounds = _rounds(folder)
    if not rounds:
        return None
    latest = rounds[-1]
    try:
        content = (latest / "state.safetensors").read_bytes()
        state = json.loads((latest / "state.json").read_text())
        if state["version"] != VERSION:
            raise ValueError(f"version {state['version']}, expected {VERSION}")
        if hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise ValueError("state.safetensors does not match its checksum")
        tensors = safetensors.torch.load(content)
        b, a = part(tensors, "merged/B/"), part(tensors, "merged/A/")
        return Checkpoint(
            round=state["round"],
            adapter=part(tensors, "adapter/"),
            merged={name: (b[name], a[name]) for name in b},
            method_numbers=state["method"],
            method_tensors=part(tensors, "method/"),
            server_numbers=state["server"],
            server_tensors=part(tensors, "server/"),
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            "checkpoint",
            str(latest),
            f"damaged ({error})",
            f"delete {latest} and run again to resume from the checkpoint before it",
        ) from error


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"))
