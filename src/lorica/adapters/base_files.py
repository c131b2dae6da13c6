"""Locate the files of a base model, and compute the hash that identifies it."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorica.errors import UserError
from lorica.files import sha256_of
from lorica.paths import user_path

EMBEDDED = "lorica:"
# Files that transformers never reads to load a PyTorch model: a new README or weights for another framework do not
# change the hash. All other files count; an extra file can only lead to a refusal.
OTHER_SUFFIXES = {".md", ".h5", ".msgpack", ".ot", ".onnx"}
OTHER_NAMES = {"LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "README", "README.txt"}


def resolve_base(base: str) -> str:
    """The folder of an embedded model (`lorica:NAME`), else `base` itself: a folder or a hub id.

    Raises:
        UserError: an unknown embedded model, or a path that is not a folder with a config.json.
    """
    if base.startswith(EMBEDDED):
        folder = Path(str(importlib.resources.files("lorica") / "defaults" / base.removeprefix(EMBEDDED)))
        if not (folder / "config.json").is_file():
            raise UserError("model.base", base, "no such embedded model", "set model.base=lorica:glyph-vit")
        return str(folder)
    user_path("model.base", base)
    # `./NAME` must stay apart from the hub id `NAME`, which a `Path` would not keep.
    base = os.path.expanduser(base)
    if Path(base).is_dir():
        if not (Path(base) / "config.json").is_file():
            raise UserError("model.base", base, "it has no config.json", "give a Hugging Face model folder")
        return base
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError("model.base", base, "no such folder", "give the path of a model folder, or a hub id")
    return base


def hash_of_base(base: str | Path) -> str:
    """`sha256:…` over the names and contents of the files that determine what a base model computes.

    These are the files directly in the folder: configuration, weights, tokenizer, image processor. Subfolders, hidden
    files (caches), documentation and weights for other frameworks do not count. The hash is the SHA-256 of the JSON
    list of `[name, SHA-256 of the content]`, sorted by name. Symbolic links are followed, since the hub's cache uses
    them.

    Args:
        base: a model folder, or an embedded model (`lorica:glyph-vit`).

    Raises:
        UserError: not a model folder, or a file in it cannot be read.
    """
    folder = Path(resolve_base(str(base)))
    if not folder.is_dir():
        problem = "not a folder on this machine"
        raise UserError("model.base", str(base), problem, "download the model and give the path of its folder")
    files = sorted(path for path in folder.iterdir() if _counts(path))
    try:
        # Hashing releases the GIL, so shards are hashed in parallel.
        with ThreadPoolExecutor() as pool:
            contents = list(pool.map(sha256_of, files))
    except OSError as error:
        problem = f"{error.filename} cannot be read ({error.strerror})"
        raise UserError("model.base", str(base), problem, "download the model again") from None
    manifest = [[path.name, content] for path, content in zip(files, contents, strict=True)]
    return f"sha256:{hashlib.sha256(json.dumps(manifest).encode()).hexdigest()}"


def base_identity(base: str) -> str:
    """The identity that a server and its nodes compare: `hash_of_base` of a local model, or the hub id itself."""
    return hash_of_base(base) if Path(resolve_base(base)).is_dir() else base


def _counts(path: Path) -> bool:
    other = path.name.startswith(".") or path.name in OTHER_NAMES or path.suffix.lower() in OTHER_SUFFIXES
    return not other and not path.is_dir()
