"""FedASK: aggregation by a randomised SVD in two exchanges."""

from __future__ import annotations

import torch
from pydantic import Field

from lorica.adapters.algebra import truncated
from lorica.adapters.state import Factors
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import NEW_BASIS, OWN_AGGREGATION
from lorica.methods.exchange import Project, Round, Train
from lorica.methods.server import Server


class FedASK(Method):
    """FedASK (NeurIPS 2025, arXiv 2507.09990).

    Idea: the server recovers the mean product `M = Σ w_k B_k A_k` from two sketches that can be summed, and distributes
    its truncated SVD:

    1. clients train and send `Y_k = B_k (A_k Ω)`, with `Ω (d_in, r + p)` Gaussian from the public seed;
       `Q = qr(Σ w_k Y_k)`;
    2. clients get Q and send `Z_k = A_kᵀ (B_kᵀ Q)`; with `(Σ w_k Z_k)ᵀ = U S Vᵀ`, `B ← Q U_r S_r^½`, `A ← S_r^½ V_rᵀ`.

    If `r + p` is at least the rank of M, then `Q Qᵀ M = M`, and aggregation is exact up to the truncation to rank r.
    Travels: `(r + p)(d_in + d_out)` up; Q, A and B down. There are two exchanges per round, and one more if a client
    fails between them.
    DP: sound. With noise, only B is trained, A is public, and the sketches are functions of noisy factors, so they have
    no privacy cost; M then has rank r. Without noise, A and B are trained, and the rank of M is at most `K r`.

    As in FedSVD, the row space under DP stays that of A₀. The balanced split makes A small while the product is small,
    and then noise dominates B's signal under SGD; `balanced: false` gives A orthonormal rows instead.

    Where the released code differs: its budget covers the expected number of participations, its noise is that of the
    smallest client, all clients share one AdamW state, and empty batches are skipped. The paper's formula adds noise to
    the gradient of the full matrix; its code, like Lorica, adds it to the gradient of B.
    """

    name = "fedask"
    about = About(
        paper="FedASK",
        arxiv="2507.09990",
        trains="B (A too without DP)",
        sends="two sketches up; a basis, A and B down",
        exact=True,
        privacy="sound; noise linear",
    )
    refuses = (
        OWN_AGGREGATION
        | NEW_BASIS
        | {"shared_noise": "clients send sketches of products, which are not linear in the noisy gradient"}
    )

    class Options(Strict):
        oversampling: int = Field(8, ge=0)
        """`p`: number of sketch columns beyond the rank."""
        balanced: bool = True
        """Split the singular values evenly between the factors, as in the paper; if false, all of them go to B."""

    options: Options

    def trained(self, server: Server) -> Factors:
        """The factors that clients train."""
        return "B" if server.private else "AB"

    def round(self, server: Server) -> Round:
        narrowest = min(min(site.d_in, site.d_out) for site in self.sites)
        columns = min(self.sites[0].rank + self.options.oversampling, narrowest)
        trained = yield Train(self.trained(server), ranks=server.ranks, sketch_columns=columns)
        while True:
            bases = {name: torch.linalg.qr(sketch.double()).Q.float() for name, sketch in trained.mean_sketch.items()}
            projected = yield Project(bases)
            if projected.sketches.keys() == trained.sketches.keys():
                break
            # A basis of the mean over all clients does not span the mean over the remaining ones.
            trained = trained.restricted_to(projected)
        for site in self.sites:
            product = (bases[site.name], projected.mean_sketch[site.name].T)
            b, a = truncated(product, site.rank, self.options.balanced)
            server.model.assign({site.b: b, site.a: a})
        server.step_head(trained)
