"""A node with data of its own gives a hostile server nothing but refusals, and charges all that leaves."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import safetensors.torch
import torch
from dp_accounting import pld
from opacus.accountants import PRVAccountant
from torch import Tensor

from lorica.adapters.base_files import hash_of_base
from lorica.adapters.names import is_factor, site_of
from lorica.config import OptimizerConfig
from lorica.errors import UserError
from lorica.local.step import LocalStep
from lorica.messages import Delivery, Invitation, Projection, Request, Training
from lorica.owner.node import Node, agreed, respond
from lorica.owner.refusals import because_of
from lorica.owner.settings import NodeSettings
from lorica.privacy import accounting
from lorica.privacy.gradients import per_example_gradients
from lorica.privacy.ledger import Ledger, Release
from lorica.tasks.labels import UNKNOWN
from lorica.tensors import decode
from tests.engines.organisations import DELTA, RECORDS, SIGMA, Organisations, invitation
from tests.tasks.test_whole_runs import sentences, write_rows

GENERIC = "an error occurred at the node; see its log"
SECRET = "patient-Zoltan-4711"


class Owner:
    """The first of the organisations, and what leaves its node."""

    def __init__(self, folder: Path, **policy: Any) -> None:
        self.organisations = Organisations(folder, 1, **policy)
        self.place = self.organisations.places[0]
        self.settings = self.organisations.settings(0)
        self.base = hash_of_base(self.organisations.base)
        self.outside = self.files()

    def invitation(self, *overrides: str, run: str = "run", noise: str = "secure", **task: Any) -> str:
        """As a server would send it, with some keys of `task` then changed."""
        config = self.organisations.experiment("hostile", *overrides, noise=noise)
        sent = invitation(config, self.base, run)
        experiment = json.loads(sent.experiment)
        experiment["task"] |= task
        return replace(sent, experiment=json.dumps(experiment)).encode()

    def ask(self, sent: str, request: Request | bytes | None = None) -> dict[str, str | bytes]:
        return respond(self.settings, sent, request.encode() if isinstance(request, Request) else request)

    def labels(self) -> list[str]:
        return [str(json.loads(line)["label"]) for line in (self.place / "data.jsonl").read_text().splitlines()]

    def releases(self) -> list[Release]:
        path = self.place / "data.jsonl.ledger.sqlite"
        return Ledger(path).releases() if path.is_file() else []

    def files(self) -> dict[Path, bytes]:
        """Everything that is not the node's to change."""
        kept = (self.place / "data.jsonl.lorica", self.place / "data.jsonl.ledger.sqlite")
        return {
            path: path.read_bytes()
            for path in self.organisations.folder.rglob("*")
            if path.is_file() and not any(str(path).startswith(str(own)) for own in kept) and "cache" not in path.parts
        }

    def assert_untouched(self) -> None:
        assert self.releases() == []
        assert self.files() == self.outside


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    agreed.cache_clear()
    return strict_owner(tmp_path / "world")


def strict_owner(folder: Path) -> Owner:
    folder.mkdir()
    return Owner(folder, noise=["secure"], max_clip_norm=2.0, max_steps=100, max_epsilon=30.0)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Owner, str]:
    """One owner for all requests that it refuses, since none of them may change anything, and its invitation."""
    owner = strict_owner(tmp_path_factory.mktemp("asked") / "world")
    return owner, owner.invitation()


def node_of(owner: Owner, sent: str) -> Node:
    return agreed(owner.settings, Invitation.decode(sent))


def request(owner: Owner, sent: str, run: str = "run", **changes: Any) -> Request:
    """An honest request to train the factors B."""
    node = node_of(owner, sent)
    tensors = node._model.read()
    trained = tuple(name for name in tensors if name.endswith(".B"))
    work = Training(trained, node.plan.terms, 2, OptimizerConfig(lr=1.0), dict.fromkeys(trained, 1.0))
    return replace(Request(run, 0, 1, 1, tensors, work), **changes)


def test_an_honest_server_is_answered(owner: Owner) -> None:
    sent = owner.invitation()
    assert json.loads(str(owner.ask(sent)["plan"]))["records"] == RECORDS[0]
    answer = owner.ask(sent, request(owner, sent))
    assert json.loads(str(answer["account"]))["steps"] == 2
    assert len(owner.releases()) == 1
    assert owner.files() == owner.outside


