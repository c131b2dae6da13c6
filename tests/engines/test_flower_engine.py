"""The same experiment gives the same adapter whichever engine moves the messages, and whatever stops in between."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flwr.app import Error, Message
from flwr.common.serde import message_from_proto, message_to_proto
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lorica
from lorica.config import OptimizerConfig
from lorica.engines.flower.server import serve
from lorica.errors import UserError
from lorica.local.step import LocalStep
from lorica.messages import Delivery, Projection, Request, Training
from lorica.methods.base import registry
from lorica.owner.node import agreed
from lorica.privacy.ledger import Ledger
from lorica.privacy.mechanism import Terms
from lorica.run.result import Result
from lorica.tensors import TYPES
from tests.engines.in_process import InProcessGrid
from tests.engines.organisations import Organisations
from tests.reports import draw_nothing
from tests.tiers import integration, slow

METHODS = sorted(registry())
SHORT = ["federation.rounds=1", "federation.local_steps=1"]


@pytest.fixture(autouse=True)
def fresh_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed.cache_clear()
    # Drawing takes longer than these runs.
    draw_nothing(monkeypatch)
    monkeypatch.setattr("lorica.engines.flower.engine.POLL_SECONDS", 0.01)


def local(organisations: Organisations, name: str, *overrides: str) -> Result:
    config = organisations.experiment(name, *overrides, "engine=local", "flower.superlink=null")
    return lorica.Experiment(config).run()


def grid(organisations: Organisations) -> InProcessGrid:
    return InProcessGrid([organisations.node_config(client) for client in range(len(organisations.places))])


def weights(adapter: Path) -> dict[str, Tensor]:
    return dict(safetensors.torch.load_file(adapter / "adapter_model.safetensors"))


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert first
    assert not different


def own_adapter(organisations: Organisations, client: int) -> Path:
    (found,) = (organisations.places[client] / "data.jsonl.lorica").glob("run-*/adapter")
    return found


def charged(organisations: Organisations, client: int) -> list[tuple[int, int]]:
    """(round, steps) of every release that an organisation's ledger holds."""
    releases = Ledger(organisations.places[client] / "data.jsonl.ledger.sqlite").releases()
    return [(release.round, release.steps) for release in releases]


# One for each kind of state: the server's scores, what a client keeps between exchanges, merged increments, a model of
# each client's own, R between frozen factors, and control variates.
OFTEN: list[tuple[str, list[str]]] = [
    *((name, []) for name in ("as-lora", "fedask", "flora", "fedsa-lora", "fed-sb")),
    ("fed-avg", ["local.scaffold=true", "local.fedprox=0.1"]),
]
RARELY: list[tuple[str, list[str]]] = [
    *((name, []) for name in METHODS if (name, []) not in OFTEN),
    ("flora", ["lora.client_ranks=[1, 2]"]),
    ("fedask", ["lora.client_ranks=[2, 1]"]),
]


@pytest.mark.parametrize(("name", "pieces"), [*OFTEN, *slow(*RARELY)])
def test_both_engines_give_the_same_adapter(
    name: str, pieces: list[str], tmp_path: Path, in_one_process: Callable[..., Result]
) -> None:
    """Local: one process with all files. Flower: a node for each file, which alone knows it."""
    organisations = Organisations(tmp_path)
    here = in_one_process(f"method.name={name}", *pieces)
    there = serve(organisations.experiment("flower", f"method.name={name}", *pieces), grid(organisations))
    if registry()[name].personal:
        for client in range(2):
            assert_same(here.adapter / f"client-{client}", own_adapter(organisations, client))
    else:
        assert_same(here.adapter, there.adapter)
        assert [row["loss"] for row in here.metrics] == [row["loss"] for row in there.metrics]
        for client in range(2):
            assert_same(here.adapter, own_adapter(organisations, client))
    keys = ("records", "steps", "planned_steps", "releases", "epsilon", "epsilon_rdp", "noise_multiplier")
    costs = [[{key: row[key] for key in keys} for row in result.privacy["clients"]] for result in (here, there)]
    assert costs[0] == costs[1]
    assert costs[0][0]["steps"] == 4


@pytest.mark.integration
def test_a_simulation_gives_the_same_adapter_too(tmp_path: Path) -> None:
    """Nodes without data of their own share out the server's, by the partition of the experiment."""
    organisations = Organisations(tmp_path)
    changes = ["federation.partition=iid", "flower.superlink=null"]
    here = local(organisations, "local", *changes)
    nodes = InProcessGrid([{"partition-id": client, "num-partitions": 2} for client in range(2)])
    assert_same(here.adapter, serve(organisations.experiment("flower", *changes), nodes).adapter)


class Killed(BaseException):
    """Ends the server as a signal does: nothing catches it."""


