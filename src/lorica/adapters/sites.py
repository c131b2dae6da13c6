"""Adapted linear maps."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.adapters.names import factor_a, factor_b, middle


@dataclass(frozen=True)
class Site:
    """One adapted linear map `W = W0 + γ B A`.

    Attributes:
        name: dotted path in the base model.
        layer: the path up to its last number, such as `vit.layers.3`; the sites of a layer share it.
        d_in, d_out, rank: `A` is `(rank, d_in)`, `B` is `(d_out, rank)`.
        scale: `γ`.

    >>> site = Site("layer.0.query", "layer.0", d_in=16, d_out=8, rank=2, scale=1.0)
    >>> site.a, site.b
    ('layer.0.query.A', 'layer.0.query.B')
    """

    name: str
    layer: str
    d_in: int
    d_out: int
    rank: int
    scale: float

    @property
    def a(self) -> str:
        """Name of the factor `A` among an adapter's tensors."""
        return factor_a(self.name)

    @property
    def b(self) -> str:
        """Name of the factor `B`."""
        return factor_b(self.name)

    @property
    def r(self) -> str:
        """Name of the matrix `R (rank, rank)` between the factors, `W = W0 + γ B R A`, where a method has one."""
        return middle(self.name)


def layer_of(name: str) -> str:
    """`bert.encoder.layer.3.attention.self.query` -> `bert.encoder.layer.3`; without a number, the path itself.

    >>> layer_of("bert.encoder.layer.3.attention.self.query")
    'bert.encoder.layer.3'
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else name
