"""Robust aggregates, which tolerate a few malicious updates and replace the weighted mean. They ignore the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lorica.config import ServerConfig
from lorica.errors import UserError

Update = Mapping[str, Tensor]
Aggregate = Callable[[Sequence[Update]], dict[str, Tensor]]


def median(updates: Sequence[Update]) -> dict[str, Tensor]:
    """The median of each coordinate; for an even number of updates, the mean of the middle two.

    It is within the range of the honest values if more than half of the updates are honest. Yin et al., arXiv
    1803.01498.
    """
    return {name: torch.from_numpy(np.median(_stack(updates, name), axis=0)) for name in updates[0]}


def trimmed_mean(updates: Sequence[Update], trim: float) -> dict[str, Tensor]:
    """The mean of each coordinate without its `⌊trim · n⌋` largest and as many smallest values.

    It is within the range of the honest values if at most `⌊trim · n⌋` updates are malicious. Yin et al., arXiv
    1803.01498.
    """
    low = int(trim * len(updates))
    high = len(updates) - low
    return {
        name: torch.from_numpy(np.partition(_stack(updates, name), (low, high - 1), axis=0)[low:high].mean(axis=0))
        for name in updates[0]
    }


def krum(updates: Sequence[Update], byzantine: int) -> dict[str, Tensor]:
    """The update with the smallest sum of squared distances to its `n - f - 2` nearest neighbours.

    Distances are over all tensors together, in fp64; in a tie, the first update wins. Blanchard et al., NeurIPS 2017.

    Args:
        updates: `n ≥ 2f + 3` updates.
        byzantine: `f`, the number of malicious clients to tolerate.
    """
    flat = torch.stack([torch.cat([update[name].flatten() for name in updates[0]]).double() for update in updates])
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = distances.fill_diagonal_(torch.inf).sort(dim=1).values[:, : len(updates) - byzantine - 2]
    return dict(updates[int(nearest.sum(dim=1).argmin())])


def make_aggregate(config: ServerConfig) -> Aggregate | None:
    """The configured aggregate; None for the weighted mean."""
    if config.aggregate == "median":
        return median
    if config.aggregate == "trimmed-mean":
        return partial(trimmed_mean, trim=config.trim)
    return partial(krum, byzantine=config.byzantine) if config.aggregate == "krum" else None


def check_aggregate(config: ServerConfig, replies: int) -> None:
    """Raise `UserError` if the aggregate is not defined, or does nothing, for the minimum number of replies."""
    if config.aggregate == "krum" and replies < 2 * config.byzantine + 3:
        problem = (
            f"Krum needs at least 2f + 3 = {2 * config.byzantine + 3} replies, but a round may have only {replies}"
        )
        raise UserError(
            "server.byzantine", config.byzantine, problem, "lower server.byzantine, or raise federation.min_clients"
        )
    if config.aggregate == "trimmed-mean" and int(config.trim * replies) == 0:
        problem = f"trims nothing if a round has only {replies} replies"
        remedy = f"set server.trim to at least {1 / replies:.2g}, or set server.aggregate to median"
        raise UserError("server.trim", config.trim, problem, remedy)


def _stack(updates: Sequence[Update], name: str) -> np.ndarray:
    return np.stack([update[name].numpy() for update in updates])