class KilledServer(InProcessGrid):
    """The server dies when the node has answered the `last`-th request: the ledger is charged, the reply is lost."""

    def __init__(self, node_configs: list[dict[str, Any]], last: int) -> None:
        super().__init__(node_configs)
        self.left = last

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        pushed = super().push_messages(messages)
        self.left -= sum(message.metadata.message_type == "train" for message in messages)
        if self.left <= 0:
            raise Killed
        return pushed


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("fedsa-lora", 3),
        *integration(("fedask", 1), ("as-lora", 1), ("flora", 3)),
        *slow(("as-lora", 3), ("fedask", 3), ("flora", 1), ("fedsa-lora", 1)),
    ],
)
def test_a_server_that_died_resumes_without_charging_twice(
    name: str, last: int, tmp_path: Path, in_one_process: Callable[..., Result]
) -> None:
    organisations = Organisations(tmp_path)
    here = in_one_process(f"method.name={name}")
    config = organisations.experiment("flower", f"method.name={name}")
    configs = [organisations.node_config(client) for client in range(2)]
    with pytest.raises(Killed):
        serve(config, KilledServer(configs, last))
    agreed.cache_clear()
    there = serve(config, grid(organisations))
    for client in range(2):
        assert sum(steps for _, steps in charged(organisations, client)) == 4
        if registry()[name].personal:
            assert_same(here.adapter / f"client-{client}", own_adapter(organisations, client))
        else:
            assert_same(here.adapter, there.adapter)
    assert [row["steps"] for row in there.privacy["clients"]] == [4, 4]
    assert [row["round"] for row in there.metrics] == [0, 1, 2]


class ColdNodes(InProcessGrid):
    """Every message finds a process that has just started."""

    def answer(self, message: Message) -> Message:
        agreed.cache_clear()
        return super().answer(message)


@pytest.mark.parametrize("name", ["fedask", *slow("as-lora", "flora")])
def test_nodes_need_no_memory_between_messages(
    name: str, tmp_path: Path, in_one_process: Callable[..., Result]
) -> None:
    organisations = Organisations(tmp_path)
    here = in_one_process(f"method.name={name}")
    cold = ColdNodes([organisations.node_config(client) for client in range(2)])
    assert_same(here.adapter, serve(organisations.experiment("flower", f"method.name={name}"), cold).adapter)


class ForgetfulNode(InProcessGrid):
    """The first organisation loses its node's folder, though not its ledger, after its `last`-th request."""

    def __init__(self, node_configs: list[dict[str, Any]], place: Path, last: int) -> None:
        super().__init__(node_configs)
        self.place, self.left = place, last

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if message.metadata.dst_node_id == 1 and message.metadata.message_type == "train":
            self.left -= 1
            if self.left == 0:
                shutil.rmtree(self.place)
                agreed.cache_clear()
        return reply


def test_a_node_that_lost_its_folder_misses_a_round_and_gets_everything_again(tmp_path: Path) -> None:
    organisations = Organisations(tmp_path)
    config = organisations.experiment("flower", "federation.min_clients=1", "federation.rounds=3")
    configs = [organisations.node_config(client) for client in range(2)]
    nodes = ForgetfulNode(configs, organisations.places[0] / "data.jsonl.lorica", last=1)
    result = serve(config, nodes)
    assert [row["participants"] for row in result.metrics[1:]] == [[0, 1], [1], [0, 1]]
    assert charged(organisations, 0) == [(1, 2), (3, 2)]
    assert charged(organisations, 1) == [(1, 2), (2, 2), (3, 2)]


class LateNode(InProcessGrid):
    """The last organisation connects once the server has sent its first request."""

    def get_node_ids(self) -> list[int]:
        started = any(message.metadata.message_type == "train" for message in self.sent)
        return list(self.contexts) if started else list(self.contexts)[:-1]


@pytest.mark.integration
def test_a_node_that_comes_late_takes_part_from_the_next_round(tmp_path: Path) -> None:
    organisations = Organisations(tmp_path)
    changes = ["federation.min_clients=1", "federation.rounds=3", "flower.wait=0.1"]
    late = LateNode([organisations.node_config(client) for client in range(2)])
    result = serve(organisations.experiment("flower", *changes), late)
    assert [row["participants"] for row in result.metrics[1:]] == [[0], [0, 1], [0, 1]]
    assert charged(organisations, 1) == [(2, 2), (3, 2)]


@pytest.mark.parametrize(("wait", "timeout"), [(70, 50), (40, 50)])
def test_an_invitation_lives_as_long_as_the_server_waits_for_it(tmp_path: Path, wait: int, timeout: int) -> None:
    organisations = Organisations(tmp_path)
    nodes = grid(organisations)
    serve(organisations.experiment("flower", *SHORT, f"flower.wait={wait}", f"flower.timeout={timeout}"), nodes)
    lives = {(message.metadata.message_type, message.metadata.ttl) for message in nodes.sent}
    assert lives == {("query", max(wait, timeout)), ("train", timeout)}


class RestartedNode(InProcessGrid):
    """The first two invitations of the first organisation are lost with its node."""

    lost = 0

    def answer(self, message: Message) -> Message:
        if message.metadata.dst_node_id == 1 and self.lost < 2:
            self.lost += 1
            lost = Message(Error(3, "the requested message could not be found"), reply_to=message)
            return message_from_proto(message_to_proto(lost))
        return super().answer(message)


