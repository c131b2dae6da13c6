"""Methods under secure summation: those that need sums alone end where they would with single replies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lorica
from lorica.errors import UserError
from lorica.messages import Request
from lorica.methods.base import registry
from lorica.methods.pieces import check_pieces
from lorica.secure_sum.setup import SummationError
from tests.methods.test_every_method import METHODS, federation, run, snapshot

SUMS = ["federation.secure_sum=true", "federation.clients=4", "privacy.noise=reproducible"]


def takes_sums(name: str) -> bool:
    return "secure_sum" not in registry()[name].refuses


@pytest.mark.parametrize("name", [name for name in METHODS if takes_sums(name)])
def test_a_secure_sum_ends_where_single_replies_do(name: str, tmp_path: Path) -> None:
    """What each site's weight becomes in a round, and the head, to the quantisation. Factors of a product are not
    compared: those of an SVD may turn, and the next round starts from them.
    """
    plain, summed = federation(name, tmp_path / "plain", clients=4), federation(name, tmp_path / "summed", clients=4)
    summed.secure_sum = True
    before = snapshot(plain)
    run(plain, 1)
    run(summed, 1)
    ours, theirs = snapshot(summed), snapshot(plain)
    assert any(not torch.equal(before[key], value) for key, value in ours.items()) or registry()[name].personal
    heads = [(summed.server.model.tensors[key], plain.server.model.tensors[key]) for key in plain.server.model.head]
    for value, reference in [*((ours[key], theirs[key]) for key in theirs), *heads]:
        assert torch.allclose(value, reference, rtol=0, atol=1e-4 * float(reference.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if takes_sums(name)])
def test_the_server_sees_no_single_reply(name: str, tmp_path: Path) -> None:
    """The engine's other way is never used, and what `sum` returns is one set of tensors for all clients."""
    some = federation(name, tmp_path, clients=4)
    some.secure_sum = True

    def exchange(requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        raise AssertionError("single replies were asked for")

    some.engine.exchange = exchange  # type: ignore[method-assign]
    run(some, 1)


@pytest.mark.parametrize("name", [name for name in METHODS if not takes_sums(name)])
def test_methods_that_combine_single_replies_refuse_sums(name: str, tmp_path: Path) -> None:
    config = lorica.Experiment.load(overrides=[*SUMS, f"method.name={name}"]).config
    method = registry()[name](registry()[name].Options(), [])
    with pytest.raises(UserError, match=r"federation\.secure_sum"):
        check_pieces(config, method)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("server.aggregate=median", r"server\.aggregate"),
        ("local.scaffold=true", r"local\.scaffold"),
        ("lora.client_ranks=halving", r"lora\.client_ranks"),
        ("privacy=none", "privacy"),
        ("federation.participation=0.5", r"federation\.participation"),
        ("method.score=last-step-energy", r"federation\.secure_sum"),
        ("optimizer.name=adamw", r"optimizer\.name"),
    ],
)
def test_what_looks_at_single_replies_does_not_go_with_sums(override: str, key: str, tmp_path: Path) -> None:
    overrides = [*SUMS, override, f"output={tmp_path}", f"privacy.ledger={tmp_path / 'ledger'}", "name=x"]
    if override == "privacy=none":
        overrides = [*SUMS[:2], override, f"output={tmp_path}", "name=x"]
    with pytest.raises(UserError, match=f"^{key}"):
        lorica.Experiment.load(overrides=overrides).run()
    assert not (tmp_path / "x").exists()


def test_a_client_that_drops_out_is_not_in_the_sum(tmp_path: Path) -> None:
    """Fed-avg with uniform weights: the mean of those that stayed."""

    def leave(*_: object) -> bytes:
        raise SummationError("out of order")

    whole, some = federation("fed-avg", tmp_path / "a", clients=4), federation("fed-avg", tmp_path / "b", clients=4)
    some.secure_sum, some.min_clients = True, 3
    start = dict(some.server.model.tensors)
    some.engine.clients[2].answer = leave  # type: ignore[attr-defined]
    replies: dict[int, dict[str, Tensor]] = {}
    original = whole.engine.exchange

    def watched(requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        replies.update(original(requests))
        return replies

    whole.engine.exchange = watched  # type: ignore[method-assign]
    run(whole, 1)
    traffic = some.round()
    assert (traffic.participants, traffic.missing) == ([0, 1, 3], [2])
    for name, value in some.server.model.tensors.items():
        mean = sum(replies[number][name].double() for number in (0, 1, 3)) / 3
        assert torch.allclose(value.double(), start[name].double() + mean, atol=1e-5), name
