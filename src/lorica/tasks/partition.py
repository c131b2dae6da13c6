"""Who holds which records: one data set divided among simulated clients."""

from __future__ import annotations

import numpy as np

from lorica.config import FederationConfig
from lorica.errors import UserError
from lorica.tasks import draws

DRAWS = 100
REDRAWN = ("dirichlet", "quantity", "as-lora-text", "as-lora-images")
BY_LABELS = ("dirichlet", "shards", "as-lora-text", "as-lora-images")
"""Partitions that need classes."""


def partition(
    labels: np.ndarray, config: FederationConfig, seed: int, owners: np.ndarray | None = None
) -> list[np.ndarray]:
    """Divide records among clients: every record to exactly one client, `min_records` or more to every client.

    `column` and `files` follow the owners that the data names. The others are random (`lorica.tasks.draws`); those
    whose sizes are random too are drawn again, the generator going on, where a client gets too few records.

    Args:
        labels: (n,) integers.
        seed: the same seed gives the same division; not used where `federation.partition_seed` gives one.
        owners: (n,) integers from 0 on, whose record it is; for `column` and `files`.

    Returns:
        One sorted array of indices per client.

    Raises:
        UserError: there are fewer records or shards than the clients need, 100 draws each left a client with too few
            records, or the number of owners is not the number of clients.
    """
    if config.partition in ("column", "files"):
        assert owners is not None
        return _by_owner(config, owners)
    needed = config.clients * config.min_records
    if needed > len(labels):
        raise UserError(
            "federation.clients",
            config.clients,
            f"there are only {len(labels)} training records"
            + (f", but each client needs {config.min_records}" if config.min_records > 1 else ""),
            "lower federation.clients"
            + (" or federation.min_records" if config.min_records > 1 else ", so that every client has a record"),
        )
    generator = np.random.default_rng(seed if config.partition_seed is None else config.partition_seed)
    for _ in range(DRAWS if config.partition in REDRAWN else 1):
        parts = [np.sort(part) for part in _draw(labels, config, generator)]
        if all(len(part) >= config.min_records for part in parts):
            return parts
    if config.partition not in REDRAWN:
        raise _too_few(config, [len(part) for part in parts], "lower federation.min_records or federation.clients")
    wanted = "without records" if config.min_records == 1 else f"with fewer than {config.min_records} records"
    raise UserError(
        "federation.alpha",
        config.alpha,
        f"each of {DRAWS} draws left one of {config.clients} clients {wanted}",
        "raise federation.alpha or lower federation.clients"
        + (" or federation.min_records" if config.min_records > 1 else ""),
    )


def _draw(labels: np.ndarray, config: FederationConfig, generator: np.random.Generator) -> list[np.ndarray]:
    match config.partition:
        case "dirichlet":
            return draws.dirichlet(labels, config.clients, config.alpha, generator)
        case "quantity":
            return draws.quantity(labels, config.clients, config.alpha, generator)
        case "as-lora-text":
            return draws.as_lora_text(labels, config.clients, config.alpha, generator)
        case "as-lora-images":
            return draws.as_lora_images(labels, config.clients, config.alpha, generator)
        case "shards":
            count = config.clients * config.shards_per_client
            if count > len(labels):
                raise UserError(
                    "federation.shards_per_client",
                    config.shards_per_client,
                    f"{len(labels)} training records cannot be divided into {count} shards",
                    "lower federation.shards_per_client or federation.clients",
                )
            return draws.shards(labels, config.clients, config.shards_per_client, generator)
        case _:
            return draws.iid(labels, config.clients, generator)


def _by_owner(config: FederationConfig, owners: np.ndarray) -> list[np.ndarray]:
    found = int(owners.max()) + 1
    if found != config.clients:
        what = f"the column {config.by!r} holds" if config.partition == "column" else "task.train is"
        unit = ("value" if config.partition == "column" else "file") + ("s" if found > 1 else "")
        raise UserError(
            "federation.clients",
            config.clients,
            f"{what} {found} {unit}, each of which is one client",
            f"set federation.clients to {found}",
        )
    parts = [np.flatnonzero(owners == owner) for owner in range(found)]
    if min(map(len, parts)) < config.min_records:
        raise _too_few(
            config, [len(part) for part in parts], "lower federation.min_records, or leave this owner's records out"
        )
    return parts


def _too_few(config: FederationConfig, sizes: list[int], remedy: str) -> UserError:
    smallest = int(np.argmin(sizes))
    return UserError(
        "federation.min_records", config.min_records, f"client {smallest} has only {sizes[smallest]} records", remedy
    )
