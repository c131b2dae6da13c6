"""Draft an experiment for a person's own data file: a commented configuration that runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from lorica.config import load
from lorica.errors import UserError
from lorica.files import create_private, write_atomically, write_errors
from lorica.privacy.planning import NEAR, Option, smallest_good_batch, usual_batch_sizes
from lorica.tasks.formats.header import column_names
from lorica.tasks.formats.image_folder import has_images, read_image_folder
from lorica.tasks.guess import guess_owners, guess_task, texts_of
from lorica.tasks.questions.squad_json import read_squad_json
from lorica.tasks.readers import READERS

if TYPE_CHECKING:
    import pyarrow as pa

ROUNDS, LOCAL_STEPS = 20, 3
LARGEST_BATCH = 1024
SIBLINGS = ("test", "validation", "dev")

MINILM, VIT = "sentence-transformers/all-MiniLM-L6-v2", "WinKawaks/vit-tiny-patch16-224"
BASES = {
    "text-classification": (MINILM, "22M parameters; its sentence vectors are means of hidden states."),
    "text-regression": (MINILM, "22M parameters; its sentence vectors are means of hidden states."),
    "image-classification": (VIT, "6M parameters, 224 x 224 pixels."),
    "question-answering": ("distilbert/distilbert-base-cased", "65M parameters."),
    "language-modelling": ("HuggingFaceTB/SmolLM2-135M-Instruct", "135M parameters."),
}


@dataclass(frozen=True)
class Wishes:
    """What the user has said; None is for Lorica to find out."""

    test: str | None = None
    split: float | None = None
    task: str | None = None
    text: list[str] | None = None
    label: str | None = None
    by: str | None = None
    base: str | None = None
    clients: int | None = None
    epsilon: float = 3.0


@dataclass(frozen=True)
class Draft:
    """A configuration, where to write it, and the files that were split off for it."""

    path: Path
    text: str
    files: dict[Path, pa.Table]

    def write(self) -> None:
        """Write everything. What is private is readable by this account alone.

        Raises:
            UserError: the disk is full, or the folder is not writable.
        """
        from pyarrow import parquet

        for file, part in self.files.items():
            with write_errors(file):
                create_private(file)
                parquet.write_table(part, file)
        write_atomically(self.path, self.text.encode())


def draft_experiment(data: str, wishes: Wishes, output: Path | None = None) -> Draft:
    """The configuration of an experiment on a data file or image folder.

    Task, columns, labels and lengths come from the data, and so do batch size and noise: `smallest_good_batch` for 60
    steps. With `wishes.split`, the file is split into two, which are written beside it; equal records stay together.

    Raises:
        UserError: `output` exists; the data cannot be read, or does not say what is text, label or image; there is no
            public test set; a client would have too few records.
    """
    path = Path(data).expanduser()
    name = _name(path)
    target = output or Path(f"{name}.yaml")
    if target.exists():
        raise UserError("--output", str(target), "it exists", "choose another file, or delete it")
    table = _read(path)
    task = guess_task(table, wishes.task, wishes.text, wishes.label, wishes.by)
    files: dict[Path, pa.Table] = {}
    if wishes.test is None and wishes.split is not None:
        files = _split(path, table, wishes.split)
        (train, table), (test, _) = ((str(file), part) for file, part in files.items())
    else:
        train, test = data, wishes.test or _sibling(path)
    division, smallest, largest = _division(table, wishes)
    delta = min(1e-5, 10 ** math.floor(math.log10(0.1 / largest)))
    if smallest < 8:
        problem = f"a client has {smallest} records"
        raise UserError("DATA", data, problem, "give more data, fewer clients (--clients), or another column (--by)")
    sizes = usual_batch_sizes(smallest, LARGEST_BATCH)
    option = smallest_good_batch(smallest, ROUNDS * LOCAL_STEPS, wishes.epsilon, delta, sizes)
    text = _written(data, name, task | {"train": train, "test": test}, division, option, delta, wishes, bool(files))
    # What is written must be an experiment.
    load(yaml.safe_load(text))
    return Draft(target, text, files)


def _name(path: Path) -> str:
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in path.stem)
    return kept.strip("-") or "experiment"


def _read(path: Path) -> pa.Table:
    """All columns of the data."""
    if path.is_dir():
        if not has_images(path):
            raise UserError(
                "DATA", str(path), "it is not a folder of images", "give a data file, or FOLDER/label/image"
            )
        return read_image_folder(path, "DATA", "image", "label")
    if path.suffix.lower() == ".json":
        try:
            return read_squad_json(path, "DATA")
        except UserError:
            # Not of SQuAD's format: JSON lines.
            pass
    names = column_names(path, "DATA")
    return READERS[path.suffix.lower()](path, "DATA", dict.fromkeys(names, "DATA"))


def _sibling(path: Path) -> str:
    """The test set beside a file of training data."""
    if "train" in path.stem:
        for word in SIBLINGS:
            sibling = path.with_name(path.name.replace("train", word))
            if sibling.exists():
                return str(sibling)
    raise UserError(
        "--test",
        None,
        "there is no test set beside it, and results on a test set are published without noise",
        "give a public one (--test FILE), or set some records aside that ε then does not cover (--split 0.1)",
    )


def _split(path: Path, table: pa.Table, share: float) -> dict[Path, pa.Table]:
    """The files of the training data and of the test data, with their records."""
    import pyarrow as pa
    from pyarrow import compute

    if path.is_dir():
        raise UserError("--split", share, "a folder is not split", "move some images to another folder: --test FOLDER")
    rows = table.to_pylist()
    ranks = [hashlib.sha256(json.dumps(row, sort_keys=True, default=repr).encode()).digest()[:8] for row in rows]
    tested = pa.array([int.from_bytes(rank) < share * 2**64 for rank in ranks])
    parts = {"train": table.filter(compute.invert(tested)), "test": table.filter(tested)}
    files = {path.with_name(f"{path.stem}-{word}.parquet"): part for word, part in parts.items()}
    for file, part in files.items():
        if part.num_rows == 0:
            raise UserError("--split", share, f"no record is left for {file.name}", "choose another share")
        if file.exists():
            raise UserError("--split", share, f"{file} exists", "delete it, or give the two files: DATA --test FILE")
    return files


def _division(table: pa.Table, wishes: Wishes) -> tuple[dict[str, Any], int, int]:
    """Keys of the section `federation` that divide the records, and the smallest and largest client's number."""
    by = wishes.by or guess_owners(table)
    if by is not None and wishes.clients is None:
        sizes = Counter(texts_of(table, by, table.num_rows)).values()
        if len(sizes) > 1:
            return {"clients": len(sizes), "partition": "column", "by": by}, min(sizes), max(sizes)
    clients = wishes.clients or 3
    count = table.num_rows
    return {"clients": clients, "partition": "iid"}, count // clients, -(-count // clients)


