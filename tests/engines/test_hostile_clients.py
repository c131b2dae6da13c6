"""What one client says about itself, or sends, costs that client its place and does nothing else to a run."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message  # noqa: F401
from flwr.common.serde import message_from_proto, message_to_proto
from torch import Tensor

from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from lorica.config import ExperimentConfig, OptimizerConfig, load
from lorica.engines.flower.engine import FlowerEngine
from lorica.engines.flower.server import serve
from lorica.errors import UserError
from lorica.messages import (
    Projection,
    Request,
    Training,
    decode_account,
    decode_plan,
    encode_account,
    encode_plan,
)
from lorica.owner.node import agreed
from lorica.privacy.plan import ClientPlan, plan_run
from lorica.privacy.statement import Account, privacy_statement
from lorica.server.federation import client_weights
from lorica.server.reply_bounds import update_bounds
from lorica.server.reply_checks import check_reply, expected_reply
from lorica.tensors import decode, encode
from tests.engines.in_process import InProcessGrid
from tests.engines.organisations import Organisations
from tests.reports import draw_nothing
from tests.test_tensors import BAD, mutated
from tests.tiers import integration

RECORDS = 24
SHAPES = {"s.A": (2, 8), "s.B": (6, 2), "head.weight": (3, 6)}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed.cache_clear()
    draw_nothing(monkeypatch)
    monkeypatch.setattr("lorica.engines.flower.engine.POLL_SECONDS", 0.001)


def experiment(*overrides: str) -> ExperimentConfig:
    """Three clients, three rounds of two steps, at a fixed noise multiplier."""
    content = {
        "name": "hostile",
        "engine": "flower",
        "model": {"base": "lorica:glyph-vit"},
        "task": {"type": "image-classification", "train": "owner", "test": "lorica:digits/test"},
        "federation": {"clients": 3, "rounds": 3, "local_steps": 2, "batch_size": 8, "min_clients": 1},
        "privacy": {"epsilon": None, "noise_multiplier": 1.0, "delta": 1e-3},
        "flower": {"wait": 0.001, "timeout": 5},
    }
    return load(content, list(overrides))


class Puppets(InProcessGrid):
    """Three nodes that say whatever the test wants; node `k + 1` is client `k`."""

    def __init__(self, say: Callable[[Message, int], dict[str, Any]]) -> None:
        super().__init__([{}, {}, {}])
        self.say = say

    def answer(self, message: Message) -> Message:
        record = ConfigRecord(self.say(message, message.metadata.dst_node_id - 1))
        return message_from_proto(message_to_proto(Message(RecordDict({"lorica": record}), reply_to=message)))


def adapter() -> AdapterState:
    draws = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}
    return AdapterState([Site("s", "s", 8, 6, 2, 1.0)], tensors)


def engine(config: ExperimentConfig, plan: Any = None, **answers: Any) -> FlowerEngine:
    """Clients 0 and 2 are honest; client 1 answers an invitation with `plan`, a request with `answers`."""

    def answer(message: Message, client: int) -> dict[str, Any]:
        honest = plan_run(config, client, RECORDS)
        if message.metadata.message_type == "query":
            return {"plan": encode_plan(honest) if client != 1 or plan is None else plan}
        reply = {"reply": encode(honest_reply()), "account": encode_account(Account(2, 1))}
        return reply | (answers if client == 1 else {})

    return FlowerEngine(Puppets(answer), config, "base", adapter())


def honest_reply() -> dict[str, Tensor]:
    return {name: torch.full(shape, 0.01) for name, shape in SHAPES.items()}


def requests(config: ExperimentConfig, clients: Iterable[int] = (0, 1, 2)) -> dict[int, Request]:
    terms = plan_run(config, 0, RECORDS).terms
    work = Training(tuple(SHAPES), terms, 2, OptimizerConfig(lr=0.1), dict.fromkeys(SHAPES, 0.1))
    return {client: Request("run", client, 1, 1, adapter().tensors, work) for client in clients}


def changed(plan: ClientPlan, **changes: Any) -> str:
    """As JSON, with fields of the plan or its terms replaced by anything."""
    content = json.loads(encode_plan(plan))
    for key, value in changes.items():
        (content["terms"] if key in content["terms"] else content)[key] = value
    return json.dumps(content)


LIES: dict[str, dict[str, Any]] = {
    "no noise": {"noise_multiplier": 0.0},
    "noise that bounds nothing": {"noise_multiplier": 1e9},
    "noise that weighs all": {"noise_multiplier": 1e-6},
    "noise next to none": {"noise_multiplier": 1e-300},
    "negative noise": {"noise_multiplier": -1.0},
    "noise of NaN": {"noise_multiplier": math.nan},
    "infinite noise": {"noise_multiplier": math.inf},
    "noise as text": {"noise_multiplier": "1.0"},
    "slightly less noise": {"noise_multiplier": 0.999999},
    "records that weigh all": {"records": 10**15},
    "records that weigh all, consistently": {"records": 10**15, "sampling_rate": 8 / 10**15},
    "many records": {"records": 9000, "sampling_rate": 8 / 9000},
    "no records": {"records": 0},
    "negative records": {"records": -24},
    "half a record": {"records": 24.5},
    "records as a float": {"records": 24.0},
    "records as truth": {"records": True},
    "records of NaN": {"records": math.nan},
    "fewer records than a batch": {"records": 7, "sampling_rate": 8 / 7},
    "a rate of 8": {"sampling_rate": 8.0},
    "a rate of 0": {"sampling_rate": 0.0},
    "another batch size": {"batch_size": 1},
    "no clipping": {"clip_norm": math.inf},
    "another clip norm": {"clip_norm": 1e-300},
    "endless steps": {"max_steps": 10**18},
    "steps beyond any": {"max_steps": 10**4000},
    "negative steps": {"max_steps": -1},
    "no steps": {"max_steps": 0},
    "no delta": {"delta": None},
    "delta 0": {"delta": 0.0},
    "delta of NaN": {"delta": math.nan},
    "delta 1": {"delta": 1.0},
    "other noise": {"noise": "none"},
    "unknown noise": {"noise": "loud"},
    "another client": {"client": 0},
    "a client beyond the last": {"client": 3},
    "a client before the first": {"client": -1},
    "a client of floats": {"client": 1.0},
}


@pytest.mark.parametrize("limits", [[], ["federation.weights=noise", "federation.max_records=100"]])
@pytest.mark.parametrize("name", LIES)
def test_a_plan_is_what_the_server_computes_itself(name: str, limits: list[str]) -> None:
    config = experiment(*limits)
    started = time.perf_counter()
    some = engine(config, changed(plan_run(config, 1, RECORDS), **LIES[name]))
    assert some.join("run").keys() == {0, 2}
    assert time.perf_counter() - started < 3


def test_a_calibrated_plan_is_computed_again_too() -> None:
    config = experiment("privacy={epsilon: 3.0, delta: 1.0e-3}")
    honest = plan_run(config, 1, RECORDS)
    assert engine(config, encode_plan(honest)).join("run")[1] == honest
    sigma = honest.terms.noise_multiplier
    for factor, joins in ((1 + 1e-12, True), (1 + 1e-6, False), (0.5, False)):
        some = engine(config, changed(honest, noise_multiplier=factor * sigma))
        assert (1 in some.join("run")) == joins


GARBAGE = ["", "null", "[]", "7", "[" * 5000, "{}", '{"client": 1}', "\x00", "x" * 10**6, 7, 10**15, 1.5, b"plan", [1]]


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content)[:20])
def test_garbage_is_neither_plan_nor_account(content: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = experiment()
    assert engine(config, content).join("run").keys() == {0, 2}
    some = engine(config, account=content)
    some.join("run")
    assert some.exchange(requests(config)).keys() == {0, 2}
    assert "client 1 sent an unreadable answer" in caplog.text
    assert all(len(message) < 3000 and message.isprintable() for message in caplog.messages)


def test_a_refusal_is_somebody_elses_words(caplog: pytest.LogCaptureFixture) -> None:
    config = experiment()
    some = engine(config, refused="no\nround 3 is fine\x1b[2J" + "x" * 10**5)
    some.join("run")
    assert some.exchange(requests(config)).keys() == {0, 2}
    (message,) = [message for message in caplog.messages if "refused" in message]
    assert message.isprintable()
    assert len(message) < 2000


def test_without_privacy_plans_travel_too() -> None:
    config = experiment("privacy=none")
    honest = plan_run(config, 1, RECORDS)
    assert decode_plan(encode_plan(honest)) == honest
    assert engine(config).join("run").keys() == {0, 1, 2}
    assert engine(config, changed(honest, noise_multiplier=1.0)).join("run").keys() == {0, 2}


@pytest.mark.parametrize(
    ("limit", "joins"), [("24", True), ("23", False), ("[99, 24, 99]", True), ("[99, 8, 99]", False)]
)
def test_more_records_than_registered_are_not_taken_in(limit: str, joins: bool, caplog: Any) -> None:
    config = experiment("federation.weights=records")
    plan = encode_plan(plan_run(config, 1, RECORDS))
    config = experiment("federation.weights=records", f"federation.max_records={limit}")
    with caplog.at_level(logging.WARNING):
        nodes = Puppets(lambda message, client: {"plan": plan if client == 1 else "{}"})
        some = FlowerEngine(nodes, config, "base", adapter())
        if joins:
            assert some.join("run").keys() == {1}
        else:
            with pytest.raises(UserError, match=r"federation\.min_clients"):
                some.join("run")
    assert ("client 1 declares 24 records, but the limit is" in caplog.text) != joins


@pytest.mark.parametrize("weights", ["records", "noise"])
def test_no_weight_is_above_that_of_the_largest_count(weights: str) -> None:
    """Whatever a client declares: what joins has at most the weight of `max_records`."""
    config = experiment(f"federation.weights={weights}", "federation.max_records=100")
    most = client_weights(weights, [plan_run(config, client, 100 if client == 1 else 24) for client in range(3)])[1]
    for records in (24, 60, 100, 101, 500, 999, 10**6):
        free = experiment(f"federation.weights={weights}")
        if records < 1000:
            claimed = encode_plan(plan_run(free, 1, records))
        else:
            claimed = changed(plan_run(free, 1, 24), records=records, sampling_rate=8 / records)
        joined = engine(config, claimed).join("run")
        assert (1 in joined) == (records <= 100)
        assert client_weights(weights, list(joined.values())).get(1, 0.0) <= most + 1e-12


def test_weights_by_declared_numbers_need_a_limit(tmp_path: Path) -> None:
    organisations = Organisations(tmp_path)
    nodes = InProcessGrid([organisations.node_config(client) for client in range(2)])
    with pytest.raises(UserError, match=r"federation\.max_records = None: with federation\.weights = noise"):
        serve(organisations.experiment("flower", "federation.weights=noise"), nodes)
    assert nodes.sent == []


@pytest.mark.parametrize(
    ("value", "message"),
    [("[1, 2]", "2 numbers for 3 clients"), ("0", "at least one record"), ("[5, 5, -1]", "at least one record")],
)
def test_limits_that_make_no_sense_are_named(value: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"federation\.max_records .*{message}"):
        experiment(f"federation.max_records={value}")


@pytest.mark.parametrize("name", BAD)
def test_a_reply_that_is_none_removes_its_client(name: str) -> None:
    config, content = experiment(), BAD[name]
    # What a Flower message cannot hold never arrives.
    if content is None or isinstance(content, bytearray):
        return
    some = engine(config, reply=content)
    some.join("run")
    assert some.exchange(requests(config)).keys() == {0, 2}


@pytest.mark.integration
def test_a_reply_of_ninety_megabytes_is_not_read() -> None:
    config = experiment()
    header = b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"
    some = engine(config, reply=len(header).to_bytes(8, "little") + header)
    some.join("run")
    contents = {client: {"request": request.encode()} for client, request in requests(config).items()}
    arrived = some._replies("run", contents, requests(config))
    some._replies = lambda *a: arrived  # type: ignore[method-assign]
    started = time.perf_counter()
    assert some.exchange(requests(config)).keys() == {0, 2}
    assert time.perf_counter() - started < 0.2


ACCOUNTS: dict[str, Any] = {
    "endless steps": {"steps": 10**18, "releases": 1},
    "more steps than planned": {"steps": 7, "releases": 1},
    "fewer steps than it replied to": {"steps": 1, "releases": 1},
    "negative steps": {"steps": -1, "releases": 1},
    "half a step": {"steps": 1.5, "releases": 1},
    "steps as truth": {"steps": True, "releases": 1},
    "steps of NaN": {"steps": math.nan, "releases": 1},
    "endless releases": {"steps": 2, "releases": 10**9},
    "more releases than a plan has": {"steps": 2, "releases": 13},
    "no releases": {"steps": 2, "releases": 0},
    "releases beyond any": {"steps": 2, "releases": 10**400},
    "a lifetime of NaN": {"steps": 2, "releases": 1, "lifetime_epsilon": math.nan},
    "an endless lifetime": {"steps": 2, "releases": 1, "lifetime_epsilon": math.inf},
    "a lifetime": {"steps": 2, "releases": 1, "lifetime_epsilon": 0.1},
    "unprotected releases": {"steps": 2, "releases": 1, "unprotected": 10**18},
    "a ledger": {"steps": 2, "releases": 1, "ledger": "<script>"},
}


@pytest.mark.parametrize("name", ACCOUNTS)
def test_an_account_that_cannot_be_is_not_believed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Either the answer is no answer, or the most that the run asks for stands in its place."""
    config = experiment()
    some = engine(config, account=json.dumps(ACCOUNTS[name]))
    plans = some.join("run")
    replies = some.exchange(requests(config))
    accounts = some.accounts("run")
    assert accounts[1] in (Account(0, 0), Account(plans[1].max_steps, 1))
    assert (1 in replies) == (accounts[1].steps > 0)
    assert "client 1" in caplog.text
    started = time.perf_counter()
    statement = privacy_statement(plans, accounts, None)
    some.spent()
    assert time.perf_counter() - started < 3
    json.loads(json.dumps(statement, allow_nan=False))
    assert [row["steps"] for row in statement["clients"]][::2] == [2, 2]


