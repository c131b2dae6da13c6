"""Atomic checkpoints: one folder per round with safetensors and JSON, renamed into place when complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorica.adapters.names import Pair, flat_pairs, pairs_under, under
from lorica.errors import UserError
from lorica.files import INCOMPLETE, sync, write_atomically, write_errors
from lorica.privacy.ledger import KEPT_ROUNDS

VERSION = 4


@dataclass(frozen=True)
class Checkpoint:
    """The server's state after a round.

    Attributes:
        adapter: the global tensors.
        merged: site name -> `(B, A)` merged into its frozen weight.
        method: `Method.state_dict`.
        server: `Server.state_dict`: state of the server optimiser, filters and averages.
    """

    round: int
    adapter: dict[str, Tensor]
    merged: dict[str, Pair]
    method: dict[str, Any]
    server: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder/round-NNNNNN` and delete all but the last `KEPT_ROUNDS` checkpoints.

    Raises:
        UserError: the disk is full or the folder is not writable; earlier checkpoints are kept.
    """
    tensors = {f"adapter/{name}": value for name, value in checkpoint.adapter.items()}
    tensors |= flat_pairs(checkpoint.merged, "merged/B/", "merged/A/")
    method, method_tensors = _split_tensors(checkpoint.method)
    server, server_tensors = _split_tensors(checkpoint.server)
    tensors |= {f"method/{path}": value for path, value in method_tensors.items()}
    tensors |= {f"server/{path}": value for path, value in server_tensors.items()}
    content = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
    state = {
        "version": VERSION,
        "round": checkpoint.round,
        "method": method,
        "server": server,
    }
    state["sha256"] = _checksum(state, content)
    final = folder / _name(checkpoint.round)
    temporary = folder / f".{final.name}{INCOMPLETE}"
    shutil.rmtree(temporary, ignore_errors=True)
    write_atomically(temporary / "state.safetensors", content)
    write_atomically(temporary / "state.json", json.dumps(state).encode())
    with write_errors(final):
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(folder)
        for old in _rounds(folder)[:-KEPT_ROUNDS]:
            shutil.rmtree(old)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run with this folder of checkpoints resumes from one of them."""
    return bool(_rounds(folder))


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest checkpoint, or None if there is none.

    Raises:
        UserError: it is damaged, or another version of Lorica wrote it. The remedy for a damaged one is to delete it:
            the run resumes from the checkpoint before it, or from the start, and the clients repeat their replies. They
            keep those of `KEPT_ROUNDS` rounds, so of older ones no start remains.
    """
    rounds = _rounds(folder)
    if not rounds:
        return None
    latest = rounds[-1]
    try:
        content = (latest / "state.safetensors").read_bytes()
        state = json.loads((latest / "state.json").read_text())
        if state["version"] != VERSION:
            raise UserError(
                "checkpoint",
                str(latest),
                f"has format {state['version']}, but this version of Lorica reads format {VERSION}",
                "finish the run with the version of Lorica that started it, or start a new run with another name",
            )
        if state.pop("sha256") != _checksum(state, content) or latest.name != _name(state["round"]):
            raise ValueError("its files do not match their checksum")
        tensors = safetensors.torch.load(content)
        return Checkpoint(
            round=state["round"],
            adapter=under("adapter/", tensors),
            merged=pairs_under("merged/B/", "merged/A/", tensors),
            method=_join_tensors(state["method"], under("method/", tensors)),
            server=_join_tensors(state["server"], under("server/", tensors)),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        remedy = f"delete {latest} and run again to resume from the previous checkpoint"
        if len(rounds) == 1 and latest.name == _name(1):
            remedy = f"delete {latest} and run again; the clients repeat the replies that they have stored"
        elif len(rounds) == 1:
            remedy = f"there is no other checkpoint: restore {latest} from a copy, or set name to a new run"
        raise UserError("checkpoint", str(latest), f"is damaged ({error})", remedy) from error


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"))


def _name(round_number: int) -> str:
    return f"round-{round_number:06d}"


def _checksum(state: Mapping[str, Any], tensors: bytes) -> str:
    """SHA-256 (hexadecimal) of a checkpoint's two files, without the checksum itself."""
    content = hashlib.sha256(json.dumps(state).encode())
    content.update(tensors)
    return content.hexdigest()


def _split_tensors(state: Mapping[str, Any], path: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a nested state into its JSON-able part and its tensors, named by their path `KEY/KEY/…`."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if "/" in key:
            raise ValueError(f"the key {key!r} of a state contains '/'")
        if isinstance(value, Tensor):
            tensors[f"{path}{key}"] = value
        elif isinstance(value, Mapping):
            plain[key], inner = _split_tensors(value, f"{path}{key}/")
            tensors |= inner
        else:
            plain[key] = value
    return plain, tensors


def _join_tensors(plain: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_split_tensors`."""
    for path, value in tensors.items():
        *keys, last = path.split("/")
        inner = plain
        for key in keys:
            inner = inner[key]
        inner[last] = value
    return plain