def test_no_other_account_can_read_what_a_node_writes(owner: Owner) -> None:
    before = os.umask(0)
    try:
        sent = owner.invitation()
        owner.ask(sent, request(owner, sent))
    finally:
        os.umask(before)
    written = [path for path in owner.place.rglob("*") if path not in owner.outside]
    assert len([path for path in written if path.is_file()]) >= 3
    modes = {path.relative_to(owner.place): stat.S_IMODE(path.stat().st_mode) for path in written}
    assert all(mode == (0o700 if (owner.place / path).is_dir() else 0o600) for path, mode in modes.items()), modes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy=none"], r"policy\.noise: the server proposes noise = none"),
        (["privacy.noise=reproducible"], r"policy\.noise: .* reproducible"),
        (["privacy.noise_multiplier=0.01"], r"policy\.min_noise_multiplier: .* 0\.01; the minimum is 0\.5"),
        (["privacy.clip_norm=1.0e+9"], r"policy\.max_clip_norm: .* 1e\+09; the limit is 2"),
        ([f"federation.batch_size={RECORDS[0]}"], r"policy\.max_sampling_rate: .* 1; the limit is 0\.5"),
        (["federation.rounds=51"], r"policy\.max_steps: .* 102 steps; the limit is 100"),
        (["privacy.noise_multiplier=0.5", "federation.rounds=50"], r"policy\.max_epsilon: .* the limit is 30"),
        (["federation.private_test=0.2"], r"policy\.metrics: .* \['loss', 'accuracy'\]"),
        (["federation.batch_size=25"], r"policy\.max_sampling_rate: .* 1\.04167; the limit is 0\.5"),
    ],
)
def test_a_run_beyond_the_policy_is_refused(owner: Owner, overrides: list[str], message: str) -> None:
    refused = owner.ask(owner.invitation(*overrides))["refused"]
    assert re.search(message, str(refused))
    owner.assert_untouched()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy.epsilon=40"], r"policy\.max_epsilon: the server proposes ε = 40 .*; the limit is 30"),
        (["privacy.epsilon=100", "privacy.delta=1.0e-12"], r"policy\.min_noise_multiplier: .* the minimum is 0\.5"),
        (["privacy.epsilon=3", "privacy.delta=0.49"], r"privacy\.delta = 0\.49: not below 1/24"),
    ],
)
def test_a_proposal_that_is_dear_to_compute_is_refused_without_computing(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    """A calibration takes seconds, and far from what the policy allows it took minutes."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a loss distribution was computed")

    monkeypatch.setattr(accounting, "from_gaussian_mechanism", never)
    refused = owner.ask(owner.invitation(*overrides, "privacy.noise_multiplier=null"))["refused"]
    assert re.search(message, str(refused))
    owner.assert_untouched()


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("privacy", {"epsilon": 300, "noise_multiplier": None}, r"privacy\.epsilon = 300"),
        ("privacy", {"epsilon": 1e-300, "noise_multiplier": None}, r"privacy\.epsilon = 1e-300"),
        ("privacy", {"delta": 0.5}, r"privacy\.delta = 0\.5"),
        ("privacy", {"noise_multiplier": math.inf}, r"privacy\.noise_multiplier = inf: .* finite"),
        ("privacy", {"clip_norm": math.inf}, r"privacy\.clip_norm = inf: .* finite"),
        ("privacy", {"clip_norm": math.nan}, r"privacy\.clip_norm = nan: .* finite"),
        ("federation", {"rounds": 10**9}, r"federation\.rounds = 1000000000"),
        ("federation", {"rounds": 10**4, "local_steps": 10**4}, r"federation = .* 1,000,000 steps"),
        ("federation", {"rounds": 10**6, "clients": 10**5}, r"federation = .* participations"),
    ],
)
def test_numbers_that_make_no_sense_are_no_experiment(
    owner: Owner, section: str, keys: dict[str, Any], message: str
) -> None:
    sent = Invitation.decode(owner.invitation())
    experiment = json.loads(sent.experiment)
    experiment[section] |= keys
    refused = owner.ask(replace(sent, experiment=json.dumps(experiment)).encode())["refused"]
    assert re.search(f"the experiment is not valid: {message}", str(refused))
    owner.assert_untouched()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"type": "text-regression"}, r"policy\.tasks: the server proposes task\.type = 'text-regression'"),
        # Whether there is such a column is not for the server to learn.
        ({"text": ["diagnosis"]}, r"policy\.tasks: the server proposes task\.text = \['diagnosis'\]"),
        ({"label": "text"}, r"policy\.tasks: the server proposes task\.label = 'text'"),
        ({"train": "/etc/passwd"}, r"task\.train = '/etc/passwd': only the owner may name the data"),
        ({"train": "data.jsonl"}, r"task\.train = 'data\.jsonl': only the owner may name the data"),
    ],
)
def test_the_server_names_neither_files_nor_other_columns(owner: Owner, task: dict[str, Any], message: str) -> None:
    assert re.search(message, str(owner.ask(owner.invitation(**task))["refused"]))
    owner.assert_untouched()


def test_a_server_does_not_learn_which_labels_occur(owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    """By asking once with and once without a label, it saw in the refusal whether a record has it."""
    expected = owner.ask(owner.invitation(run="honest"))
    assert "plan" in expected
    for run, labels in {"a": ["bad", "great"], "b": ["great", "good"], "c": ["1", "2", "3"]}.items():
        sent = owner.invitation(run=run, labels=labels)
        with caplog.at_level(logging.WARNING, logger="lorica"):
            assert owner.ask(sent) == expected
        client = node_of(owner, sent)._client
        unknown = np.flatnonzero(client.records.labels == UNKNOWN)
        counted = len(unknown)
        assert 0 < counted == sum(text not in labels for text in owner.labels())
        assert f"{counted} of {RECORDS[0]} records have a label that is not in task.labels" in caplog.text
        # Neither in an update nor in an error.
        model = node_of(owner, sent)._model
        batch = client.records.batch(unknown)
        model.write({name: torch.randn(value.shape) for name, value in model.read().items()})
        losses = partial(model.losses, model.peft_model, batch)
        gradients = per_example_gradients(losses, model.tensors, len(batch))
        assert all(not bool(gradient.any()) for gradient in gradients.values())
        assert "reply" in owner.ask(sent, request(owner, sent, run=run))


def test_labels_are_never_taken_from_the_records(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.tasks.loading.read_training", lambda *_, **__: pytest.fail("the records were read"))
    refused = owner.ask(owner.invitation(labels=None))["refused"]
    assert refused == because_of(UserError("task.labels", None, "", ""))
    owner.assert_untouched()


def test_a_file_beside_the_data_is_not_the_servers_either(owner: Owner) -> None:
    inside = str(owner.place / "data.jsonl")
    assert "only the owner may name the data" in str(owner.ask(owner.invitation(train=inside))["refused"])
    owner.assert_untouched()


def test_another_base_model_is_refused(owner: Owner, tmp_path: Path) -> None:
    sent = Invitation.decode(owner.invitation())
    for claimed in ("sha256:" + "0" * 64, "", "../model"):
        assert "the server's base model is" in str(owner.ask(replace(sent, base=claimed).encode())["refused"])
    without = replace_settings(owner, base=None)
    for base in ("/somewhere/model", "../model", "hub/model"):
        experiment = json.loads(sent.experiment)
        experiment["model"]["base"] = base
        answer = respond(without, replace(sent, experiment=json.dumps(experiment)).encode(), None)
        assert "the owner has not set base=FOLDER for this node" in str(answer["refused"])
    owner.organisations.write_policy(0, base_models=["sha256:" + "1" * 64])
    assert re.search(r"policy\.base_models: the server proposes", str(owner.ask(owner.invitation())["refused"]))
    assert owner.releases() == []


def replace_settings(owner: Owner, **changes: Any) -> NodeSettings:
    return owner.settings.model_copy(update=changes)


def test_paths_of_the_server_are_not_written_to(owner: Owner, tmp_path: Path) -> None:
    sent = owner.invitation(f"output={tmp_path / 'taken'}", f"privacy.ledger={tmp_path / 'mine.sqlite'}")
    raw = Invitation.decode(sent)
    experiment = json.loads(raw.experiment)
    experiment["privacy"]["ledger"] = str(tmp_path / "mine.sqlite")
    experiment["output"] = str(tmp_path / "taken")
    sent = replace(raw, experiment=json.dumps(experiment)).encode()
    assert "reply" in owner.ask(sent, request(owner, sent))
    assert not (tmp_path / "mine.sqlite").exists()
    assert not (tmp_path / "taken").exists()
    assert len(owner.releases()) == 1


@pytest.mark.parametrize("run", ["../../up", "/etc/cron.d/x", "a" * 101, "", "two\nlines", ".", ".."])
def test_a_runs_name_leads_nowhere(owner: Owner, run: str) -> None:
    answer = owner.ask(owner.invitation(run=run))
    assert "refused" in answer or run in (".", "..")
    owner.assert_untouched()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "None",
        "[]",
        "7",
        "\x00\xff",
        "[" * 100_000,
        json.dumps({"run": "r", "experiment": "{}"}),
        json.dumps({"run": "r", "experiment": {}, "base": "b"}),
        json.dumps({"run": 1, "experiment": "{}", "base": "b"}),
        json.dumps({"run": "r", "experiment": "{}", "base": "b", "per_example_loss": True}),
    ],
)
def test_garbage_is_no_invitation(owner: Owner, content: str) -> None:
    assert "no invitation" in str(owner.ask(content)["refused"])
    owner.assert_untouched()


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "not a JSON object"),
        ("{}", "the experiment is not valid: "),
        ('{"loss_per_example": true}', "the experiment is not valid: "),
    ],
)
def test_garbage_is_no_experiment(owner: Owner, experiment: str, message: str) -> None:
    assert message in str(owner.ask(Invitation("run", experiment, owner.base).encode())["refused"])
    owner.assert_untouched()


def test_an_experiment_is_never_read_from_a_file_of_the_node(owner: Owner) -> None:
    """A string would name a YAML file, and an error about it quote its content."""
    private = owner.place / "private.yaml"
    private.write_text(f"{SECRET}: [")
    answer = owner.ask(Invitation("run", json.dumps(str(private)), owner.base).encode())
    assert answer == {"refused": "the experiment is not a JSON object"}


def test_unknown_keys_in_the_experiment_are_refused(owner: Owner) -> None:
    sent = Invitation.decode(owner.invitation())
    for section in ("privacy", "task", "federation"):
        experiment = json.loads(sent.experiment)
        experiment[section]["raw_gradients"] = True
        answer = owner.ask(replace(sent, experiment=json.dumps(experiment)).encode())
        assert f"{section}.raw_gradients = True: unknown key" in str(answer["refused"])
    owner.assert_untouched()


def test_what_is_in_the_data_does_not_leave_in_errors(owner: Owner, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": text, "label": "good"} for text in sentences(24, 0)]
    write_rows(owner.place / "data.jsonl", [*rows, {"text": "fine", "label": SECRET}])
    answer = owner.ask(owner.invitation())
    assert set(answer) == {"plan"}
    assert SECRET not in str(answer) + caplog.text
    (owner.place / "data.jsonl").write_text(f'{{"text": "{SECRET}", "label"\n')
    answer = owner.ask(owner.invitation(run="other"))
    assert set(answer) == {"refused"}
    assert SECRET not in str(answer)
    # Lest the test pass since nothing was read.
    assert any(record.levelno >= logging.ERROR for record in caplog.records)


def work(some: Request, **changes: Any) -> Request:
    return replace(some, work=replace(some.work, **changes))


def terms(some: Request, **changes: Any) -> Request:
    assert isinstance(some.work, Training)
    return work(some, terms=replace(some.work.terms, **changes))


def first(some: Request) -> str:
    assert isinstance(some.work, Training)
    return some.work.trained[0]


def renamed(some: Request, name: str) -> Request:
    return work(some, trained=(name,), rates={name: 1.0})


def tensor(some: Request, value: Tensor) -> Request:
    return replace(some, tensors=dict(some.tensors) | {first(some): value})


def slices(some: Request, ranks: tuple[int, ...], **changes: Any) -> Request:
    return work(some, slices={site_of(name): ranks for name in some.work.trained if is_factor(name)}, **changes)


HOSTILE = {
    "no noise": (lambda r: terms(r, noise_multiplier=0.0), "but the agreed terms are"),
    "no noise, no clipping": (lambda r: terms(r, noise_multiplier=0.0, clip_norm=math.inf), "but the agreed terms are"),
    "huge clip": (lambda r: terms(r, clip_norm=1e9), "but the agreed terms are"),
    "every record": (lambda r: terms(r, sampling_rate=1.0), "but the agreed terms are"),
    "divided by one": (lambda r: terms(r, batch_size=1), "but the agreed terms are"),
    "more steps than planned": (lambda r: work(r, steps=5), "5 steps in total exceed the 4"),
    "no step": (lambda r: work(r, steps=0), "the number of steps is 0"),
    "steps that give budget back": (lambda r: work(r, steps=-2), "the number of steps is -2"),
    "another client": (lambda r: replace(r, client=1), "the request is for client 1"),
    "another run": (lambda r: replace(r, run="other"), "of run 'other'"),
    "a round beyond the last": (lambda r: replace(r, round=3), "round 3 is beyond"),
    "a round before the first": (lambda r: replace(r, round=-1), "round = -1"),
    "counts beyond SQLite": (lambda r: replace(r, exchange=2**70), "exchange = "),
    "a tensor that is not there": (lambda r: renamed(r, "secret.A"), "which is not in this model"),
    "the embedding": (lambda r: renamed(r, "bert.embeddings.word_embeddings.weight"), "which is not in this model"),
    "nothing to train": (lambda r: work(r, trained=(), rates={}), "trains no tensor"),
    "nothing to train in a step": (lambda r: work(r, local=LocalStep(alternate=True)), "trains no tensor"),
    "a tensor twice": (lambda r: work(r, trained=(first(r),) * 2, rates={first(r): 1.0}), "twice"),
    "rates for others": (lambda r: work(r, rates={"x": 1.0}), "learning rates"),
    "rank 0": (lambda r: work(r, rank=0), "rank 0"),
    "rank -1": (lambda r: work(r, rank=-1), "rank -1"),
    "a rank beyond the model's": (lambda r: work(r, rank=3), "rank 3"),
    "the same rank twice": (lambda r: slices(r, (0, 0)), "trains the ranks (0, 0)"),
    "single ranks beyond the model's": (lambda r: slices(r, (0, 2)), "trains the ranks (0, 2)"),
    "no rank of a site": (lambda r: slices(r, ()), "trains the ranks ()"),
    "ranks elsewhere": (lambda r: work(r, slices={"pooler": (0,)}), "are not those of the tensors"),
    "single ranks of what stays": (lambda r: slices(r, (0,), personal=(first(r),)), "keeps factors at the client"),
    "sketches of no column": (lambda r: work(r, sketch_columns=0), "sketches with 0 columns"),
    "sketches of fewer": (lambda r: work(r, sketch_columns=-4), "sketches with -4 columns"),
    "sketches that fill the memory": (lambda r: work(r, sketch_columns=10**9), "sketches with 1000000000 columns"),
    "sketches of what stays": (
        lambda r: work(r, sketch_columns=2, personal=(first(r),)),
        "sketches of tensors that it keeps at the client",
    ),
    "a projection of nothing": (lambda r: replace(r, work=projection(r)), "round 1 has no sketch"),
    "personal tensors not trained": (lambda r: work(r, personal=("x",)), "keeps tensors at the client"),
    "corrections of the wrong shape": (lambda r: work(r, corrections={first(r): torch.ones(1)}), "of shape (1,)"),
    "a tensor of another model": (
        lambda r: replace(r, tensors=dict(r.tensors) | {"x": torch.ones(1)}),
        "not a tensor of",
    ),
    "a tensor that lacks": (lambda r: replace(r, tensors={first(r): r.tensors[first(r)]}), " is missing"),
    "a tensor of the wrong shape": (lambda r: tensor(r, torch.ones(1, 1)), "of shape (1, 1)"),
    "a tensor of the wrong type": (lambda r: tensor(r, r.tensors[first(r)].long()), "torch.int64"),
    "increments that do not fit": (
        lambda r: replace(r, increments={first(r)[:-2]: (torch.ones(1, 2), torch.ones(2, 1))}),
        "it merges (1, 2) x (2, 1)",
    ),
    "increments elsewhere": (
        lambda r: replace(r, increments={"pooler": (torch.ones(16, 1), torch.ones(1, 16))}),
        "it merges into 'pooler'",
    ),
    "a basis that does not fit": (
        lambda r: replace(r, work=Projection({first(r)[:-2]: torch.ones(3, 2)})),
        "its basis for",
    ),
    "a result of another model": (lambda r: replace(r, work=Delivery({"x": torch.ones(1)}, {}, True)), " is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused(asked: tuple[Owner, str], name: str) -> None:
    change, message = HOSTILE[name]
    owner, sent = asked
    answer = owner.ask(sent, change(request(owner, sent)))
    assert message in str(answer["refused"])
    owner.assert_untouched()


def projection(some: Request) -> Projection:
    """Of every site onto the first two coordinates."""
    factors = {name[:-2]: value for name, value in some.tensors.items() if name.endswith(".B")}
    return Projection({site: torch.eye(len(b), 2) for site, b in factors.items()})


def test_a_sketch_is_projected_in_its_own_round_only(owner: Owner) -> None:
    """A sum of the same factors a round later, over other clients, would show a client's by difference."""
    sent = owner.invitation()
    some = request(owner, sent)
    assert "reply" in owner.ask(sent, work(some, sketch_columns=4))
    assert "reply" in owner.ask(sent, replace(some, exchange=2, work=projection(some)))
    later = replace(some, round=2, work=projection(some))
    assert owner.ask(sent, later)["refused"] == "client 0: round 2 has no sketch to project"
    # Nor after a training that is charged in the new round and then fails.
    assert owner.ask(sent, failing(replace(some, round=2))) == {"refused": GENERIC}
    assert "has no sketch" in str(owner.ask(sent, later)["refused"])


def test_what_else_stays_with_a_client_is_not_projected(owner: Owner) -> None:
    """Trained at rate 0, tensors that stay are those that an earlier round has sketched."""
    sent = owner.invitation()
    some = request(owner, sent)
    assert "reply" in owner.ask(sent, work(some, sketch_columns=4))
    trained = tuple(name for name in some.tensors if name.endswith(".B"))
    still = work(replace(some, round=2), personal=trained, rates=dict.fromkeys(trained, 0.0))
    assert "reply" in owner.ask(sent, still)
    later = replace(some, round=2, exchange=2, work=projection(some))
    assert "has no sketch" in str(owner.ask(sent, later)["refused"])


def edited(some: Request, change: Any) -> bytes:
    """The request with its JSON changed on the way."""
    content = some.encode()
    length = int.from_bytes(content[:8], "little")
    plain = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["request"])
    change(plain)
    return bytes(safetensors.torch.save(safetensors.torch.load(content), metadata={"request": json.dumps(plain)}))


