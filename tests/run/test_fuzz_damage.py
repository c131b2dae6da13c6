"""Every file that a run leaves, damaged in every way, before everything that reads it.

A reader gives the right result, or one `UserError` that names the file; never another exception, and never a wrong
result. `LORICA_FUZZ_SEED` chooses other places of a damage.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorica
from lorica.errors import UserError
from lorica.reporting.budget import read_budget
from lorica.reporting.html import write_report
from lorica.run.result import Result
from tests.fuzzing import draws_of

LONGEST_SECONDS = 10
SMALL = [
    "federation.clients=2",
    "federation.rounds=3",
    "federation.partition=iid",
    "federation.local_steps=1",
    "federation.batch_size=16",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.5",
    "privacy.noise=reproducible",
]


class Stop(Exception):
    pass


@dataclass(frozen=True)
class Place:
    """A finished run `done` and an interrupted one `half`, each with its own ledger, and Lorica's home.

    Attributes:
        saved: an undamaged copy.
        right: what the undamaged files give.
    """

    root: Path
    saved: Path
    some_digits: list[str]
    right: dict[str, Any]

    def experiment(self, name: str) -> lorica.Experiment:
        own = [f"output={self.root}", f"name={name}", f"privacy.ledger={self.root}/{name}.sqlite"]
        return lorica.Experiment.load(overrides=[*SMALL, *self.some_digits, *own])

    def restore(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.saved, self.root)


def weights(result: Result) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


def results_of(result: Result) -> dict[str, Any]:
    scores = [row.get("score") for row in result.metrics]
    clients = [{key: row[key] for key in ("client", "steps", "epsilon")} for row in result.privacy["clients"]]
    return {"weights": weights(result), "scores": scores, "clients": clients}


def budget_of(path: Path) -> Any:
    found = read_budget(path, 1e-5)
    return "a problem is shown" if found["problem"] else found["runs"]


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return dict(lorica.load_adapter(path).state_dict())


READERS: dict[str, Callable[[Place], Any]] = {
    "run again": lambda place: results_of(place.experiment("done").run()),
    "resume": lambda place: results_of(place.experiment("half").run()),
    "report": lambda place: len(write_report(place.root / "done").read_bytes()) > 10_000,
    "report of half": lambda place: len(write_report(place.root / "half").read_bytes()) > 10_000,
    "budget": lambda place: budget_of(place.root / "done.sqlite"),
    "budget of half": lambda place: budget_of(place.root / "half.sqlite"),
    "load": lambda place: loaded(place.root / "done" / "adapter"),
}


def same(one: Any, other: Any) -> bool:
    """Equal, or without the scores of rounds that stood in a file that is gone."""
    if isinstance(one, dict) and "scores" in one and one["scores"] == other["scores"][-len(one["scores"]) :]:
        one, other = one | {"scores": []}, other | {"scores": []}
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def readers_of(file: Path) -> list[str]:
    """The readers of a file, given by its path below the root."""
    if file.parts[0] == "home":
        return ["run again", "resume", "budget"]
    if file.suffix == ".sqlite":
        return ["resume", "budget of half"] if file.stem == "half" else ["run again", "budget"]
    if file.parts[0] == "half":
        return ["resume", "report of half"]
    return ["run again", "report", "load"] if "adapter" in file.parts else ["run again", "report"]


def flipped(content: bytes, draws: random.Random) -> bytes:
    at = draws.randrange(len(content)) if content else 0
    return content[:at] + bytes([content[at] ^ (1 << draws.randrange(8))]) + content[at + 1 :] if content else b"x"


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "removed": lambda content, draws: None,
    "empty": lambda content, draws: b"",
    "cut": lambda content, draws: content[: draws.randrange(len(content) or 1)],
    "zeroed": lambda content, draws: bytes(len(content)),
    "flipped": flipped,
    "text": lambda content, draws: b"<html>404: Not Found</html>\n",
    "json": lambda content, draws: draws.choice([b"{}", b"[]", b"null", b"1e999", b"[" * 5000, b'{"run": {}}']),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, some_digits: list[str]) -> Place:
    root = tmp_path_factory.mktemp("damage") / "root"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LORICA_HOME", str(root / "home"))
        whole = Place(root, root.with_name("saved"), some_digits, {})

        def stop(metrics: dict[str, Any]) -> None:
            if metrics["round"] == 2:
                raise Stop

        whole.experiment("done").run()
        with pytest.raises(Stop):
            whole.experiment("half").run(on_round=stop)
        shutil.copytree(root, whole.saved)
        for name, reader in READERS.items():
            whole.right[name] = reader(whole)
            whole.restore()
    return whole


def files_of(place: Place) -> list[Path]:
    found = sorted(path.relative_to(place.saved) for path in place.saved.rglob("*") if path.is_file())
    return [path for path in found if path.suffix not in (".png", ".html", ".md") and path.name != ".lock"]


def named(file: Path, error: UserError) -> bool:
    """Whether an error names the file, or its folder where the whole folder is to be deleted."""
    if file.name == "checksums.json":
        # A wrong checksum cannot be told from a wrong file.
        return "damaged" in str(error)
    return any(part in str(error) for part in (file.name, *file.parts[1:-1], file.parts[0]))


def check(place: Place, file: Path, damage: str) -> list[str]:
    """What goes wrong with this damage."""
    wrong = []
    for reader in readers_of(file):
        place.restore()
        path = place.root / file
        content = DAMAGES[damage](path.read_bytes(), draws_of(file, damage))
        path.unlink() if content is None else path.write_bytes(content)
        case, started = f"{file} {damage}, {reader}", time.process_time()
        try:
            found = READERS[reader](place)
        except UserError as error:
            if not named(file, error):
                wrong.append(f"{case}: not named: {error}")
        except Exception as error:
            wrong.append(f"{case}: {type(error).__name__}: {error}")
        else:
            if not (same(found, place.right[reader]) or found == "a problem is shown"):
                wrong.append(f"{case}: another result: {json.dumps(found, default=str)[:300]}")
        if time.process_time() - started > LONGEST_SECONDS:
            wrong.append(f"{case}: {time.process_time() - started:.0f} s")
    return wrong


@pytest.mark.integration
@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_damage_is_named_or_does_no_harm(monkeypatch: pytest.MonkeyPatch, place: Place, count: int) -> None:
    monkeypatch.setenv("LORICA_HOME", str(place.root / "home"))
    cases = [(file, damage) for file in files_of(place) for damage in DAMAGES]
    assert len(cases) > 150
    chosen = draws_of("damage", count).sample(cases, min(count, len(cases)))
    wrong = [one for case in chosen for one in check(place, *case)]
    assert not wrong, "\n".join(wrong)
