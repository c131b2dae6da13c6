"""Load untrusted files of pretrained models: code is never run, and pickles are read as tensors only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorica.errors import UserError


def from_pretrained(load: Callable[..., Any], base: str, what: str, remedy: str, **options: Any) -> Any:
    """Call `load(base, **options)`, a `from_pretrained` of transformers; a local folder is read offline.

    Code that comes with the files (`auto_map`) is never run, and the user is not asked to allow it. Weights in a pickle
    (`pytorch_model.bin`) are read as tensors only.

    Args:
        what: subject of the error: `the model`, `its tokenizer`.
        remedy: remedy for missing files.

    Raises:
        UserError: the model needs its own code, or a file is missing or damaged.
    """
    try:
        return load(base, local_files_only=Path(base).is_dir(), trust_remote_code=False, **options)
    # The libraries that read these files raise errors of a dozen types, their own and Python's.
    except Exception as error:
        words = str(error).strip() or type(error).__name__
        damaged = damaged_file(Path(base))
        if "trust_remote_code" in words:
            problem = f"{what} needs code that comes with its files, which Lorica does not run"
            remedy = "use a model whose code is part of transformers"
        elif damaged is not None:
            problem = f"{what} cannot be loaded ({damaged} is damaged, or contains more than data)"
            remedy = "download it again from a source that you trust"
        else:
            problem = f"{what} cannot be loaded ({words.splitlines()[0]})"
        raise UserError("model.base", base, problem, remedy) from error


def damaged_file(folder: Path) -> str | None:
    """The first file of a folder that is not valid for its suffix; None if there is none."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            _reader(path)(path)
        except Exception:
            return path.name
    return None


def _reader(path: Path) -> Callable[[Path], Any]:
    if path.name.startswith("pytorch_model") and path.suffix == ".bin":
        return _read_pickle
    return {".safetensors": _read_safetensors, ".json": _read_json}.get(path.suffix, Path.stat)


def _read_safetensors(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def _read_pickle(path: Path) -> None:
    import torch

    torch.load(path, map_location="cpu", weights_only=True)


def _read_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))
