"""A node's worker that is killed: in its second noisy step, or between the ledger's row and the reply.

The test starts it in the worker's place. MARK is a file with a byte for each that was killed, of DEATHS in all.
"""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path
from typing import Any

import lorica.client
from lorica.privacy.ledger import Ledger

MARK, MOMENT = Path(os.environ["LORICA_TEST_MARK"]), os.environ["LORICA_TEST_MOMENT"]
DEATHS = int(os.environ["LORICA_TEST_DEATHS"])
step, charge = lorica.client.noisy_gradient, Ledger.charge
steps = 0


def die(moment: str) -> None:
    before = MARK.read_bytes() if MARK.exists() else b""
    if moment == MOMENT and len(before) < DEATHS:
        MARK.write_bytes(before + b"x")
        os.kill(os.getpid(), signal.SIGKILL)


def dying_step(*args: Any) -> Any:
    global steps
    steps += 1
    if steps == 2:
        die("training")
    return step(*args)


def dying_charge(*args: Any) -> None:
    charge(*args)
    die("charged")


lorica.client.noisy_gradient = dying_step
Ledger.charge = dying_charge  # type: ignore[method-assign]
runpy.run_module("lorica.engines.flower.warm", run_name="__main__")
