"""The server's copy of the adapter: named tensors with versions, and increments merged into the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lorica.adapters.names import Pair, is_a, is_b
from lorica.adapters.sites import Site

Factors = Literal["A", "B", "AB", "R", ""]


class AdapterState:
    """Global factors of all sites, the tensors of a trained head, and low-rank increments of the frozen weights.

    Tensors are replaced, never changed in place, so earlier references keep their values.

    Attributes:
        sites: the adapted linear maps.
        tensors: name -> value, fp32, CPU.
        versions: name -> number of changes.
        merged: site name -> `(B, A)`, so that the site's weight is `W0 + γ (B A + SITE.B SITE.A)`; `B (d_out, R)` has a
            column for each rank merged since the last fold.
        epoch: number of folds of `merged`; ranks of different epochs are unrelated.

    >>> site = Site("layer.0.query", "layer.0", d_in=3, d_out=2, rank=1, scale=1.0)
    >>> model = AdapterState([site], {site.a: torch.ones(1, 3), site.b: torch.zeros(2, 1)})
    >>> model.trained("B")
    ['layer.0.query.B']
    >>> model.add({site.b: torch.ones(2, 1)})
    >>> model.tensors[site.b] @ model.tensors[site.a]
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    def __init__(
        self, sites: list[Site], tensors: Mapping[str, Tensor], frozen_weight: Callable[[Site], Tensor] | None = None
    ) -> None:
        self.sites = sites
        self._frozen_weight = frozen_weight
        self.tensors = dict(tensors)
        self.versions = dict.fromkeys(self.tensors, 0)
        self.merged: dict[str, Pair] = {}
        self.epoch = 0

    def frozen_weight(self, site: Site) -> Tensor:
        """The public frozen weight `W0` of a site, without what was merged, `(d_out, d_in)`, fp32."""
        assert self._frozen_weight is not None, "this adapter has no base model"
        return self._frozen_weight(site)

    @property
    def head(self) -> list[str]:
        """Names of the head's tensors; empty if the head is frozen."""
        return [name for name in self.tensors if name.startswith("head.")]

    def trained(self, factors: Factors | Mapping[str, Factors]) -> list[str]:
        """Names of the tensors trained with a choice of factors, including the head, in the model's order.

        Args:
            factors: one choice for all sites, or site name -> choice.
        """
        choices = factors if isinstance(factors, Mapping) else {site.name: factors for site in self.sites}
        names = [
            name
            for site in self.sites
            for factor, name in (("A", site.a), ("B", site.b), ("R", site.r))
            if factor in choices[site.name]
        ]
        return names + self.head

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors. Unchanged tensors keep their version, so they are not sent again.

        Raises:
            ValueError: an unknown name, or a different shape.
        """
        for name, value in tensors.items():
            if name not in self.tensors or value.shape != self.tensors[name].shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} is not a tensor of this adapter")
            if not torch.equal(value, self.tensors[name]):
                # As a checkpoint gives it back: products of other strides differ in the last bit.
                self.tensors[name] = value.contiguous()
                self.versions[name] += 1

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Add an update: `θ ← θ + u`."""
        self.assign({name: self.tensors[name] + value for name, value in update.items()})

    def extend(self, tensors: Mapping[str, Tensor]) -> None:
        """Add new tensors, such as `SITE.R`. Before the first round only."""
        self.tensors |= tensors
        self.versions |= dict.fromkeys(tensors, 0)

    def merge(self, increments: Mapping[str, Pair]) -> None:
        """Add `γ B A` to the frozen weight of each site, exactly, as new columns of B and rows of A.

        When the merged rank of a site exceeds twice that of a full matrix, the pair is folded into its product.
        """
        for name, pair in increments.items():
            stacked = stack_pairs(self.merged.get(name), pair)
            if stacked[0].shape[1] > 2 * min(stacked[0].shape[0], stacked[1].shape[1]):
                stacked = fold(stacked)
                self.epoch += 1
            self.merged[name] = stacked


def stack_pairs(first: Pair | None, second: Pair) -> Pair:
    """`(B, A)` with `B A = B₁ A₁ + B₂ A₂`: concatenated columns of B and rows of A."""
    if first is None:
        # A method may merge tensors that it goes on with: merged ranks share no memory with them.
        b, a = (value.clone(memory_format=torch.contiguous_format) for value in second)
        return b, a
    return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]], dim=0)


def earlier_ranks(model: AdapterState, newer: Mapping[str, Pair]) -> dict[str, Pair]:
    """The merged ranks of a model without the newest ones, `newer`: what `stack_pairs` completes to all of them."""
    found = {}
    for name, (b, a) in model.merged.items():
        rank = b.shape[1] - (newer[name][0].shape[1] if name in newer else 0)
        if rank:
            found[name] = (b[:, :rank], a[:rank])
    return found


def fold(pair: Pair) -> Pair:
    """A pair with the same product and at most full rank: the product itself and an identity matrix."""
    b, a = pair
    product = (b.double() @ a.double()).to(b)
    if b.shape[0] <= a.shape[1]:
        return torch.eye(b.shape[0], dtype=b.dtype), product
    return product, torch.eye(a.shape[1], dtype=a.dtype)


def leading(name: str, value: Tensor, rank: int | None) -> Tensor:
    """The first `rank` rows of a factor A or columns of a factor B. Other tensors are returned unchanged.

    >>> leading("layer.0.query.A", torch.eye(3), rank=1)
    tensor([[1., 0., 0.]])
    """
    if rank is None:
        return value
    if is_a(name):
        return value[:rank]
    return value[:, :rank] if is_b(name) else value


def at_ranks(name: str, value: Tensor, ranks: Sequence[int] | None) -> Tensor:
    """The rows of a factor A or columns of a factor B at some ranks; None for all. Several may be stacked.

    >>> at_ranks("layer.0.query.A", torch.eye(3), ranks=[0, 2])
    tensor([[1., 0., 0.],
            [0., 0., 1.]])
    """
    if ranks is None:
        return value
    return value.index_select(-2 if is_a(name) else -1, torch.tensor(ranks, device=value.device))


def with_ranks(name: str, value: Tensor, ranks: Sequence[int], part: Tensor) -> Tensor:
    """A factor with other rows (A) or columns (B) at some ranks: the inverse of `at_ranks`.

    >>> with_ranks("layer.0.query.A", torch.zeros(3, 2), ranks=[2], part=torch.ones(1, 2))
    tensor([[0., 0.],
            [0., 0.],
            [1., 1.]])
    """
    return value.index_copy(0 if is_a(name) else 1, torch.tensor(ranks, device=value.device), part)
