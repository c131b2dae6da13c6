"""The server trusts no reply: honest ones pass with every method and piece, others are refused, named and logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.config import OptimizerConfig
from lorica.errors import UserError
from lorica.messages import Request
from lorica.server.federation import Federation, Traffic
from tests.methods.test_every_method import METHODS, Wrapped, federation, run
from tests.methods.test_missing_replies import without
from tests.methods.test_pieces import ACCEPTED, OFTEN, PIECE, rarely

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Tampering(Wrapped):
    """An engine that changes client 1's reply in one exchange of one round."""

    def __init__(self, engine: Any, change: Change, round_number: int = 1, exchange: int = 1) -> None:
        super().__init__(engine)
        self.change, self.when = change, (round_number, exchange)

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        replies = self.engine.exchange(requests)
        if 1 in requests and (requests[1].round, requests[1].exchange) == self.when:
            replies[1] = self.change(dict(replies[1]))
        return replies


def tampered(some: Federation, change: Change, round_number: int = 1, exchange: int = 1) -> Federation:
    some.engine, some.min_clients = Tampering(some.engine, change, round_number, exchange), 2
    return some


def times(factor: float) -> Change:
    return lambda reply: {name: factor * value for name, value in reply.items()}


def first(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda reply: {name: change(value) if i == 0 else value for i, (name, value) in enumerate(reply.items())}


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


MALFORMED: dict[str, tuple[Change, str]] = {
    "nan": (first(with_one(float("nan"))), "is not finite"),
    "inf": (first(with_one(float("-inf"))), "is not finite"),
    "missing": (lambda reply: dict(list(reply.items())[1:]), "missing "),
    "empty": (lambda reply: {}, "missing "),
    "extra": (
        lambda reply: reply | {"loss\nround 9 was fine": torch.ones(1)},
        r"unexpected 'loss\nround 9 was fine'",
    ),
    "shape": (first(lambda value: value.flatten()[:-1]), "has shape"),
    "transposed": (first(lambda value: value[None]), "has shape"),
    "float64": (first(lambda value: value.double()), "is torch.float64, not torch.float32"),
    "int64": (first(lambda value: value.long()), "is torch.int64, not torch.float32"),
}


@pytest.mark.parametrize("name", ["as-lora", "fed-avg", "fedask", "fedsa-lora"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_reply_is_refused_and_named(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = MALFORMED[kind]
    for privacy in ({}, {"privacy": "none"}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lorica.server.federation"):
            some = tampered(federation(name, tmp_path / str(len(privacy)), **privacy), change)
            traffic = some.round()
        assert (traffic.participants, traffic.missing) == ([0, 2], [1])
        (message,) = caplog.messages
        assert message.startswith("round 1 continues without client 1: its reply was refused: ")
        assert reason in message
        assert "\n" not in message
        assert all(torch.isfinite(value).all() for value in some.server.model.tensors.values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("round_number", [1, 2])
def test_a_reply_ten_times_too_large_is_refused(name: str, round_number: int, tmp_path: Path) -> None:
    """Under plain SGD; the round is then as if the client had not been there."""
    some = tampered(federation(name, tmp_path / "large", weighting="records"), times(10), round_number)
    traffic = [some.round() for _ in range(round_number)][-1]
    assert traffic.missing == [1]
    other = run(without(name, tmp_path / "absent", round_number, {1}), round_number)
    for key, value in some.server.model.tensors.items():
        assert torch.equal(value, other.server.model.tensors[key]), key


def test_the_second_sketch_is_bounded_too(tmp_path: Path) -> None:
    some = tampered(federation("fedask", tmp_path), times(30), exchange=2)
    assert some.round().missing == [1]


def test_the_second_half_of_a_round_is_bounded_too(tmp_path: Path) -> None:
    some = tampered(federation("deer", tmp_path), times(10), exchange=2)
    assert some.round().missing == [1]


def test_without_privacy_size_is_no_reason(tmp_path: Path) -> None:
    some = tampered(federation("ffa-lora", tmp_path, privacy="none"), times(10))
    assert some.round().missing == []


@pytest.mark.parametrize("factor", [-1.0, 1e3])
def test_energies_are_checked_like_tensors(factor: float, tmp_path: Path) -> None:
    def change(reply: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: factor * value if name.startswith("energy:") else value for name, value in reply.items()}

    def one(folder: str, by: Change) -> Traffic:
        options = {"score": "last-step-energy"}
        return tampered(federation("as-lora", tmp_path / folder, options=options), by).round()

    assert one("honest", lambda reply: reply).missing == []
    assert one("changed", change).missing == [1]


OPTIMIZERS = {
    "momentum": OptimizerConfig(lr=0.5, momentum=0.9, weight_decay=0.1),
    "rates": OptimizerConfig(lr=0.5, lr_a=0.05, lr_b=2.0),
    "adamw": OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in METHODS]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_honest_replies_pass_and_large_ones_do_not(name: str, optimizer: str, seed: int, tmp_path: Path) -> None:
    """Also under other optimisers; a refused reply would stop the run, since all have to reply."""
    chosen = OPTIMIZERS[optimizer]
    run(federation(name, tmp_path / "honest", seed=seed, optimizer=chosen, steps=4), 3)
    some = tampered(federation(name, tmp_path / "large", seed=seed, optimizer=chosen, steps=4), times(100), 2)
    some.round()
    assert some.round().missing == [1]


@pytest.mark.parametrize(
    ("name", "piece"), rarely([pair for pair in ACCEPTED if pair[1] in ("scaled_gd", "fedprox", "scaffold")])
)
def test_large_replies_are_refused_with_local_pieces_too(name: str, piece: str, tmp_path: Path) -> None:
    """That honest ones pass with every piece is what the pieces' own tests show: they need all replies."""
    some = tampered(federation(name, tmp_path, steps=4, **PIECE[piece][1]()), times(100), 3)
    run(some, 2)
    assert some.round().missing == [1]


@pytest.mark.parametrize("penalty", [0.01, 0.1])
def test_hetloras_penalty_is_allowed_for(penalty: float, tmp_path: Path) -> None:
    options = {"penalty": penalty, "pruning": 0.5}
    run(federation("het-lora", tmp_path / "honest", options=options, rank=4, steps=4))
    some = tampered(federation("het-lora", tmp_path / "large", options=options, rank=4, steps=4), times(100))
    assert some.round().missing == [1]


@pytest.mark.parametrize("smoothing", ["gaussian", "rescale", "none"])
def test_la_loras_filters_are_allowed_for(smoothing: str, tmp_path: Path) -> None:
    run(federation("la-lora", tmp_path / "honest", options={"smoothing": smoothing}, steps=4))
    some = tampered(federation("la-lora", tmp_path / "large", options={"smoothing": smoothing}, steps=4), times(10))
    assert some.round().missing == [1]


def test_a_client_that_was_refused_is_asked_again_in_the_next_round(tmp_path: Path) -> None:
    some = tampered(federation("ro-lora", tmp_path), times(10), 2)
    assert [some.round().missing for _ in range(4)] == [[], [1], [], []]
    some = tampered(federation("ro-lora", tmp_path / "stopped"), times(10))
    some.min_clients = None
    with pytest.raises(UserError, match=r"client 1: its reply was refused: .* has norm"):
        some.round()
