"""What all fuzzers share: draws from a seed that can be set, so that another run of the tests tries other cases."""

from __future__ import annotations

import os
import random

SEED = int(os.environ.get("LORICA_FUZZ_SEED", "0"))


def draws_of(*names: object) -> random.Random:
    """A stream of draws for one case, the same for the same `LORICA_FUZZ_SEED` (default 0)."""
    return random.Random(f"{SEED} {names}")
