"""`check_method` passes a method of one's own, and says of a wrong one what does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorica.adapters.state import AdapterState
from lorica.config import Strict
from lorica.errors import UserError
from lorica.methods.base import About, Method, Round, Server, Train
from lorica.methods.components import OWN_AGGREGATION, SAME_RANKS
from lorica.testing import check_method
from tests.tiers import integration


class Mine(Method):
    """Trains B, and is registered nowhere."""

    name = "mine"
    about = About(paper="Mine", arxiv="0000.00000", trains="B", sends="B", exact=True, privacy="sound")
    refuses = SAME_RANKS

    class Options(Strict):
        factor: str = "B"

    options: Options

    def round(self, server: Server) -> Round:
        replies = yield Train(self.options.factor)
        server.step(replies)


def test_a_class_that_is_not_registered_passes() -> None:
    check_method(Mine)


class Inexact(Mine):
    def round(self, server: Server) -> Round:
        replies = yield Train("AB")
        server.step(replies)


class Fresh(Mine):
    """Starts with an A of its own, whatever the adapter was."""

    def start(self, model: AdapterState, seed: int) -> None:
        model.assign({site.a: torch.ones(site.rank, site.d_in) for site in self.sites})


class Unsaved(Mine):
    """Remembers how often it stepped, and forgets it in a checkpoint."""

    def __init__(self, options: Any, sites: Any) -> None:
        super().__init__(options, sites)
        self.count = 0

    def round(self, server: Server) -> Round:
        self.count += 1
        replies = yield Train("A" if self.count == 3 else "B")
        server.step(replies)


class Unsavable(Mine):
    def state_dict(self) -> dict[str, Any]:
        return {"sites": self.sites}


class Ordered(Mine):
    """Follows whoever is listed first."""

    refuses = SAME_RANKS | OWN_AGGREGATION | {"secure_sum": "it reads single replies"}
    about = About(paper="Mine", arxiv="0000.00000", trains="B", sends="B", exact=False, privacy="sound")

    def round(self, server: Server) -> Round:
        replies = yield Train("B")
        server.model.add(next(iter(replies.updates.values())))


class Single(Mine):
    """Needs single replies and does not say so."""

    def round(self, server: Server) -> Round:
        replies = yield Train("B")
        for client in sorted(replies.updates):
            server.model.add({n: replies.weights[client] * u for n, u in replies.updates[client].items()})
        if not replies.updates:
            raise KeyError("B")


class Greedy(Mine):
    def round(self, server: Server) -> Round:
        for _ in range(2):
            replies = yield Train("B")
            server.step(replies)


class Stepping(Mine):
    """Moves what nobody trained."""

    about = About(paper="Mine", arxiv="0000.00000", trains="B", sends="B", exact=False, privacy="sound")

    def round(self, server: Server) -> Round:
        replies = yield Train("B")
        server.step(replies)
        site = self.sites[0]
        server.model.assign({site.a: 2 * server.model.tensors[site.a]})


class Idle(Mine):
    def round(self, server: Server) -> Round:
        yield Train("B")


class Growing(Mine):
    def round(self, server: Server) -> Round:
        replies = yield Train("B")
        server.step(replies)
        server.model.extend({f"extra{server.round}.R": torch.zeros(1)})


class Infinite(Mine):
    refuses = SAME_RANKS | OWN_AGGREGATION

    def round(self, server: Server) -> Round:
        replies = yield Train("B")
        server.step(replies)
        if server.round == server.rounds:
            site = self.sites[0]
            server.model.assign({site.a: float("inf") * server.model.tensors[site.a]})


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (Inexact, "about.exact is set, and after round 1 the weight of bert"),
        (Unsaved, "resumed after round 2, it has another adapter"),
        (Unsavable, "state_dict gives what a checkpoint cannot hold"),
        (Ordered, "the adapter after round 1 depends on the order in which clients are listed"),
        (Greedy, "round . fails: .*client .: 6 steps in total exceed the 4 steps of its plan"),
        (Stepping, "moved in round 1, and no client trained it"),
        (Idle, "no site's weight moved in any round"),
        (Growing, "tensors came or went during the rounds: extra1.R"),
        *integration(
            (Fresh, "start changes the product B A of bert"),
            (Single, "fails under secure sums with KeyError"),
            (Infinite, "is not finite"),
        ),
    ],
)
def test_a_wrong_method_is_told_what_does_not_hold(method: type[Method], problem: str) -> None:
    with pytest.raises(AssertionError, match=rf"^mine: .*({problem})"):
        check_method(method)


def test_options_and_names_that_do_not_exist_are_a_users_error() -> None:
    with pytest.raises(UserError, match=r"method\.facto"):
        check_method(Mine, {"facto": "A"})
    with pytest.raises(UserError, match=r"method\.name"):
        check_method("no-such-lora")


def test_options_are_used() -> None:
    check_method("deer", {"damping": 0.5})
    with pytest.raises(AssertionError, match="no site's weight moved"):
        check_method(Mine, {"factor": ""})
