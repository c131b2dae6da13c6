"""A run that diverges stops: numbers that are not finite are no result."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.names import Pair
from lorica.errors import UserError

GROWTH = 100
"""A finite loss that has grown by this factor is worth a warning."""
logger = logging.getLogger(__name__)


class Diverged(UserError):
    """The numbers of a round are not finite. The rounds before it are kept."""

    @classmethod
    def in_round(cls, rate: float, round_number: int, problem: str) -> Diverged:
        return cls(
            "optimizer.lr",
            rate,
            f"the run diverged in round {round_number}: {problem}",
            "lower optimizer.lr, and set name to a new run",
        )


def check_finite(rate: float, round_number: int, tensors: Mapping[str, Tensor], merged: Mapping[str, Pair]) -> None:
    """Check the tensors of a round.

    Args:
        rate: `optimizer.lr`, for the error.
        merged: site name -> `(B, A)` merged into its frozen weight.

    Raises:
        Diverged: names the tensor.
    """
    pairs = [(name, value) for name, pair in merged.items() for value in pair]
    for name, value in (*tensors.items(), *pairs):
        if not bool(torch.isfinite(value).all()):
            raise Diverged.in_round(rate, round_number, f"{name} is not finite")


def check_metrics(rate: float, round_number: int, metrics: Mapping[str, float]) -> None:
    """Check the metrics on the public test set after a round.

    Raises:
        Diverged: names the metric.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged.in_round(rate, round_number, f"the {name} on the test set is {value}")


def warn_of_growth(rounds: Sequence[Mapping[str, Any]]) -> None:
    """Warn if the loss on the test set is far above that of the initial model.

    Args:
        rounds: the metrics of all rounds.
    """
    losses = [row["loss"] for row in rounds if row.get("loss") is not None]
    if losses and losses[-1] > GROWTH * max(losses[0], 1.0):
        logger.warning(
            "the run is diverging: the loss on the test set grew from %.3g to %.3g. Lower optimizer.lr",
            *(losses[0], losses[-1]),
        )
