"""The schedule of Flat-LoRA's noise on the frozen weights."""

from __future__ import annotations

import math


def strength(step: int, steps: int) -> float:
    """`f = (1 - cos(π t/T)) / 2`: from 0 at the start of the run to 1 at its end. The step `t` is counted from 0."""
    return (1 - math.cos(math.pi * step / steps)) / 2