EDITS = {
    "per-example losses": lambda p: p["work"].update(kind="per-example-losses"),
    "an unknown key": lambda p: p.update(per_example_loss=True),
    "an unknown key of the work": lambda p: p["work"].update(per_example_loss=True),
    "an unknown key of the terms": lambda p: p["work"]["terms"].update(per_example_loss=True),
    "an unknown key of the local step": lambda p: p["work"]["local"].update(per_example_loss=True),
    "no work": lambda p: p.pop("work"),
    "no terms": lambda p: p["work"].pop("terms"),
    "steps as text": lambda p: p["work"].update(steps="2"),
    "half a step": lambda p: p["work"].update(steps=1.5),
    "an endless round": lambda p: p.update(round=math.inf),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_not_understood_is_refused(asked: tuple[Owner, str], name: str) -> None:
    owner, sent = asked
    answer = owner.ask(sent, edited(request(owner, sent), EDITS[name]))
    assert "not a request of this version of Lorica" in str(answer["refused"])
    owner.assert_untouched()


@pytest.mark.parametrize("content", [b"\x00", b"garbage" * 100, b"\xff" * 64, (2).to_bytes(8, "little") + b"{}"])
def test_garbage_is_no_request(asked: tuple[Owner, str], content: bytes) -> None:
    owner, sent = asked
    assert "not a request of this version of Lorica" in str(owner.ask(sent, content)["refused"])
    nested = b"[" * 100_000
    assert "nested too deeply" in str(owner.ask(sent, len(nested).to_bytes(8, "little") + nested))
    owner.assert_untouched()


def test_tensors_beside_those_of_the_work_are_refused(asked: tuple[Owner, str]) -> None:
    owner, sent = asked
    content = request(owner, sent).encode()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    more = safetensors.torch.load(content) | {"basis:x": torch.ones(1)}
    answer = owner.ask(sent, safetensors.torch.save(more, metadata=metadata))
    assert "it has unknown keys or tensors" in str(answer["refused"])
    owner.assert_untouched()


def test_a_replayed_request_gives_what_was_released_before(owner: Owner) -> None:
    sent = owner.invitation()
    one = request(owner, sent)
    reply = owner.ask(sent, one)["reply"]
    agreed.cache_clear()
    assert owner.ask(sent, one)["reply"] == reply
    assert len(owner.releases()) == 1


def test_an_older_round_is_over(owner: Owner) -> None:
    sent = owner.invitation()
    owner.ask(sent, request(owner, sent, round=2))
    answer = owner.ask(sent, request(owner, sent, round=1))
    assert answer["refused"] == "client 0: round 1 is over, and its releases are not repeated"
    assert len(owner.releases()) == 1


def test_no_more_steps_than_planned_whatever_they_are_called(owner: Owner) -> None:
    sent = owner.invitation()
    answers = [owner.ask(sent, request(owner, sent, exchange=exchange)) for exchange in range(1, 6)]
    assert ["reply" in answer for answer in answers] == [True, True, False, False, False]
    assert "6 steps in total exceed the 4" in str(answers[-1]["refused"])
    assert sum(release.steps for release in owner.releases()) == 4


def test_a_run_is_agreed_on_once(owner: Owner) -> None:
    """The same run with more rounds would have more steps; also when the node has forgotten all but its folder."""
    owner.ask(owner.invitation())
    agreed.cache_clear()
    answer = owner.ask(owner.invitation("federation.rounds=4"))
    assert answer["refused"] == "run run was agreed with another experiment"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, 1e20])
