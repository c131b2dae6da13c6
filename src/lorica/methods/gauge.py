"""A gauge for methods that train one factor of a product: the factor that rests is orthonormal.

`B A = (B M)(M⁻¹ A)` for every invertible M, so the basis of the factors can be chosen freely. It matters for the noise:
noise on one factor reaches the weight multiplied by the other one, `γ N_B A` or `γ B N_A`, and a noisy factor grows
from round to round. In this gauge the factor that rests has orthonormal rows or columns times `s`, so that noise of
variance `v` in each coordinate of the trained factor has the energy `γ² s² v r d` in the weight in every round, with
`d = d_out` where B is trained and `d = d_in` where A is. For the same reason gradients of A and B can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from lorica.adapters.algebra import with_orthonormal_columns, with_orthonormal_rows
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, Factors
from lorica.config import OptimizerConfig, Strict
from lorica.errors import UserError
from lorica.methods.base import Method
from lorica.methods.components import NEW_BASIS, SAME_RANKS

SCALE = 3**-0.5
"""`s`. PEFT's initial A has singular values near it: its entries have variance `1/(3 d_in)`."""
TOLERANCE = 1e-5
"""A factor whose Gram matrix over `s²` is so close to the identity is not changed, which spares its transport. The
rounding of fp32 factors is well below it."""
REFUSES: dict[str, str] = {
    component: f"with method.gauge=orthonormal {reason}" for component, reason in NEW_BASIS.items()
}


class GaugeOptions(Strict):
    """The option of methods that train one factor of a product."""

    gauge: Literal["orthonormal", "none"] = "orthonormal"
    """`orthonormal`: before a round, change the basis of the factors so that the one that is not trained is orthonormal
    times 1/√3. Their product stays the same. `none`: leave them as training left them."""


def refused_with(options: GaugeOptions) -> dict[str, str]:
    """Components that a method does not support with its gauge, with the reason."""
    return REFUSES if options.gauge == "orthonormal" else {}


class GaugedMethod(Method):
    """A method that trains one factor of each product in a round, at the same rank for all clients."""

    refuses = REFUSES | SAME_RANKS
    client_level = 1

    class Options(GaugeOptions):
        """The gauge alone."""

    options: Options

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        super().__init__(options, sites)
        self.refuses = refused_with(self.options) | SAME_RANKS

    def check(self, optimizer: OptimizerConfig, clients: int, local_steps: int) -> None:
        check_gauge(self.options, self.sites)


def check_gauge(options: GaugeOptions, sites: list[Site]) -> None:
    """Check the ranks.

    Raises:
        UserError: the rank of a site exceeds one of its dimensions, so that its factors cannot be orthonormal.
    """
    for site in sites:
        smaller = min(site.d_in, site.d_out)
        if options.gauge == "orthonormal" and site.rank > smaller:
            raise UserError(
                "lora.r",
                site.rank,
                f"with method.gauge=orthonormal the rank of {site.name} is at most {smaller}, its smaller dimension",
                f"choose lora.r of at most {smaller}, or set method.gauge=none",
            )


def fix_gauge(options: GaugeOptions, model: AdapterState, factors: Mapping[str, Factors]) -> None:
    """Change the basis of the factors at each site of which one is about to be trained.

    B is trained: `Aᵀ = Q R`, `A ← s Qᵀ`, `B ← B Rᵀ / s`. A is trained: `B = Q R`, `B ← s Q`, `A ← R A / s`. A resting
    factor that is zero, or orthonormal already, stays as it is, and so does the other one.

    Args:
        factors: site name -> the factor to be trained; "" for none.
    """
    if options.gauge == "none":
        return
    for site in model.sites:
        b, a = model.tensors[site.b], model.tensors[site.a]
        if factors[site.name] == "B" and not _has_gauge(a):
            b, a = with_orthonormal_rows((b, a), SCALE)
        if factors[site.name] == "A" and not _has_gauge(b.T):
            b, a = with_orthonormal_columns((b, a), SCALE)
        model.assign({site.b: b, site.a: a})


def _has_gauge(rows: Tensor) -> bool:
    """Whether the rows of a matrix are orthonormal times `s`, or all zero."""
    gram = rows.double() @ rows.double().T / SCALE**2
    return not bool(rows.any()) or bool((gram - torch.eye(len(gram)).double()).abs().max() <= TOLERANCE)
