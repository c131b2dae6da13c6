"""What the user reads when input is bad."""

from __future__ import annotations

import pickle

import pytest

from lorica.errors import UserError
from lorica.run.divergence import Diverged
from lorica.server.federation import TooFewReplies


@pytest.mark.parametrize("kind", [UserError, Diverged, TooFewReplies])
def test_an_error_crosses_processes(kind: type[UserError]) -> None:
    error = kind("optimizer.lr", -1.0, "is negative", "set it to 1")
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is kind
    assert str(received) == str(error) == "optimizer.lr = -1.0: is negative. Set it to 1."
    assert (received.key, received.value, received.problem, received.remedy) == error.args
