"""An owner's side: refusal, stored replies, charging before sending."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.config import OptimizerConfig, PrivacyConfig
from lorica.errors import UserError
from lorica.messages import Request, Training
from lorica.owner.client import Client
from lorica.privacy.ledger import Ledger
from lorica.privacy.mechanism import Terms, noisy_gradient
from lorica.privacy.plan import Refused, plan_client
from lorica.tensors import decode
from lorica.testing.records import TinyRecords
from tests.models import adapted


def owner(folder: Path, noise: str = "secure", steps: int = 6) -> tuple[Client, Any, Request]:
    model = adapted("bert", randomise=False)
    plan = plan_client(0, 30, 10, steps, PrivacyConfig(epsilon=3.0, delta=1e-3, clip_norm=1.0, noise=noise))
    client = Client(0, TinyRecords.texts(30), plan, Ledger(folder / "l.sqlite"), "data", 0, 64)
    trained = tuple(name for name in model.tensors if name.endswith(".B"))
    request = Request(
        run="run",
        client=0,
        round=1,
        exchange=1,
        tensors=model.read(),
        work=Training(trained, plan.terms, 2, OptimizerConfig(), dict.fromkeys(trained, 0.5)),
    )
    return client, model, request


def test_a_repeated_request_costs_nothing_and_gives_the_same_release(tmp_path: Path) -> None:
    client, model, request = owner(tmp_path)
    first = client.reply_to(model, request)
    assert client.reply_to(model, request) == first
    assert client.ledger.steps("run", 0) == 2
    # Also to another process, and when the server sends all tensors again instead of the changed ones.
    again, model, _ = owner(tmp_path)
    assert again.reply_to(model, request) == first
    assert again.ledger.steps("run", 0) == 2


class Killed(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, Killed, RuntimeError])
@pytest.mark.parametrize("step", [1, 2])
def test_whatever_ends_an_attempt_it_is_charged_and_repeated_as_the_same_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException], step: int
) -> None:
    """A second attempt with another batch would be a second release."""
    client, model, request = owner(tmp_path)
    drawn: list[dict[str, torch.Tensor]] = []

    def watched(*args: Any) -> Any:
        found = noisy_gradient(*args)
        drawn.append({name: released.tensor for name, released in found.items()})
        if len(drawn) == step:
            raise end
        return found

    monkeypatch.setattr("lorica.owner.client.noisy_gradient", watched)
    with pytest.raises(end):
        client.reply_to(model, request)
    assert [release.steps for release in client.ledger.releases()] == [2]
    again, model, _ = owner(tmp_path)
    reply = again.reply_to(model, request)
    assert again.ledger.steps("run", 0) == 2
    assert again.reply_to(model, request) == reply
    attempts = drawn[:step], drawn[step:]
    for one, other in zip(*attempts, strict=False):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    # The next request has a seed of its own.
    again.reply_to(model, replace(request, round=2))
    assert again.ledger.steps("run", 0) == 4


def test_a_failure_that_records_cause_is_charged_and_fails_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh batches would tell the server with each attempt whether the record was in one."""
    client, model, request = owner(tmp_path)
    attempts: list[list[list[int]]] = []
    cut = TinyRecords.micro_batch_indices

    def failing(records: TinyRecords, indices: Any, *limits: int) -> Any:
        attempts[-1].append(indices.tolist())
        if len(attempts[-1]) == 2:
            raise ValueError("the model does not take this record")
        return cut(records, indices, *limits)

    monkeypatch.setattr(TinyRecords, "micro_batch_indices", failing)
    for _ in range(3):
        attempts.append([])
        with pytest.raises(ValueError, match="does not take"):
            client.reply_to(model, request)
        assert [release.steps for release in client.ledger.releases()] == [2]
    assert attempts[0] == attempts[1] == attempts[2]


KILLED = """
import os, signal, sys
from pathlib import Path
import lorica.owner.client
from tests.owner.test_client import owner
step, calls = lorica.owner.client.noisy_gradient, []
def dying(*arguments):
    found = step(*arguments)
    calls.append(found)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
lorica.owner.client.noisy_gradient = dying
client, model, request = owner(Path(sys.argv[1]))
client.reply_to(model, request)
"""


