"""A client that does not reply leaves the round, and the round is that of the others; for every registered method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.privacy.ledger import Ledger
from lorica.server.federation import Federation, TooFewReplies
from lorica.testing.federation import STEPS, Adapter, checkpoint_of, resume, run_rounds, tiny_federation
from tests.methods.conftest import METHODS, REGISTRY, Histories, Recordings
from tests.methods.engines import Losing, assert_same_adapter, assert_same_model
from tests.methods.test_components import ACCEPTED, COMPONENT, by_tier

SEVERAL_EXCHANGES = {"deer", "fed-power", "fedask"}
REMEMBERING = {"client_ranks", "scaffold", "server_optimizer", "kalman", "average"}
KINDS = {"as-lora", "deer", "galore-avg", "fedask", "fedsa-lora", "flora"}
"""One method of each kind: scores, two exchanges, a basis that turns, sketches, personal models, merging."""


def often(*names: str) -> list[Any]:
    """All methods; those not named are slow."""
    assert set(names) < KINDS
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in METHODS]


def losing(
    name: str, folder: Path, lost: set[tuple[int, int, int]], late: bool = False, min_clients: int = 1, **more: Any
) -> Federation:
    some = tiny_federation(REGISTRY[name], folder, weighting="records", **more)
    some.engine, some.min_clients = Losing(some.engine, lost, late), min_clients
    return some


@pytest.mark.parametrize("name", often("as-lora", "fedask", "fedsa-lora"))
def test_a_round_without_a_client_is_the_round_that_never_had_it(
    name: str, tmp_path: Path, histories: Histories
) -> None:
    """Bit for bit, then and in the next round."""
    some = losing(name, tmp_path, {(2, 1, 1)})
    traffic = [some.round() for _ in range(3)]
    assert [each.missing for each in traffic] == [[], [1], []]
    assert [each.participants for each in traffic] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert traffic[1].bytes_up[1] == 0 < traffic[1].bytes_down[1]
    assert_same_model(some, histories(name, absent=(1,)).federation)


@pytest.mark.parametrize("name", often("deer", "fedsa-lora"))
def test_a_late_reply_changes_nothing_for_the_others(name: str, tmp_path: Path, histories: Histories) -> None:
    """The client did the work and was charged, and is sent everything again. A model of its own has moved with it."""
    some, other = losing(name, tmp_path, {(2, 1, 1)}, late=True), histories(name, absent=(1,))
    run_rounds(some, 2)
    before = Adapter.of(some.server.model)
    assert_same_adapter(before, other.adapters[1])
    count = len(some.engine.requests)
    some.round()
    request = some.engine.requests[count][1]
    assert request.restart
    assert request.tensors.keys() == before.tensors.keys()
    assert request.increments.keys() == before.merged.keys() or not request.increments
    if not REGISTRY[name].personal:
        assert_same_adapter(Adapter.of(some.server.model), other.adapters[2])
    late, absent = (Ledger(folder / "ledger.sqlite").steps("run", 1) for folder in (tmp_path, other.folder))
    # DEeR's first exchange has half of the round's steps.
    assert late - absent == (1 if name == "deer" else 2)
    assert late <= some.plans[1].max_steps


def test_these_methods_have_several_exchanges_in_a_round(recordings: Recordings) -> None:
    counted = {name: len(recordings(name).exchanges[0]) for name in METHODS}
    assert {name for name, count in counted.items() if count > 1} == SEVERAL_EXCHANGES


@pytest.mark.parametrize("name", sorted(SEVERAL_EXCHANGES))
def test_who_leaves_between_exchanges_is_asked_no_more_in_that_round(name: str, tmp_path: Path) -> None:
    some = losing(name, tmp_path, {(2, 2, 1)})
    some.round()
    count = len(some.engine.requests)
    traffic = some.round()
    assert (traffic.participants, traffic.missing) == ([0, 2], [1])
    asked = [sorted(requests) for requests in some.engine.requests[count:]]
    assert asked[0] == [0, 1, 2]
    assert all(clients == [0, 2] for clients in asked[1:])
    assert traffic.bytes_up[1] > 0
    assert some.round().participants == [0, 1, 2]


def test_fedask_forgets_who_left_between_its_sketches(tmp_path: Path, histories: Histories) -> None:
    """A basis of three clients' mean product does not hold that of two: the round is as if the third had never come."""
    some = run_rounds(losing("fedask", tmp_path, {(2, 2, 1)}), 3)
    assert_same_adapter(Adapter.of(some.server.model), histories("fedask", absent=(1,)).adapters[2])


def test_each_half_of_a_deer_round_is_the_mean_of_those_that_replied_to_it(tmp_path: Path) -> None:
    some = losing("deer", tmp_path, {(1, 2, 1)})
    before = dict(some.server.model.tensors)
    some.round()
    first, second = some.engine.replies
    records = {client: plan.records for client, plan in some.plans.items()}
    for site in some.server.model.sites:
        for name, replies in ((site.b, first), (site.a, second)):
            total = sum(records[client] for client in replies)
            mean = sum(records[client] / total * reply[name] for client, reply in replies.items())
            torch.testing.assert_close(some.server.model.tensors[name] - before[name], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "component"), by_tier([pair for pair in ACCEPTED if pair[1] in REMEMBERING]))
def test_components_remember_only_who_took_part(name: str, component: str, tmp_path: Path) -> None:
    """With ranks that differ, only the client of the smallest one is left."""
    gone = {0, 2} if component == "client_ranks" else {1}
    make = COMPONENT[component][1]
    some = run_rounds(losing(name, tmp_path / "lost", {(2, 1, client) for client in gone}, **make()), 3)
    other = tiny_federation(REGISTRY[name], tmp_path / "absent", weighting="records", **make())
    other.schedule[1] = [client for client in other.schedule[1] if client not in gone]
    run_rounds(other, 3)
    assert_same_model(some, other)
    for key, value in some.server.evaluated.items():
        assert torch.equal(value, other.server.evaluated[key]), key


@pytest.mark.parametrize("name", often("fedask"))
def test_a_round_with_too_few_replies_stops_and_resumes_at_no_further_cost(
    name: str, tmp_path: Path, histories: Histories
) -> None:
    """The client is lost on the way back, in the round's last exchange: all had been charged."""
    first = losing(name, tmp_path, {(2, 2 if name in SEVERAL_EXCHANGES else 1, 1)}, late=True)
    first.min_clients = None
    first.round()
    checkpoint = checkpoint_of(first)
    with pytest.raises(
        TooFewReplies, match=r"min_clients = None: round 2 needs 3 replies and has 2 \(client 1: no reply"
    ):
        first.round()
    rest = resume(tiny_federation(REGISTRY[name], tmp_path, weighting="records"), checkpoint)
    rest.round()
    assert_same_adapter(Adapter.of(rest.server.model), histories(name).adapters[1])
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert [ledger.steps("run", number) for number in rest.plans] == 3 * [2 * STEPS]
