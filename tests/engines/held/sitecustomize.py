"""Holds a node's worker at a moment of a run for as long as the test wants. For `PYTHONPATH` of the node.

The folder $LORICA_TEST_HOLD has a file for each moment at which to hold; the worker makes `MOMENT.reached` and goes on
when the file is gone. Moments: `charging` (before the ledger's row), `training` (a client's second noisy step) and
`answered` (the reply is stored in the row and has not been sent).
"""

import os
import sys
import time
from pathlib import Path
from typing import Any


def hold(moment: str) -> None:
    asked = Path(os.environ["LORICA_TEST_HOLD"], moment)
    if asked.exists():
        asked.with_suffix(".reached").touch()
    while asked.exists():
        time.sleep(0.02)


def hold_the_client() -> None:
    import lorica.owner.client
    from lorica.privacy.ledger import Ledger

    step, charge, attach = lorica.owner.client.noisy_gradient, Ledger.charge, Ledger.attach
    steps = 0

    def held_step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps % 2 == 0:
            hold("training")
        return step(*args)

    def held_charge(*args: Any) -> Any:
        hold("charging")
        return charge(*args)

    def held_attach(*args: Any) -> bytes:
        reply = attach(*args)
        hold("answered")
        return reply

    lorica.owner.client.noisy_gradient = held_step
    Ledger.charge = held_charge  # type: ignore[method-assign]
    Ledger.attach = held_attach  # type: ignore[method-assign]


if "lorica.engines.flower.warm" in sys.orig_argv:
    hold_the_client()
