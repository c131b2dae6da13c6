"""Secure summation between a server and nodes: the same sums as in one process, and no single reply for the server."""

from __future__ import annotations

import json
import logging
import math
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
from lorica.owner import node
from lorica.owner.identity import make_identity
from lorica.owner.settings import NodeSettings
from lorica.server.federation import TooFewReplies
from lorica.tensors import decode
from tests.engines.in_process import InProcessGrid
from tests.engines.organisations import Organisations, invitation
from tests.reports import draw_nothing
from tests.tiers import integration, slow

Load = Callable[..., lorica.Experiment]
SMALL = [
    "federation.clients=4",
    "federation.rounds=2",
    "federation.local_steps=1",
    "federation.batch_size=8",
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
    draw_nothing(monkeypatch)
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
    except ValueError:
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


@pytest.mark.parametrize("stage", ["shares", *integration("revealed"), *slow("keys", "masked")])
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


@pytest.mark.integration
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


class Clinics(Organisations):
    """Three owners with identity keys, and policies that list them."""

    def __init__(self, folder: Path, **policy: Any) -> None:
        super().__init__(folder, 3)
        lines = [make_identity(place, f"clinic-{client}") for client, place in enumerate(self.places)]
        self.members = dict(enumerate(lines))
        for client in range(3):
            self.write_policy(client, **{"sums_only": True, "members": self.members} | policy)

    def node_config(self, client: int, **changes: Any) -> dict[str, Any]:
        return super().node_config(client, **{"identity": str(self.places[client] / "identity.key")} | changes)

    def config(self, name: str, *overrides: str) -> Any:
        return self.experiment(name, *ONE_SUM, *overrides)

    def asked(self, client: int, *overrides: str, **settings: Any) -> dict[str, str | bytes]:
        """What a node answers to an invitation."""
        node.agreed.cache_clear()
        sent = invitation(self.config("asked", *overrides), node.base_identity(self.base))
        return node.respond(NodeSettings.of(self.node_config(client, **settings)), sent.encode(), None)


ONE_SUM = ["federation.secure_sum=true", "federation.rounds=1", "federation.local_steps=1"]


@pytest.fixture
def clinics(tmp_path: Path) -> Clinics:
    (tmp_path / "world").mkdir()
    return Clinics(tmp_path / "world")


class Altering(InProcessGrid):
    """A hub that changes questions: (stage, node, question) -> question."""

    def __init__(self, clinics: Clinics, change: Any) -> None:
        super().__init__([clinics.node_config(client) for client in range(3)])
        self.change = change

    def answer(self, message: Any) -> Any:
        record = message.content["lorica"]
        if "question" in record:
            question = json.loads(str(record["question"]))
            changed = self.change(question["stage"], message.metadata.dst_node_id - 1, question)
            record["question"] = json.dumps(changed)
        return super().answer(message)


def test_owners_that_list_each_other_add_up(clinics: Clinics, caplog: pytest.LogCaptureFixture) -> None:
    result = serve(clinics.config("listed"), Altering(clinics, lambda stage, client, question: question))
    assert [row["missing"] for row in result.metrics if row["round"]] == [[]]
    assert "lists no members" not in caplog.text


def test_a_hub_that_swaps_keys_gets_nothing_and_the_member_is_named(
    clinics: Clinics, caplog: pytest.LogCaptureFixture
) -> None:
    def swap(stage: str, client: int, question: dict[str, Any]) -> dict[str, Any]:
        if stage == "shares" and client == 0:
            question["keys"]["1"] = "11" * 32 + "22" * 32 + question["keys"]["1"][128:]
        return question

    with pytest.raises(TooFewReplies):
        serve(clinics.config("swapped"), Altering(clinics, swap))
    assert "client 1: its public keys are not signed for this sum by ed25519:" in caplog.text
    assert "clinic-1" in caplog.text


def test_a_hub_that_announces_another_exchange_gets_nothing(clinics: Clinics, caplog: pytest.LogCaptureFixture) -> None:
    """Else one reply could be in several sums, each announced as another."""

    def rename(stage: str, client: int, question: dict[str, Any]) -> dict[str, Any]:
        if stage == "keys":
            question["agreement"]["exchange"] = 2
        return question

    with pytest.raises(TooFewReplies):
        serve(clinics.config("renamed"), Altering(clinics, rename))
    assert "a different round or exchange than announced" in caplog.text


def test_a_hub_that_picks_the_weights_gets_nothing(clinics: Clinics, caplog: pytest.LogCaptureFixture) -> None:
    def alone(stage: str, client: int, question: dict[str, Any]) -> dict[str, Any]:
        if stage == "keys":
            question["agreement"]["weights"] = [[0, 0.98], [1, 0.01], [2, 0.01]]
        return question

    with pytest.raises(TooFewReplies):
        serve(clinics.config("alone"), Altering(clinics, alone))
    assert caplog.text.count("client 0: its share of the sum is 0.98, but this client allows at most 0.5") >= 3


def test_the_policy_sets_the_limits_of_a_sum(clinics: Clinics, caplog: pytest.LogCaptureFixture) -> None:
    clinics.write_policy(2, members=clinics.members, max_share_in_sum=0.3)
    with pytest.raises(TooFewReplies):
        serve(clinics.config("limits"), Altering(clinics, lambda stage, client, question: question))
    assert "its share of the sum is 0.333, but this client allows at most 0.3" in caplog.text


def test_runs_of_sums_that_a_policy_does_not_allow_are_refused_before_they_start(clinics: Clinics) -> None:
    assert "plan" in clinics.asked(0)
    clinics.write_policy(0, members=clinics.members, min_clients_in_sum=4)
    assert str(clinics.asked(0)["refused"]).startswith("policy.min_clients_in_sum: the server proposes sums over 3")
    clinics.write_policy(0, members={client: clinics.members[client] for client in (0, 1)})
    refused = str(clinics.asked(0)["refused"])
    assert refused == "policy.members: the server proposes federation.clients = 3; the clients listed are 0, 1"


def test_a_node_needs_the_identity_that_its_own_policy_lists(
    clinics: Clinics, caplog: pytest.LogCaptureFixture
) -> None:
    told = "the node cannot take part because of its node-config.identity; see its log"
    assert clinics.asked(0, identity=None)["refused"] == told
    assert "the policy lists members" in caplog.text
    other = str(clinics.places[1] / "identity.key")
    assert clinics.asked(0, identity=other)["refused"] == told
    assert "it is not the key listed in the policy for this node (client 0)" in caplog.text
    (clinics.places[0] / "identity.key").chmod(0o644)
    assert clinics.asked(0)["refused"] == told
    assert "other accounts can read it" in caplog.text


def test_without_members_the_log_says_once_what_a_sum_does_not_protect_against(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "world").mkdir()
    clinics = Clinics(tmp_path / "world", members=None)
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        # Another process each time.
        assert "plan" in clinics.asked(0)
    assert caplog.text.count("a server that invents clients or replaces their keys can still read single replies") == 1


def test_what_an_earlier_version_left_of_a_sum_is_named(clinics: Clinics, caplog: pytest.LogCaptureFixture) -> None:
    def old(stage: str, client: int, question: dict[str, Any]) -> dict[str, Any]:
        for path in clinics.places[0].rglob("invitation.json"):
            path.with_name("sum.json").write_text('{"state": null, "given": null, "shown": null}')
        return question

    with pytest.raises(TooFewReplies):
        serve(clinics.config("old"), Altering(clinics, old))
    assert "by another version of Lorica; finish the run with that version, or start a new run" in caplog.text
    assert "sum.json" in caplog.text


SHARING = ["privacy.noise_against=sums", "federation.min_clients=3", "federation.weights=noise"]


@pytest.mark.integration
def test_shared_noise_over_flower_is_that_of_one_process_with_dropouts_too(config: Load) -> None:
    """All stay, or one is lost before its masked input: the same sums, and both guarantees stated."""
    local = config("local", *SHARING).run()
    distant = serve(config("distant", *SHARING).config, Watching(nodes()))
    ours, theirs = adapter(distant.adapter), adapter(local.adapter)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for result in (local, distant):
        row = result.privacy["clients"][0]
        assert row["noise_multiplier"] == pytest.approx(math.sqrt(2) * row["own_noise_multiplier"])
        assert row["epsilon"] < row["epsilon_own_noise"]
        assert "sums over at least 3 owners" in result.privacy["adversary"]
    some = serve(config("some", *SHARING).config, Watching(nodes(), {"masked": {2}}))
    assert [row["missing"] for row in some.metrics if row["round"]] == [[2], [2]]
    with pytest.raises(TooFewReplies):
        serve(config("few", *SHARING).config, Watching(nodes(), {"masked": {1, 2}}))


@pytest.mark.integration
def test_owners_share_noise_if_their_policies_allow_it_among_listed_members(clinics: Clinics) -> None:
    sharing = [*SHARING[:2], "federation.weights=uniform"]
    refused = "policy.noise_against: the server proposes privacy.noise_against = 'sums'; only 'replies' is allowed"
    assert clinics.asked(0, *sharing)["refused"] == refused
    for client in range(3):
        clinics.write_policy(client, members=clinics.members, noise_against="sums", min_noise_multiplier=0.9)
    assert "plan" in clinics.asked(0, *sharing)
    result = serve(clinics.config("shared", *sharing), Altering(clinics, lambda stage, client, question: question))
    assert [row["missing"] for row in result.metrics if row["round"]] == [[]]


def test_a_hub_that_tells_the_others_of_less_noise_gets_nothing(clinics: Clinics) -> None:
    def quiet(stage: str, client: int, question: dict[str, Any]) -> dict[str, Any]:
        if stage == "keys" and client != 0:
            question["agreement"]["noise"]["colluding"] = 0
        return question

    for client in range(3):
        clinics.write_policy(client, members=clinics.members, noise_against="sums", min_noise_multiplier=0.9)
    with pytest.raises(TooFewReplies):
        serve(clinics.config("quiet", *SHARING[:2]), Altering(clinics, quiet))