def test_a_lost_invitation_is_sent_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    organisations = Organisations(tmp_path)
    nodes = RestartedNode([organisations.node_config(client) for client in range(2)])
    serve(organisations.experiment("flower", *SHORT, "flower.wait=60"), nodes)
    assert nodes.lost == 2
    assert caplog.text.count("node 1 did not answer: Flower reports error 3") == 1


def test_a_refusal_is_not_asked_for_again_while_the_server_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    organisations = Organisations(tmp_path, max_epsilon=0.001)
    nodes = grid(organisations)
    with pytest.raises(UserError, match=r"federation\.min_clients"):
        serve(organisations.experiment("flower", "flower.wait=1"), nodes)
    assert len(nodes.sent) == 2
    assert len(re.findall(r"node \d refused: policy.max_epsilon", caplog.text)) == 2


def test_the_run_does_not_start_without_its_clients(tmp_path: Path) -> None:
    organisations = Organisations(tmp_path)
    config = organisations.experiment("flower", "flower.wait=0.1")
    with pytest.raises(UserError, match=r"federation\.min_clients"):
        serve(config, InProcessGrid([organisations.node_config(0)]))
    assert charged(organisations, 0) == []


def test_a_second_node_with_the_same_number_is_not_taken_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    organisations = Organisations(tmp_path)
    shutil.copytree(organisations.places[0], tmp_path / "impostor")
    impostor = {key: str(tmp_path / "impostor" / name) for key, name in (("data", "data.jsonl"),)}
    configs = [organisations.node_config(0), organisations.node_config(0, **impostor), organisations.node_config(1)]
    nodes = InProcessGrid(configs)
    serve(organisations.experiment("flower", *SHORT), nodes)
    assert "node 2 was rejected: client 0 is on another node" in caplog.text
    trained = {message.metadata.dst_node_id for message in nodes.sent if message.metadata.message_type == "train"}
    assert trained == {1, 3}
    assert Ledger(tmp_path / "impostor" / "data.jsonl.ledger.sqlite").releases() == []


DTYPES = list(TYPES)
SHAPES = st.lists(st.integers(0, 3), max_size=3)
NAMES = st.text(min_size=1, max_size=8)


@st.composite
def tensors(draw: Any) -> Tensor:
    """Any values, zero sizes and layouts that are not contiguous among them."""
    value = 3 * torch.randn(draw(SHAPES), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    value = value.to(draw(st.sampled_from(DTYPES)))
    return value.T if value.dim() == 2 and draw(st.booleans()) else value


NAMED = st.dictionaries(NAMES, tensors(), max_size=3)
PAIRED = st.dictionaries(NAMES, st.tuples(tensors(), tensors()), max_size=2)
WORK = st.one_of(
    st.builds(Projection, NAMED),
    st.builds(Delivery, NAMED, PAIRED, st.booleans(), st.booleans()),
    st.builds(
        Training,
        trained=st.lists(NAMES).map(tuple),
        terms=st.builds(
            Terms,
            st.floats(0, 1),
            st.integers(1, 100),
            st.floats(min_value=0, allow_nan=False),
            st.floats(min_value=0, allow_nan=False),
        ),
        steps=st.integers(1, 9),
        optimizer=st.builds(OptimizerConfig, name=st.sampled_from(["sgd", "adamw"])),
        rates=st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=2),
        local=st.builds(LocalStep, alternate=st.booleans(), damping=st.none() | st.floats(0, 1)),
        corrections=NAMED,
        rank=st.none() | st.integers(1, 4),
        personal=st.lists(NAMES).map(tuple),
        sketch_columns=st.none() | st.integers(1, 4),
        last_step_energy=st.booleans(),
    ),
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        # Bits, since NaN is not equal to itself.
        return one.dtype == other.dtype and one.shape == other.shape and bool(((one == other) | (one != one)).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(NAMED, PAIRED, WORK, st.booleans(), st.integers(0, 9))
def test_requests_survive_the_wire(
    sent: dict[str, Tensor], increments: Any, work: Any, restart: bool, sequence: int
) -> None:
    request = Request("run", 1, 2, 3, sent, work, increments, restart, sequence)
    arrived = Request.decode(request.encode())
    assert type(arrived.work) is type(work)
    for key, value in vars(request).items():
        if key != "work":
            assert same(value, getattr(arrived, key)), key
    for key, value in vars(work).items():
        assert same(value, getattr(arrived.work, key)), key
    assert arrived.digest({}, {}) == request.digest({}, {})


def test_what_is_sent_is_what_the_nodes_may_know(tmp_path: Path) -> None:
    """No path of the server is in any message, and the labels are."""
    organisations = Organisations(tmp_path)
    nodes = grid(organisations)
    serve(organisations.experiment("flower", *SHORT), nodes)
    for message in nodes.sent:
        experiment = json.loads(json.loads(str(message.content["lorica"]["invitation"]))["experiment"])
        assert experiment["task"]["labels"] == ["bad", "good"]
        experiment["model"].pop("base")
        assert str(tmp_path) not in json.dumps(experiment)