def test_honest_accounts_are_taken_over() -> None:
    config = experiment()
    some = engine(config, account=encode_account(Account(4, 3)))
    some.join("run")
    some.exchange(requests(config))
    # It may have been charged before this server was started; then it replies to a projection too.
    assert some.accounts("run")[1] == Account(4, 3)
    project = {1: replace(requests(config)[1], exchange=2, work=Projection({"s": torch.ones(6, 2)}))}
    some._grid.say = lambda *a: {"reply": encode({}), "account": encode_account(Account(4, 4))}  # type: ignore[attr-defined]
    some.exchange(project)
    assert some.accounts("run")[1] == Account(4, 4)


def test_answers_that_are_errors_or_nothing(caplog: pytest.LogCaptureFixture) -> None:
    config = experiment()
    some = engine(config)
    some.join("run")
    answer = some._grid.answer  # type: ignore[attr-defined]

    def failing(message: Message) -> Message:
        broken = [
            answer(message),
            Message(Error(2, "x\n" * 10**5), reply_to=message),
            Message(RecordDict(), reply_to=message),
        ]
        return broken[message.metadata.dst_node_id - 1]

    some._grid.answer = failing  # type: ignore[attr-defined]
    assert some.exchange(requests(config)).keys() == {0}
    assert "answered without a record 'lorica'" in caplog.text
    assert all(len(message) < 2000 and "\n" not in message for message in caplog.messages)


