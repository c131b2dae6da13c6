"""What the user reads when input is bad."""

from __future__ import annotations

import pickle

from lorica.errors import UserError


def test_an_error_crosses_processes() -> None:
    error = UserError("optimizer.lr", -1.0, "is negative", "set it to 1")
    received = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
    assert str(received) == str(error) == "optimizer.lr = -1.0: is negative. Set it to 1."
    assert (received.key, received.value, received.problem, received.remedy) == error.args
