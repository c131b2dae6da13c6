"""FedSVD: train B, re-factorise on the server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorica.adapters.algebra import truncated, truncated_dense
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import NEW_BASIS, SAME_RANKS
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class FedSVD(Method):
    """FedSVD (NeurIPS 2025, arXiv 2505.12805).

    Idea: clients train B as in FFA-LoRA. The server computes the SVD `U S Vᵀ` of `B̄ A` and sends `A ← Vᵀ`, which has
    orthonormal rows, and `B ← U S`. The product has rank `r`, so nothing is lost.
    Travels: B up, A and B down.
    DP: sound; the SVD is post-processing.

    The row space of `B̄ A` lies in that of A. Clients never train A, so the row space always stays that of A₀: the
    server only rotates its basis, and SGD with isotropic noise and Frobenius clipping is invariant to that. With SGD,
    FedSVD is FFA-LoRA with an orthonormal A, so `ffa-lora` with `orthonormal_a` is the fair baseline.
    `factorise: factors` computes a QR of the two factors and an SVD of size `r × r`, in `O((d_in + d_out) r²)`. `dense`
    forms the product, as the released code does; it is provided to compare the cost.

    Where the released code differs: it skips empty batches instead of adding noise; its budget covers the expected
    number of participations; and before January 2026 its sampling rate was multiplied by the participation rate.
    """

    name = "fedsvd"
    about = About(
        paper="FedSVD",
        arxiv="2505.12805",
        trains="B; A is re-factorised",
        sends="B up, A and B down",
        exact=True,
        privacy="sound; noise linear",
    )
    refuses = SAME_RANKS | NEW_BASIS

    class Options(Strict):
        factorise: Literal["factors", "dense"] = "factors"
        """SVD in factor space, or of the whole product (slow; for comparing costs)."""
        every: int = Field(1, ge=1)
        """Re-factorise every N rounds."""

    options: Options

    def round(self, server: Server) -> Round:
        replies = yield Train("B")
        server.step(replies)
        if server.round % self.options.every == 0:
            svd = truncated if self.options.factorise == "factors" else truncated_dense
            for site in self.sites:
                b, a = server.model.tensors[site.b], server.model.tensors[site.a]
                if bool(b.any()):
                    b, a = svd((b, a), site.rank)
                    server.model.assign({site.b: b, site.a: a})