class LyingNode(InProcessGrid):
    """The second organisation's node, with its answers changed."""

    def __init__(self, configs: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__(configs)
        self.change = change

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if message.metadata.dst_node_id != 2 or not reply.has_content():
            return reply
        record = ConfigRecord(self.change(dict(reply.content["lorica"])))
        return message_from_proto(message_to_proto(Message(RecordDict({"lorica": record}), reply_to=message)))


def lying(tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], *overrides: str) -> Any:
    organisations = Organisations(tmp_path)
    config = organisations.experiment("flower", "federation.min_clients=1", "flower.wait=0.001", *overrides)
    nodes = LyingNode([organisations.node_config(client) for client in range(2)], change)
    return serve(config, nodes)


@pytest.mark.parametrize("sigma", [1e-6, *integration(0.0, 1e9)])
def test_lies_about_noise_open_no_way_into_the_mean(tmp_path: Path, sigma: float) -> None:
    """With σ = 0 or 1e9 the bounds would be off, and with 1e-6 the weights: an update of norm 8e6 would pass."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        if "plan" in answer:
            plan = json.loads(answer["plan"])
            plan["terms"]["noise_multiplier"] = sigma
            return answer | {"plan": json.dumps(plan)}
        large = {name: torch.full_like(value, 1e6) for name, value in decode(answer["reply"]).items()}
        return answer | {"reply": encode(large)}

    result = lying(tmp_path, change, "federation.weights=noise", "federation.max_records=50")
    assert [row["participants"] for row in result.metrics[1:]] == [[0], [0]]
    assert [row["client"] for row in result.privacy["clients"]] == [0]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"reply": 10**12}, id="an integer", marks=pytest.mark.integration),
        pytest.param({"reply": BAD["F8_E8M0"]}, id="F8_E8M0", marks=pytest.mark.integration),
        pytest.param({"account": json.dumps({"steps": 10**18, "releases": -1})}, id="account"),
        pytest.param({"account": json.dumps({"steps": 3, "releases": 3})}, id="possible account"),
    ],
)
def test_a_run_ends_whatever_one_client_answers(tmp_path: Path, change: dict[str, Any]) -> None:
    result = lying(tmp_path, lambda answer: answer if "plan" in answer else answer | change)
    assert [0 in row["participants"] for row in result.metrics[1:]] == [True, True]
    rows = result.privacy["clients"]
    assert rows[0]["steps"] == 4
    assert all(0 <= row["steps"] <= row["planned_steps"] and math.isfinite(row["epsilon"]) for row in rows)


def test_an_error_in_the_check_of_a_reply_is_its_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of the server's own still stops the run."""
    import lorica.server.federation

    check = lorica.server.federation.check_reply

    def failing(reply: Any, expected: Any) -> Any:
        if any(float(value.flatten()[0]) == 77.0 for value in reply.values()):
            raise ArithmeticError
        return check(reply, expected)

    monkeypatch.setattr(lorica.server.federation, "check_reply", failing)

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        if "plan" in answer or not decode(answer["reply"]):
            return answer
        return answer | {"reply": encode({n: torch.full_like(v, 77.0) for n, v in decode(answer["reply"]).items()})}

    assert [row["missing"] for row in lying(tmp_path / "one", change).metrics[1:]] == [[1], [1]]

    def broken(*args: Any) -> Any:
        raise ArithmeticError("of the server")

    monkeypatch.setattr(lorica.server.federation, "expected_reply", broken)
    with pytest.raises(ArithmeticError, match="of the server"):
        lying(tmp_path / "two", change)


