"""A gauge for methods that train one factor of a product: the factor that rests is orthonormal.

`B A = (B M)(M⁻¹ A)` for every invertible M, so the basis of the factors can be chosen freely. It matters for the noise:
noise on one factor reaches the weight multiplied by the other one, `γ N_B A` or `γ B N_A`, and a noisy factor grows
from round to round. In this gauge the factor that rests has orthonormal rows or columns times `s`, so that noise of
variance `v` in each coordinate of the trained factor has the energy `γ² s² v r d` in the weight in every round, with
`d = d_out` where B is trained and `d = d_in` where A is. For the same reason gradients of A and B can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from lorica.adapters.algebra import orthonormal, with_orthonormal_columns, with_orthonormal_rows
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, Factors
from lorica.config import OptimizerConfig, Strict
from lorica.errors import UserError
from lorica.methods.base import Method
from lorica.methods.components import NEW_BASIS, SAME_RANKS
from lorica.streams import numpy_stream

SCALE = 3**-0.5
"""`s`. PEFT's initial A has singular values near it: its entries have variance `1/(3 d_in)`."""
OTHER: dict[str, Literal["A", "B"]] = {"A": "B", "B": "A"}
TOLERANCE = 1e-5
"""A factor whose Gram matrix over `s²` is so close to the identity is not changed, which spares its transport. The
rounding of fp32 factors is well below it."""
REFUSES: dict[str, str] = {
    component: f"with method.gauge=orthonormal {reason}" for component, reason in NEW_BASIS.items()
}


class GaugeOptions(Strict):
    """The options of methods that train one factor of a product."""

    gauge: Literal["orthonormal", "none"] = "orthonormal"
    """`orthonormal`: before a round, change the basis of the factors so that the one that is not trained is orthonormal
    times 1/√3. Their product stays the same. `none`: leave them as training left them."""
    first: Literal["A", "B"] = "B"
    """The factor that is trained first. `B`, as in LoRA: A starts at random and B at zero. `A`: B starts with random
    orthonormal columns times 1/√3 and A at zero."""


def refused_with(options: GaugeOptions) -> dict[str, str]:
    """Components that a method does not support with its gauge, with the reason."""
    return REFUSES if options.gauge == "orthonormal" else {}


class GaugedMethod(Method):
    """A method that trains one factor of each product in a round, at the same rank for all clients."""

    refuses = REFUSES | SAME_RANKS
    client_level = 1

    class Options(GaugeOptions):
        """The gauge and the first factor."""

    options: Options

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        super().__init__(options, sites)
        self.refuses = refused_with(self.options) | SAME_RANKS

    def check(self, optimizer: OptimizerConfig, clients: int, local_steps: int) -> None:
        check_gauge(self.options, self.sites)

    def start(self, model: AdapterState, seed: int) -> None:
        start_with(self.options, model, seed)


def check_gauge(options: GaugeOptions, sites: list[Site]) -> None:
    """Check the ranks.

    Raises:
        UserError: the rank of a site exceeds a dimension of a factor that has to be orthonormal.
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
        if options.first == "A" and site.rank > site.d_out:
            raise UserError(
                "lora.r",
                site.rank,
                f"with method.first=A the rank of {site.name} is at most {site.d_out}, the number of its outputs",
                f"choose lora.r of at most {site.d_out}, or set method.first=B",
            )


def start_with(options: GaugeOptions, model: AdapterState, seed: int) -> None:
    """With `first: A`, exchange the roles of the factors in an adapter that is zero: `B ← s Q`, `A ← 0`.

    `Q` has random orthonormal columns. A site whose B is not zero was trained before (`lora.start`) and stays as it is.
    """
    if options.first == "B":
        return
    draws = numpy_stream(seed, "first-factor")
    for site in model.sites:
        random = SCALE * orthonormal(site.d_out, site.rank, draws)
        if not bool(model.tensors[site.b].any()):
            model.assign({site.b: random, site.a: torch.zeros_like(model.tensors[site.a])})


def trainable(factor: Factors, model: AdapterState, sites: Sequence[Site]) -> Factors:
    """The factor to train: the chosen one, or the other one if that is zero at any of the sites.

    `∂L/∂A = γ Bᵀ G` is zero while B is, and `∂L/∂B = γ G Aᵀ` while A is: training such a factor uploads only noise.
    """
    names = {"A": [site.b for site in sites], "B": [site.a for site in sites]}
    if factor in names and not all(bool(model.tensors[name].any()) for name in names[factor]):
        return OTHER[factor]
    return factor


def alternating(first: Literal["A", "B"], round_number: int) -> Literal["A", "B"]:
    """The first factor in odd rounds, the other one in even rounds."""
    return first if round_number % 2 else OTHER[first]


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
