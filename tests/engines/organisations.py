"""Organisations with a data file, a policy and a tiny base model each, and a server that knows none of their paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lorica.adapters.base_files import hash_of_base
from lorica.config import ExperimentConfig, load
from lorica.messages import Invitation
from lorica.owner.settings import NodeSettings
from tests.tasks.test_whole_runs import sentences, tiny_bert, write_rows

DELTA = 1e-2
SIGMA = 1.0
RECORDS = (24, 30, 36)


class Organisations:
    """`clients` of them below `folder`: `org-0/data.jsonl`, `org-0/policy.yaml`, …"""

    def __init__(self, folder: Path, clients: int = 2, **policy: Any) -> None:
        self.folder = folder
        self.base = tiny_bert(folder / "encoder")
        self.places = [folder / f"org-{client}" for client in range(clients)]
        self.test = write_rows(folder / "test.jsonl", rows(20, 99))
        for client, place in enumerate(self.places):
            place.mkdir()
            write_rows(place / "data.jsonl", rows(RECORDS[client], client))
            self.write_policy(client, **policy)

    @property
    def data(self) -> list[str]:
        return [str(place / "data.jsonl") for place in self.places]

    def write_policy(self, client: int, **changes: Any) -> None:
        policy: dict[str, Any] = {
            "max_epsilon": 1000.0,
            "delta": DELTA,
            "base_models": [hash_of_base(self.base)],
            "tasks": [{"type": "text-classification"}],
            "noise": ["secure", "reproducible"],
        }
        (self.places[client] / "policy.yaml").write_text(yaml.safe_dump(policy | changes))

    def node_config(self, client: int, **changes: Any) -> dict[str, Any]:
        place = self.places[client]
        own = {"client": client, "data": str(place / "data.jsonl"), "policy": str(place / "policy.yaml")}
        return own | {"base": self.base, "worker": False} | changes

    def settings(self, client: int, **changes: Any) -> NodeSettings:
        return NodeSettings.of(self.node_config(client, **changes))

    def experiment(self, name: str, *overrides: str, noise: str = "reproducible") -> ExperimentConfig:
        """Of the server: two rounds of two steps at a fixed noise multiplier."""
        content: dict[str, Any] = {
            "name": name,
            "output": str(self.folder / "runs"),
            "engine": "flower",
            "model": {"base": self.base, "pooling": "mean", "threads": 1},
            "lora": {"r": 2},
            "task": {
                "type": "text-classification",
                "train": self.data,
                "test": self.test,
                # The sentences are made of few words.
                "test_overlap": "allow",
                "labels": ["bad", "good"],
                "max_length": 16,
            },
            "federation": {
                "clients": len(self.places),
                "partition": "files",
                "rounds": 2,
                "local_steps": 2,
                "batch_size": 8,
            },
            "privacy": {
                "epsilon": None,
                "noise_multiplier": SIGMA,
                "delta": DELTA,
                "noise": noise,
                "ledger": str(self.folder / f"{name}.sqlite"),
            },
            "flower": {"superlink": "loopback", "wait": 1, "timeout": 60},
        }
        return load(content, list(overrides))


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"text": text, "label": "good" if "good" in text else "bad"} for text in sentences(count, seed)]


def invitation(config: ExperimentConfig, base: str, run: str = "run") -> Invitation:
    """As a server sends it."""
    from lorica.engines.flower.server import for_nodes
    from lorica.tasks.loading import load_tests

    return Invitation(run, for_nodes(config, load_tests(config.task, config.model.base)).model_dump_json(), base)