def test_no_adapter_undoes_clipping(tmp_path: Path, value: float) -> None:
    """Seeded noise is the same for any adapter, and adapters of NaN make gradients that count as zero."""
    agreed.cache_clear()
    owner = Owner(tmp_path)
    sent = owner.invitation("privacy.clip_norm=0.1", noise="reproducible")

    def sum_of_gradients(filled: float, exchange: int) -> dict[str, Tensor]:
        some = work(request(owner, sent, round=1, exchange=exchange), steps=1)
        tensors = {name: torch.full_like(old, filled) for name, old in some.tensors.items()}
        reply = decode(bytes(owner.ask(sent, replace(some, tensors=tensors))["reply"]))  # type: ignore[arg-type]
        return {name: update * -8 for name, update in reply.items()}

    noise, hostile = sum_of_gradients(math.nan, 1), sum_of_gradients(value, 1)
    difference = math.sqrt(sum(float((hostile[name] - noise[name]).square().sum()) for name in noise))
    assert difference <= 0.1 * RECORDS[0]
    assert all(bool(torch.isfinite(update).all()) for update in hostile.values())
    # And the node goes on as if nothing had been.
    assert "reply" in owner.ask(sent, work(request(owner, sent, exchange=2), steps=1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
def test_foolish_numbers_after_the_noise_are_the_servers_affair(owner: Owner, value: float) -> None:
    sent = owner.invitation()
    some = request(owner, sent)
    base = frozen(owner, sent)
    assert base
    before = decode(bytes(owner.ask(sent, work(some, rates=dict.fromkeys(some.work.trained, value)))["reply"]))
    assert before.keys() == set(some.work.trained)
    again = work(replace(some, exchange=2), local=LocalStep(perturbation=value))
    assert "reply" in owner.ask(sent, again)
    assert [release.steps for release in owner.releases()] == [2, 2]
    # And the base weights are what they were.
    assert all(torch.equal(weight, base[name]) for name, weight in frozen(owner, sent).items())


def frozen(owner: Owner, sent: str) -> dict[str, Tensor]:
    """A copy of the base model's weights in the node."""
    state = node_of(owner, sent)._model.peft_model.state_dict()
    return {name: value.clone() for name, value in state.items() if ".base_layer." in name}


def failing(some: Request) -> Request:
    """`BᵀB` is singular at `B = 0`: the second half of the step fails, after noise was added."""
    trained = tuple(name for name in some.tensors if name.endswith(".A"))
    zero = {name: torch.zeros_like(value) for name, value in some.tensors.items()}
    return work(
        replace(some, tensors=zero), trained=trained, rates=dict.fromkeys(trained, 1.0), local=LocalStep(damping=0.0)
    )


def test_steps_that_fail_are_charged(owner: Owner) -> None:
    sent = owner.invitation()
    some = failing(request(owner, sent))
    assert owner.ask(sent, some) == {"refused": GENERIC}
    assert [release.steps for release in owner.releases()] == [2]
    # The same attempt again has the same batches and noise: it fails again, and tells nothing new.
    assert owner.ask(sent, some) == {"refused": GENERIC}
    assert [release.steps for release in owner.releases()] == [2]


def test_whether_a_private_test_fails_is_not_told(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner.organisations.write_policy(0, metrics=["loss", "accuracy"])
    sent = owner.invitation("federation.private_test=0.2", "federation.batch_size=4")
    some = request(owner, sent)
    delivery = replace(some, tensors={}, work=Delivery(some.tensors, {}, False))
    passed = owner.ask(sent, delivery)

    def fail(*args: Any) -> None:
        raise OverflowError(SECRET)

    monkeypatch.setattr(node_of(owner, sent)._model.objective.__class__, "evaluate", fail)
    assert owner.ask(sent, delivery) == passed
    assert "reply" in passed
    assert SECRET in caplog.text


def test_a_node_without_data_takes_no_path_from_a_server() -> None:
    with pytest.raises(UserError, match=r"node-config\.data"):
        NodeSettings.of({"client": 0, "base": "/models/encoder"})
    with pytest.raises(UserError, match=r"node-config\.data"):
        NodeSettings.of({"partition-id": 0})


def by_pld(releases: list[Release]) -> float:
    """ε of all rows, by dp-accounting's PLD on another grid."""
    accountant = pld.PLDAccountant(value_discretization_interval=5e-4)
    for (rate, sigma), steps in counted(releases).items():
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(DELTA))


def by_prv(releases: list[Release]) -> float:
    """ε of all rows, by Opacus."""
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps) for (rate, sigma), steps in counted(releases).items()]
    return float(accountant.get_epsilon(DELTA))


