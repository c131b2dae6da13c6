"""Names of tensors in an adapter and in messages: `SITE.A`, `SITE.B`, `SITE.R`, and prefixes of other kinds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""`(B, A)`, standing for the product `B A`."""
ENERGY = "energy:"
"""Prefix of a trained tensor's name: `‖ĝ‖²` of its last noisy gradient."""
SKETCH = "sketch:"
"""Prefix of a site's name: a sketch of the client's product `B_k A_k`."""
FIXED = "fixed."
"""Prefix of the path of a tensor that is part of the adapter but not trained, such as that of a frozen new head."""
_FACTORS = (".A", ".B")


def factor_a(site: str) -> str:
    """Name of the factor `A (r, d_in)` of a site."""
    return f"{site}.A"


def factor_b(site: str) -> str:
    """Name of the factor `B (d_out, r)` of a site."""
    return f"{site}.B"


def middle(site: str) -> str:
    """Name of the matrix `R (r, r)` between the factors of a site, `W = W0 + γ B R A`, where a method has one."""
    return f"{site}.R"


def is_a(name: str) -> bool:
    return name.endswith(".A")


def is_b(name: str) -> bool:
    return name.endswith(".B")


def is_middle(name: str) -> bool:
    return name.endswith(".R")


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor `A` or `B`."""
    return name.endswith(_FACTORS)


def site_of(name: str) -> str:
    """The site of a tensor `A`, `B` or `R`.

    >>> site_of("bert.encoder.layer.0.attention.self.query.A")
    'bert.encoder.layer.0.attention.self.query'
    """
    return name[:-2]


def other_factor(name: str) -> str:
    """`SITE.B` for `SITE.A`, and vice versa.

    >>> other_factor("layer.0.query.A")
    'layer.0.query.B'
    """
    return factor_a(site_of(name)) if is_b(name) else factor_b(site_of(name))


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, which is removed."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def flat_pairs(pairs: Mapping[str, Pair], b: str, a: str) -> dict[str, Tensor]:
    """Site -> `(B, A)` as named tensors: `B` under the prefix `b`, `A` under the prefix `a`."""
    named: dict[str, Tensor] = {}
    for site, pair in pairs.items():
        named |= {f"{b}{site}": pair[0], f"{a}{site}": pair[1]}
    return named


def pairs_under(b: str, a: str, tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """The inverse of `flat_pairs`.

    Raises:
        KeyError: a site has no `A`.
    """
    all_a = under(a, tensors)
    return {site: (value, all_a[site]) for site, value in under(b, tensors).items()}
