"""Where the files of a base model are, and the hash by which an owner knows it."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorica.errors import UserError

EMBEDDED = "lorica:"
# What transformers never reads to make a PyTorch model, so that a new README or another framework's weights count as
# the same model. Everything else counts: a file too many can only make an owner refuse.
OTHER_SUFFIXES = {".md", ".h5", ".msgpack", ".ot", ".onnx"}
OTHER_NAMES = {"LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "README", "README.txt"}


def resolve_base(base: str) -> str:
    """The folder of an embedded model (`lorica:NAME`), else `base` itself: a folder or a hub id.

    Raises:
        UserError: looks like a path but is no folder with a config.json, or names no embedded model.
    """
    if base.startswith(EMBEDDED):
        folder = Path(str(importlib.resources.files("lorica") / "defaults" / base.removeprefix(EMBEDDED)))
        if not (folder / "config.json").is_file():
            raise UserError("model.base", base, "no such embedded model", "use lorica:glyph-vit")
        return str(folder)
    if Path(base).is_dir():
        if not (Path(base) / "config.json").is_file():
            raise UserError("model.base", base, "the folder holds no config.json", "give a Hugging Face model folder")
        return base
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError("model.base", base, "no such folder", "give the path of a model folder, or a hub id")
    return base


def hash_of_base(base: str | Path) -> str:
    """`sha256:…` over the names and contents of the files that decide what a base model computes.

    Those are the folder's own files: configuration, weights, tokenizer, image processor. Subfolders, hidden files
    (caches), documents and other frameworks' weights do not count. SHA-256 of the JSON list of `[name, SHA-256 of the
    content]`, sorted by name. Links are followed, as in the hub's cache.

    Args:
        base: a model folder, or an embedded model (`lorica:glyph-vit`).

    Raises:
        UserError: no model folder, or a file of it that cannot be read.
    """
    folder = Path(resolve_base(str(base)))
    if not folder.is_dir():
        problem = "no folder on this machine"
        raise UserError("model.base", str(base), problem, "download the model and give its folder")
    files = sorted(path for path in folder.iterdir() if _counts(path))
    try:
        # Hashing releases the interpreter's lock, so that shards are read side by side.
        with ThreadPoolExecutor() as pool:
            contents = list(pool.map(_hash_of_file, files))
    except OSError as error:
        problem = f"{error.filename} cannot be read ({error.strerror})"
        raise UserError("model.base", str(base), problem, "download the model again") from None
    manifest = [[path.name, content] for path, content in zip(files, contents, strict=True)]
    return f"sha256:{hashlib.sha256(json.dumps(manifest).encode()).hexdigest()}"


def base_identity(base: str) -> str:
    """What a server and its nodes compare: `hash_of_base`, or of a hub id the id."""
    return hash_of_base(base) if Path(resolve_base(base)).is_dir() else base


def _counts(path: Path) -> bool:
    other = path.name.startswith(".") or path.name in OTHER_NAMES or path.suffix.lower() in OTHER_SUFFIXES
    return not other and not path.is_dir()


def _hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
