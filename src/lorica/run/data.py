"""Whether the data and models of a run are still those that it started with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from lorica.adapters.base_files import hash_of_base, resolve_base
from lorica.adapters.start import hash_of_start
from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.files import read_json, write_atomically
from lorica.paths import user_path
from lorica.privacy.home import Home
from lorica.tasks.owners import source_names
from lorica.tasks.readers import named_images

DATA = "data.json"
_CHUNK = 2**20


def fingerprints(config: ExperimentConfig) -> dict[str, str]:
    """Key of the configuration -> fingerprint of its local files: data, base model, adapter to start from.

    Sources that are no local files have none. A fingerprint of data is keyed BLAKE2b (RFC 7693) of the files' contents
    and names. Without the key, which is secret and stays in Lorica's home folder, nobody can test a guess of the
    private data against it.

    Raises:
        UserError: a file cannot be read.
    """
    task = config.task
    tests = task.test if isinstance(task.test, dict) else {"": task.test}
    sources = {"task.train": source_names(task.train)}
    sources |= {f"task.test.{name}".rstrip("."): [test] for name, test in tests.items()}
    found, secret = {}, Home().key()
    for key, names in sources.items():
        paths = [Path(name).expanduser() for name in names]
        if all(path.exists() for path in paths):
            files = [file for path in paths for file in _files(path)]
            for name, path in zip(names, paths, strict=True):
                images = [(path.parent / image, image) for image in named_images(task, key, name)]
                # The reader says which record's image is missing.
                files += [image for image in images if os.path.isfile(image[0])]
            found[key] = _fingerprint(key, files, secret)
    base, start = resolve_base(config.model.base), config.lora.start
    if Path(base).is_dir():
        found["model.base"] = hash_of_base(base)
    if start is not None and user_path("lora.start", start).is_dir():
        found["lora.start"] = hash_of_start(start)
    return found


def write_fingerprints(folder: Path, run: str, found: dict[str, str]) -> None:
    """Store the fingerprints of a run that starts, with its id."""
    content = {"run": run, "key": _key_name(Home().key()), "files": found}
    write_atomically(folder / DATA, json.dumps(content, indent=2).encode())


def belongs_to(folder: Path, run: str) -> bool:
    """Whether the fingerprints were stored for the run with this id; true if none are stored.

    Call it after `check_fingerprints`.
    """
    path = folder / DATA
    return not path.is_file() or read_json(path).get("run") == run


def check_fingerprints(folder: Path, config: ExperimentConfig, data: dict[str, str]) -> None:
    """Refuse to go on, or to show a result, if the data or the models have changed since the run started.

    What cannot be compared is not checked: files that are gone, and data if Lorica's home folder is not the one in
    which the run started.

    Args:
        data: `fingerprints` as they are now.

    Raises:
        UserError: names the source that has changed, or `data.json` is damaged.
    """
    path = folder / DATA
    if not path.is_file():
        return
    try:
        stored = read_json(path)
        key, files = stored["key"], dict(stored["files"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            DATA,
            str(path),
            "the file is damaged",
            "delete it if you know that the data have not changed since the run started, or start a new run with "
            "another name",
        ) from None
    another_home = key != _key_name(Home().key())
    for name, now in data.items():
        keyed = name.startswith("task.")
        if name in files and files[name] != now and not (keyed and another_home):
            section, key, *test = name.split(".", 2)
            value = getattr(getattr(config, section), key)
            raise UserError(
                name,
                value[test[0]] if test else value,
                f"its files have changed since run {folder.name} started",
                "set name to a new run for the changed files, or restore the earlier ones",
            )


def _fingerprint(key: str, files: list[tuple[Path, str]], secret: bytes) -> str:
    """The fingerprint of files, given with the names that count."""
    content = blake2b(key=secret)
    try:
        for file, name in files:
            own = blake2b(key=secret)
            with file.open("rb") as opened:
                while chunk := opened.read(_CHUNK):
                    own.update(chunk)
            content.update(json.dumps([name, own.hexdigest()]).encode())
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError(key, str(error.filename), problem, "make the file readable") from error
    return content.hexdigest()


def _files(source: Path) -> Iterator[tuple[Path, str]]:
    """The files of a source and their names in it; a file that is a source may be moved or renamed."""
    if source.is_file():
        yield source, ""
        return
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield file, name.as_posix()


def _key_name(key: bytes) -> str:
    return blake2b(b"name of the key", key=key, digest_size=8).hexdigest()
