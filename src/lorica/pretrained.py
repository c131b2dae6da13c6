"""Files of pretrained models, which anybody may have written: no code of theirs is run, and no pickle but tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorica.errors import UserError


def from_pretrained(load: Callable[..., Any], base: str, what: str, remedy: str, **options: Any) -> Any:
    """`load(base, **options)`, a `from_pretrained` of transformers; a folder is read without the network.

    Code beside the files (`auto_map`) is never run, and nobody is asked whether it may be. Weights in a pickle
    (`pytorch_model.bin`) are read as tensors only.

    Args:
        what: what is loaded, for the error: `the model`, `its tokenizer`.
        remedy: of files that are missing.

    Raises:
        UserError: it needs code of its own, or a file is missing or damaged.
    """
    try:
        return load(base, local_files_only=Path(base).is_dir(), trust_remote_code=False, **options)
    # The libraries that read these files raise errors of a dozen types, their own and Python's.
    except Exception as error:
        words = str(error).strip() or type(error).__name__
        damaged = damaged_file(Path(base))
        if "trust_remote_code" in words:
            problem = f"{what} needs code that comes with its files, which Lorica does not run"
            remedy = "use a model whose code is a part of transformers"
        elif damaged is not None:
            problem = f"{what} cannot be loaded ({damaged} is damaged, or holds more than data)"
            remedy = "download it again, from a source that you trust"
        else:
            problem = f"{what} cannot be loaded ({words.splitlines()[0]})"
        raise UserError("model.base", base, problem, remedy) from error


def damaged_file(folder: Path) -> str | None:
    """The name of the first file of a folder that cannot be read as what its name says; None if there is none."""
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