def _written(
    data: str,
    name: str,
    task: dict[str, Any],
    division: dict[str, Any],
    option: Option,
    delta: float,
    wishes: Wishes,
    was_split: bool,
) -> str:
    base, about = BASES.get(task["type"], (None, "")) if wishes.base is None else (wishes.base, "")
    if base is None:
        raise UserError("--base", None, f"there is no usual base model for {task['type']}", "give one: --base MODEL")
    model: dict[str, Any] = {"base": base}
    if task["type"] in ("text-classification", "text-regression") and _pooled(base):
        model["pooling"] = "mean"
    if task["type"] == "language-modelling":
        model["head"] = "freeze"
    template = Path(__file__).with_name("experiment.yaml.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    return environment.from_string(template).render(
        name=name,
        about=about,
        model=_lines(model, ""),
        data=data,
        task=_lines({key: value for key, value in task.items() if key != "test"}, "  "),
        test=_lines({"test": task["test"]}, "  "),
        was_split=was_split,
        division=_lines(division, "  "),
        by=division.get("by"),
        rounds=ROUNDS,
        local_steps=LOCAL_STEPS,
        option=option,
        share=round(100 * option.batch_size / option.records),
        near=round(100 * (NEAR - 1)),
        largest=option.batch_size == LARGEST_BATCH,
        epsilon=f"{wishes.epsilon:g}",
        delta=f"{delta:.1e}".replace("e-0", "e-"),
    )


def _pooled(base: str) -> bool:
    """Whether an encoder has no classification head of its own that were worth keeping."""
    if base == MINILM:
        return True
    config = Path(base).expanduser() / "config.json"
    try:
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError):
        return False
    return not any(
        str(one).endswith(("ForSequenceClassification", "ForCausalLM", "LMHeadModel")) for one in architectures
    )


def _lines(content: dict[str, Any], indent: str) -> str:
    """YAML with one line a key."""
    dumped = (
        yaml.safe_dump({key: value}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
        for key, value in content.items()
    )
    # Without the braces around each.
    return "\n".join(f"{indent}{line.strip()[1:-1]}" for line in dumped)
