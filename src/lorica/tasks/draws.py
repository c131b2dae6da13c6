"""The random divisions of records among clients, one function each: labels and a generator in, indices out.

Every function gives one array of indices per client; together they hold every record exactly once. A client's array may
be empty: `lorica.tasks.partition` judges that.
"""

from __future__ import annotations

import numpy as np


def iid(labels: np.ndarray, clients: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Shuffled equal parts; sizes differ by at most 1."""
    return np.array_split(generator.permutation(len(labels)), clients)


def dirichlet(labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator) -> list[np.ndarray]:
    """Label skew (Yurochkin et al. 2019, arXiv:1905.12022, experiments).

    For each label in order: its records are shuffled, shares of the clients p ~ Dirichlet(α·1) are drawn, and the
    records are cut at `⌊(p_1 + … + p_k) n⌋`.
    """
    pieces = []
    for indices in _by_label(labels):
        shuffled = generator.permutation(indices)
        shares = generator.dirichlet(np.full(clients, alpha))
        pieces.append(np.split(shuffled, _cuts(shares, len(indices))))
    return _joined(pieces)


def as_lora_text(labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator) -> list[np.ndarray]:
    """The label skew of AS-LoRA's experiments on GLUE tasks and SNLI (generator seed 42, α = 0.5).

    The shares of all labels are drawn first, label after label. Client k gets `⌊p_k n⌋` records of a label, the last
    client the rest. That gives the published sizes; they depend on the labels' counts and on nothing else. Which
    records a client gets was not published: here each label's records are shuffled after all shares are drawn.
    """
    groups = _by_label(labels)
    shares = generator.dirichlet(np.full(clients, alpha), size=len(groups))
    return _joined(
        [
            np.split(generator.permutation(indices), _floors(own, len(indices)))
            for indices, own in zip(groups, shares, strict=True)
        ]
    )


def as_lora_images(labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator) -> list[np.ndarray]:
    """The label skew of AS-LoRA's experiments on CIFAR-100 and Tiny-ImageNet (generator seed 42, α = 0.5).

    As `as_lora_text`, but each label's records are shuffled just before its shares are drawn, by the same generator.
    """
    pieces = []
    for indices in _by_label(labels):
        shuffled = generator.permutation(indices)
        shares = generator.dirichlet(np.full(clients, alpha))
        pieces.append(np.split(shuffled, _floors(shares, len(indices))))
    return _joined(pieces)


def quantity(labels: np.ndarray, clients: int, alpha: float, generator: np.random.Generator) -> list[np.ndarray]:
    """Sizes that differ, labels that do not: shuffled records, cut at the cumulative shares p ~ Dirichlet(α·1).

    Li et al. 2022, arXiv:2102.02079, "quantity skew".
    """
    shares = generator.dirichlet(np.full(clients, alpha))
    return np.split(generator.permutation(len(labels)), _cuts(shares, len(labels)))


def shards(labels: np.ndarray, clients: int, per_client: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Few labels per client (McMahan et al. 2017, arXiv:1602.05629, "pathological non-IID").

    Records, sorted by label and shuffled within each, are cut into `clients · per_client` shards whose sizes differ by
    at most 1; the shards are dealt at random, `per_client` to each client.
    """
    shuffled = generator.permutation(len(labels))
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    cut = np.array_split(ordered, clients * per_client)
    dealt = generator.permutation(len(cut)).reshape(clients, per_client)
    return [np.concatenate([cut[shard] for shard in own]) for own in dealt]


def _by_label(labels: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _cuts(shares: np.ndarray, count: int) -> np.ndarray:
    return (np.cumsum(shares)[:-1] * count).astype(np.int64)


def _floors(shares: np.ndarray, count: int) -> np.ndarray:
    return np.cumsum((shares[:-1] * count).astype(np.int64))


def _joined(pieces: list[list[np.ndarray]]) -> list[np.ndarray]:
    """From one list of pieces per label to one array per client."""
    return [np.concatenate(own) for own in zip(*pieces, strict=True)]