@pytest.mark.integration
def test_kill_9_in_training_leaves_a_charged_row(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    for _ in range(2):
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert [release.steps for release in Ledger(tmp_path / "l.sqlite").releases()] == [2]
    client, model, request = owner(tmp_path)
    reply = client.reply_to(model, request)
    assert client.reply_to(model, request) == reply
    assert client.ledger.steps("run", 0) == 2


def test_any_other_request_is_a_new_release(tmp_path: Path) -> None:
    client, model, request = owner(tmp_path)
    first = client.reply_to(model, request)
    moved = {name: value + 1 for name, value in request.tensors.items() if name == request.work.trained[0]}
    second = client.reply_to(model, replace(request, tensors=moved, sequence=1))
    assert second != first
    assert client.ledger.steps("run", 0) == 4


def test_secure_noise_is_fresh_for_every_release(tmp_path: Path) -> None:
    replies = []
    for index in range(2):
        client, model, request = owner(tmp_path / str(index))
        replies.append(decode(client.reply_to(model, request)))
    assert all(not torch.equal(replies[0][name], replies[1][name]) for name in replies[0])


def test_reproducible_noise_is_the_same_in_every_process(tmp_path: Path) -> None:
    replies = []
    for index in range(2):
        client, model, request = owner(tmp_path / str(index), "reproducible")
        replies.append(client.reply_to(model, request))
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.0, "clip_norm": math.inf},
        {"noise_multiplier": 0.0},
        {"clip_norm": 1e9},
        {"sampling_rate": 1.0},
    ],
)
def test_a_hostile_server_gets_an_error_and_no_gradient(tmp_path: Path, change: dict[str, float]) -> None:
    client, model, request = owner(tmp_path)
    with pytest.raises(Refused):
        client.reply_to(
            model, replace(request, work=replace(request.work, terms=replace(request.work.terms, **change)))
        )
    assert client.ledger.releases("data") == []


def test_more_rounds_than_planned_are_refused(tmp_path: Path) -> None:
    client, model, request = owner(tmp_path, steps=4)
    client.reply_to(model, request)
    client.reply_to(model, replace(request, round=2))
    with pytest.raises(Refused, match="6 steps"):
        client.reply_to(model, replace(request, round=3))
    assert client.ledger.steps("run", 0) == 4


def test_nothing_leaves_if_the_ledger_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, model, request = owner(tmp_path)

    def full(*_: object) -> None:
        raise UserError("privacy.ledger", "l.sqlite", "the disk is full", "free it")

    monkeypatch.setattr(client.ledger, "charge", full)
    with pytest.raises(UserError, match="full"):
        client.reply_to(model, request)
    assert client.ledger.releases() == []


def test_a_reply_that_cannot_be_stored_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, model, request = owner(tmp_path)

    def full(*_: object) -> None:
        raise UserError("privacy.ledger", "l.sqlite", "the disk is full", "free it")

    with monkeypatch.context() as patched:
        patched.setattr(client.ledger, "attach", full)
        with pytest.raises(UserError, match="full"):
            client.reply_to(model, request)
    assert client.ledger.steps("run", 0) == 2
    client.reply_to(model, request)
    assert client.ledger.steps("run", 0) == 2


def test_an_unfrozen_parameter_stops_the_step(tmp_path: Path) -> None:
    """PEFT's `set_adapter` un-freezes every factor; training on would hand batch gradients to autograd."""
    client, model, request = owner(tmp_path)
    model.peft_model.set_adapter("default")
    with pytest.raises(RuntimeError, match="must stay frozen"):
        client.reply_to(model, request)
    assert client.ledger.releases("data") == []


def test_training_moves_only_what_was_asked_for(tmp_path: Path) -> None:
    client, model, request = owner(tmp_path)
    before = model.read()
    reply = decode(client.reply_to(model, request))
    assert set(reply) == set(request.work.trained)
    for name, value in model.read().items():
        if name in reply:
            torch.testing.assert_close(value, before[name] + reply[name])
        else:
            assert torch.equal(value, before[name])


def test_terms_without_noise_have_no_noise_std() -> None:
    assert Terms(0.1, 10, math.inf, 0.0).noise_std == 0.0
