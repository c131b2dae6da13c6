"""Holds a node's worker at a moment of a run for as long as the test wants. For `PYTHONPATH` of the node.

The folder $LORICA_TEST_HOLD has a file for each moment at which to hold; the worker makes `MOMENT.reached` and goes on
when the file is gone. Moments: `training` (a client's second noisy step), `charging` (before the ledger's row) and
`charged` (between the row and the reply).
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

    step, charge = lorica.owner.client.noisy_gradient, Ledger.charge
    steps = 0

    def held_step(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps % 2 == 0:
            hold("training")
        return step(*args)

    def held_charge(*args: Any) -> None:
        hold("charging")
        charge(*args)
        hold("charged")

    lorica.owner.client.noisy_gradient = held_step
    Ledger.charge = held_charge  # type: ignore[method-assign]


if "lorica.engines.flower.warm" in sys.orig_argv:
    hold_the_client()