def counted(releases: list[Release]) -> Counter[tuple[float, float]]:
    """(sampling rate, noise multiplier) -> steps."""
    counts: Counter[tuple[float, float]] = Counter()
    for release in releases:
        counts[release.sampling_rate, release.noise_multiplier] += release.steps
    return counts


def rows_of(*sigmas: float) -> list[Release]:
    """A release of two steps with each of these noise multipliers."""
    return [Release("", "", "", 0, 1, 8 / RECORDS[0], sigma, 2.0, 2, "secure", "") for sigma in sigmas]


def give_back(owner: Owner, run: str) -> None:
    """As `lorica budget --release` does."""
    Ledger(owner.place / "data.jsonl.ledger.sqlite").end(run)


@pytest.mark.integration
def test_a_run_is_refused_at_its_start_while_another_one_holds_the_budget(owner: Owner) -> None:
    """Otherwise both would be refused half way, and the budget be spent for nothing."""
    owner.organisations.write_policy(0, max_epsilon=by_pld(rows_of(1.0, 1.0, 1.0, 0.8, 0.8)) + 0.05)
    first = owner.invitation("federation.rounds=3", run="one")
    long = owner.invitation("federation.rounds=3", "privacy.noise_multiplier=0.8", run="long")
    short = owner.invitation("federation.rounds=2", "privacy.noise_multiplier=0.8", run="short")
    assert "plan" in owner.ask(first)
    refused = str(owner.ask(long)["refused"])
    assert re.search(r"policy\.max_epsilon: .* the limit is .* part of it is reserved for run one$", refused)
    assert "plan" in owner.ask(short)
    for round_number in range(1, 4):
        assert "reply" in owner.ask(first, request(owner, first, "one", round=round_number))
        if round_number < 3:
            assert "reply" in owner.ask(short, request(owner, short, "short", round=round_number))
    agreed.cache_clear()
    assert "refused" in owner.ask(owner.invitation("federation.rounds=1", run="another"))