def test_mutated_replies_are_refused_or_within_bounds() -> None:
    """What the checks let through is finite and no larger than the steps allow."""
    config, draws, accepted = experiment(), np.random.default_rng(1), 0
    request, state = requests(config)[1], adapter()
    expected = expected_reply(request, RECORDS, state.tensors, 0, None)
    bounds = update_bounds(request.work, RECORDS, state.tensors)  # type: ignore[arg-type]
    content = encode(honest_reply())
    for _ in range(500):
        try:
            reply = decode(mutated(content, draws), SHAPES)
        except ValueError:
            continue
        if check_reply(reply, expected) is None:
            accepted += 1
            assert {name: tuple(value.shape) for name, value in reply.items()} == SHAPES
            assert all(float(reply[name].double().norm()) <= bounds.norms[name] for name in SHAPES)
    assert accepted


def test_mutated_requests_are_refused_or_understood() -> None:
    draws, read = np.random.default_rng(2), 0
    content = requests(experiment())[1].encode()
    for _ in range(500):
        try:
            request = Request.decode(mutated(content, draws))
        except ValueError:
            continue
        read += 1
        assert isinstance(request, Request)
    assert read


def test_mutated_plans_and_accounts_are_refused_or_the_same() -> None:
    config, draws = experiment("flower.wait=0.001"), np.random.default_rng(3)
    honest = plan_run(config, 1, RECORDS)
    plan, account = encode_plan(honest).encode(), encode_account(Account(2, 1)).encode()
    for _ in range(250):
        joined = engine(config, mutated(plan, draws).decode("latin-1")).join("run")
        assert joined.keys() >= {0, 2} or 1 in joined
        assert all(found == plan_run(config, client, found.records) for client, found in joined.items())
        try:
            found = decode_account(mutated(account, draws).decode("latin-1"))
        except ValueError:
            continue
        assert type(found.steps) is type(found.releases) is int
        assert 0 <= found.steps < 2**31
