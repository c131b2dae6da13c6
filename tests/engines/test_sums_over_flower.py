"""Secure summation between a server and nodes: the same sums as in one process, and no single reply for the server."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

pytest.importorskip("flwr")

import lorica
from lorica.engines.flower.server import serve
from lorica.errors import UserError
from lorica.messages import decode
from lorica.owner import node
from lorica.server.federation import TooFewReplies
from tests.engines.in_process import InProcessGrid

Load = Callable[..., lorica.Experiment]
SMALL = [
    "federation.clients=4",
    "federation.rounds=2",
    "federation.local_steps=1",
    "federation.batch_size=32",
    "federation.secure_sum=true",
    "federation.partition=iid",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.0",
    "privacy.noise=reproducible",
    "lora.r=2",
    "seed=1",
]


@pytest.fixture(autouse=True)
def fresh_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing takes longer than these runs.
    monkeypatch.setattr("lorica.run.rounds.write_report", lambda folder: None)
    monkeypatch.setattr("lorica.engines.flower.engine.POLL_SECONDS", 0.01)
    node.agreed.cache_clear()


@pytest.fixture
def config(tmp_path: Path, some_digits: list[str]) -> Load:
    def load(name: str, *overrides: str) -> lorica.Experiment:
        places = [f"output={tmp_path}", f"name={name}", f"privacy.ledger={tmp_path / name}.sqlite"]
        return lorica.Experiment.load(overrides=[*SMALL, *some_digits, *places, *overrides])

    return load


def nodes(count: int = 4) -> list[dict[str, Any]]:
    return [{"partition-id": number, "num-partitions": count} for number in range(count)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


class Watching(InProcessGrid):
    """Keeps the replies that the server gets; nodes named in `deaf` do not answer questions of that stage."""

    def __init__(self, node_configs: list[dict[str, Any]], deaf: dict[str, set[int]] | None = None) -> None:
        super().__init__(node_configs)
        self.seen: list[bytes] = []
        self.deaf = deaf or {}

    def answer(self, message: Any) -> Any:
        question = str(message.content["lorica"].get("question", ""))
        for stage, whom in self.deaf.items():
            if f'"{stage}"' in question and message.metadata.dst_node_id - 1 in whom:
                message.content["lorica"]["question"] = "lost"
        reply = super().answer(message)
        content = reply.content["lorica"].get("reply") if reply.has_content() else None
        if content is not None:
            self.seen.append(bytes(content))
        return reply


def _read(content: bytes) -> str:
    try:
        return "tensors" if decode(content) else "no tensors"
    except safetensors.SafetensorError:
        return "not readable"


def test_sums_over_flower_are_those_of_one_process(config: Load, own_home: Path) -> None:
    local = config("local").run()
    grid = Watching(nodes())
    distant = serve(config("distant").config, grid)
    ours, theirs = adapter(distant.adapter), adapter(local.adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # No message up could be read as a reply, but for the empty ones to the final delivery.
    assert {_read(content) for content in grid.seen} == {"no tensors", "not readable"}
    secrets = list(own_home.rglob("sum.json"))
    assert len(secrets) == 4
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "revealed"])
def test_a_node_that_is_lost_at_any_stage_does_not_stop_the_rest(stage: str, config: Load) -> None:
    result = serve(config("some", "federation.min_clients=3").config, Watching(nodes(), {stage: {2}}))
    rounds = [row for row in result.metrics if row["round"]]
    gone = [] if stage == "revealed" else [2]
    assert [row["missing"] for row in rounds] == [gone, gone]


def test_too_few_nodes_for_a_sum_stop_the_run(config: Load) -> None:
    with pytest.raises(TooFewReplies, match=r"federation\.min_clients"):
        serve(config("few", "federation.min_clients=3").config, Watching(nodes(), {"masked": {1, 2}}))


def test_a_node_shows_no_single_reply_in_a_run_of_sums(tmp_path: Path, config: Load) -> None:
    """A server that invites to sums and then asks for replies gets refusals, and nothing is charged."""
    grid = InProcessGrid(nodes())
    asked = grid.answer

    def without_question(message: Any) -> Any:
        if "request" in message.content["lorica"] and "question" in message.content["lorica"]:
            del message.content["lorica"]["question"]
        return asked(message)

    grid.answer = without_question  # type: ignore[method-assign]
    with pytest.raises(TooFewReplies):
        serve(config("greedy").config, grid)
    from lorica.privacy.ledger import Ledger

    assert Ledger(tmp_path / "greedy.sqlite").releases() == []


def test_the_model_travels_in_one_stage_only(config: Load) -> None:
    grid = InProcessGrid(nodes())
    result = serve(config("once", "federation.rounds=1").config, grid)
    asked = [message.content["lorica"] for message in grid.sent if "question" in message.content["lorica"]]
    assert len(asked) == 16
    carried = [len(record["request"]) for record in asked if "request" in record]
    assert len(carried) == 4
    assert sum(carried) < 1.3 * sum(result.metrics[1]["bytes_down"].values())


def test_an_input_without_a_request_is_refused(config: Load, caplog: pytest.LogCaptureFixture) -> None:
    grid = InProcessGrid(nodes())
    asked = grid.answer

    def without_request(message: Any) -> Any:
        if "question" in message.content["lorica"]:
            message.content["lorica"].pop("request", None)
        return asked(message)

    grid.answer = without_request  # type: ignore[method-assign]
    with pytest.raises(TooFewReplies):
        serve(config("unsaid", "federation.rounds=1").config, grid)
    assert "a masked input without a request" in caplog.text


def test_a_run_of_sums_needs_three_clients(config: Load) -> None:
    with pytest.raises(UserError, match=r"federation\.participation.*federation\.secure_sum"):
        config("two", "federation.clients=2").run()