def test_a_finished_run_gives_back_what_it_did_not_use(owner: Owner) -> None:
    owner.organisations.write_policy(0, max_epsilon=by_pld(rows_of(1.0, 1.0, 1.0)) + 0.05)
    first, second = (owner.invitation(f"federation.rounds={n}", run=run) for n, run in ((3, "one"), (2, "two")))
    owner.ask(first, request(owner, first, "one"))
    assert "refused" in owner.ask(second)
    model = node_of(owner, first)._model
    owner.ask(first, Request("one", 0, 1, 0, {}, Delivery(model.read(), {}, final=True)))
    assert "plan" in owner.ask(second)


def test_another_experiment_under_the_same_name_does_not_change_what_is_reserved(owner: Owner) -> None:
    sent = owner.invitation("federation.rounds=3")
    assert "plan" in owner.ask(sent)
    assert "another experiment" in str(owner.ask(owner.invitation("federation.rounds=1"))["refused"])
    (held,) = Ledger(owner.place / "data.jsonl.ledger.sqlite").exposures()
    assert held.outstanding == 6


@pytest.mark.integration
def test_two_runs_cannot_spend_more_than_the_policy_together(owner: Owner) -> None:
    """Even if the owner gives back what the first one holds and it goes on."""
    limit = by_pld(rows_of(1.0, 1.0, 0.8, 0.8, 0.8)) + 0.05
    owner.organisations.write_policy(0, max_epsilon=limit)
    runs = {
        "one": owner.invitation("federation.rounds=3", run="one"),
        "two": owner.invitation("federation.rounds=3", "privacy.noise_multiplier=0.8", run="two"),
    }
    for run, sent in runs.items():
        assert "plan" in owner.ask(sent)
        give_back(owner, run)
    answers = []
    for round_number in range(1, 4):
        for run, sent in runs.items():
            answers.append(owner.ask(sent, request(owner, sent, run, round=round_number)))
            give_back(owner, run)
    refused = [str(answer["refused"]) for answer in answers if "refused" in answer]
    assert refused
    assert all(re.search(r"policy\.max_epsilon: .* the limit is", text) for text in refused)
    spent = owner.releases()
    assert {release.run for release in spent} == {"one", "two"}
    # Opacus bounds ε to 0.01.
    assert by_pld(spent) <= limit + 0.02
    assert by_prv(spent) <= limit + 0.02


