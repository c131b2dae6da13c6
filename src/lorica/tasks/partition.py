"""Who holds which records: one data set divided among simulated clients."""

from __future__ import annotations

import numpy as np

from lorica.config import FederationConfig
from lorica.errors import UserError

DRAWS = 100


def partition(labels: np.ndarray, config: FederationConfig, seed: int) -> list[np.ndarray]:
    """Divide records among clients: every record to exactly one client, at least one record to every client.

    `iid`: shuffled equal parts, sizes differ by at most 1. `dirichlet`: for each label in order, shares of the clients
    p ~ Dirichlet(α·1), and the label's shuffled records are cut at the cumulative shares (Yurochkin et al. 2019,
    arXiv:1905.12022, experiments); drawn again where it leaves a client without records.

    Args:
        labels: (n,) integers.
        seed: the same seed gives the same division.

    Returns:
        One sorted array of indices per client.

    Raises:
        UserError: there are more clients than records, or 100 draws each left a client without records.
    """
    if config.clients > len(labels):
        raise UserError(
            "federation.clients",
            config.clients,
            f"there are only {len(labels)} training records",
            "lower federation.clients, so that every client has a record",
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    if config.partition == "iid":
        return [np.sort(part) for part in np.array_split(generator.permutation(len(labels)), config.clients)]
    for _ in range(DRAWS):
        parts = _dirichlet_draw(labels, config.clients, config.alpha, generator)
        if all(len(part) for part in parts):
            return parts
    raise UserError(
        "federation.alpha",
        config.alpha,
        f"{DRAWS} draws each left one of {config.clients} clients without records",
        "raise federation.alpha or lower federation.clients",
    )


def _dirichlet_draw(labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator) -> list[np.ndarray]:
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        indices = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
        for part, piece in zip(parts, np.split(indices, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]
