"""FedASK's two sketches of a client's product, computed from its noisy factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorica.adapters.names import SKETCH, factor_a, factor_b, is_b, site_of
from lorica.privacy.released import Released, post_process
from lorica.streams import torch_stream


def sketch_matrix(seed: int, round_number: int, site: str, rows: int, columns: int) -> Tensor:
    """`Ω (rows, columns)` with N(0, 1) entries from the public seed; the same for all clients of a round."""
    return torch.randn(rows, columns, generator=torch_stream(seed, f"sketch:{site}", round_number))


def orthonormal_sketch_matrix(seed: int, round_number: int, site: str, rows: int, columns: int) -> Tensor:
    """An orthonormal basis of the columns of `sketch_matrix`."""
    basis: Tensor = torch.linalg.qr(sketch_matrix(seed, round_number, site, rows, columns)).Q
    return basis


def sketch(
    public: Mapping[str, Tensor], own: Mapping[str, Released], columns: int, seed: int, round_number: int
) -> dict[str, Released]:
    """`Y_k = B_k (A_k Ω)`, `(d_out, columns)`, for each site, named `sketch:SITE`. FedASK, arXiv 2507.09990, stage 1.

    Args:
        public: the adapter that training started from.
        own: the factors trained by the client, which replace the public ones.
    """
    sketches = {}
    for site in (site_of(name) for name in own if is_b(name)):
        omega = sketch_matrix(seed, round_number, site, public[factor_a(site)].shape[1], columns)

        def times_omega(b: Tensor, a: Tensor, omega: Tensor = omega) -> Tensor:
            return b @ (a @ omega)

        sketches[f"{SKETCH}{site}"] = _of_factors(times_omega, site, public, own)
    return sketches


def project(
    bases: Mapping[str, Tensor], public: Mapping[str, Tensor], own: Mapping[str, Released]
) -> dict[str, Released]:
    """`Z_k = A_kᵀ (B_kᵀ Q)`, `(d_in, columns)`, for each site, named `sketch:SITE`. FedASK, stage 2.

    Args:
        bases: site name -> `Q (d_out, columns)`.
    """
    projections = {}
    for site, basis in bases.items():

        def onto_basis(b: Tensor, a: Tensor, basis: Tensor = basis) -> Tensor:
            return a.T @ (b.T @ basis)

        projections[f"{SKETCH}{site}"] = _of_factors(onto_basis, site, public, own)
    return projections


def _of_factors(
    function: Callable[[Tensor, Tensor], Tensor], site: str, public: Mapping[str, Tensor], own: Mapping[str, Released]
) -> Released:
    """`function(B_k, A_k)`. If the client trained only B, the public A is cut to the client's rank."""
    name_a, name_b = factor_a(site), factor_b(site)
    trained = [name for name in (name_b, name_a) if name in own]

    def compute(*values: Tensor) -> Tensor:
        found = dict(zip(trained, values, strict=True))
        b = found.get(name_b, public[name_b]).cpu()
        return function(b, found.get(name_a, public[name_a])[: b.shape[1]].cpu())

    return post_process(compute, *(own[name] for name in trained))