def test_records_of_another_ledger_count_against_the_policy(owner: Owner) -> None:
    """A copy of the data at another place has no budget of its own."""
    limit = by_pld(rows_of(1.0, 1.0, 1.0)) + 0.05
    owner.organisations.write_policy(0, max_epsilon=limit)
    sent = owner.invitation("federation.rounds=2")
    for round_number in (1, 2):
        assert "reply" in owner.ask(sent, request(owner, sent, round=round_number))
    copy = owner.place / "copy.jsonl"
    copy.write_text("\n".join(reversed((owner.place / "data.jsonl").read_text().splitlines())))
    elsewhere = replace_settings(owner, data=str(copy))
    refused = respond(elsewhere, owner.invitation("federation.rounds=2", run="again"), None)
    assert "policy.max_epsilon" in str(refused["refused"])
    assert "plan" in respond(elsewhere, owner.invitation("federation.rounds=1", run="again"), None)


def test_messages_at_the_same_time_do_not_both_take_what_is_left(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that look into the ledger together would each see room for themselves."""
    import lorica.owner.client

    take = lorica.owner.client.noisy_gradient

    def slowly(*args: Any) -> Any:
        time.sleep(0.3)
        return take(*args)

    monkeypatch.setattr(lorica.owner.client, "noisy_gradient", slowly)
    owner.organisations.write_policy(0, max_epsilon=1.1 * by_pld(rows_of(SIGMA)))
    sent, requests = {}, {}
    for run in ("one", "two"):
        sent[run] = owner.invitation("federation.rounds=1", run=run)
        requests[run] = request(owner, sent[run], run)
        give_back(owner, run)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda run: owner.ask(sent[run], requests[run]), sent))
    assert sorted("reply" in answer for answer in answers) == [False, True]
    assert len(owner.releases()) == 1


def test_a_base_model_is_not_checked_on_private_records(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a check passes is told to the server: on the records, it could be made to say something of them."""
    import lorica.owner.node

    checked = []
    check = lorica.owner.node.check_isolated
    monkeypatch.setattr(lorica.owner.node, "check_isolated", lambda *a: (checked.append(a[2]), check(*a))[1])
    node = node_of(owner, owner.invitation())
    (records,) = checked
    private = {bytes(one) for one in node._client.records.digests}
    assert len(records) >= 2
    assert not private & {bytes(one) for one in records.digests}
