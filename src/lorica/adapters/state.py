"""The server's copy of the adapter: named tensors, and when each last changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lorica.adapters.sites import Site

Factors = Literal["A", "B", "AB", ""]


class AdapterState:
    """Global factors of all sites, and the head's tensors if it is trained.

    Tensors are replaced, never changed in place, so that references to them stay what they were.

    Attributes:
        sites: the adapted linear maps.
        tensors: name -> value, fp32, CPU.
        versions: name -> how often it was replaced.
    """

    def __init__(self, sites: list[Site], tensors: Mapping[str, Tensor]) -> None:
        self.sites = sites
        self.tensors = dict(tensors)
        self.versions = dict.fromkeys(self.tensors, 0)

    @property
    def head(self) -> list[str]:
        """Names of the head's tensors; empty if the head is frozen."""
        return [name for name in self.tensors if name.startswith("head.")]

    def trained(self, factors: Factors | Mapping[str, Factors]) -> list[str]:
        """Names of the tensors that a choice of factors trains, the head included, in the model's order.

        Args:
            factors: one choice for all sites, or site name -> choice.
        """
        choices = factors if isinstance(factors, Mapping) else {site.name: factors for site in self.sites}
        names = [
            name
            for site in self.sites
            for factor, name in (("A", site.a), ("B", site.b))
            if factor in choices[site.name]
        ]
        return names + self.head

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors.

        Raises:
            ValueError: a name or a shape that the adapter does not have.
        """
        for name, value in tensors.items():
            if name not in self.tensors or value.shape != self.tensors[name].shape:
                raise ValueError(f"{name} {tuple(value.shape)} is no tensor of this adapter")
            self.tensors[name] = value
            self.versions[name] += 1

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Add an update: `θ ← θ + u`."""
        self.assign({name: self.tensors[name] + value for name, value in update.items()})
