"""A gauge-aware consensus average: keep the directions that clients agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.adapters.algebra import SINGULAR, product_svd, stacked, truncated
from lorica.adapters.names import Pair
from lorica.methods.base import About, Method
from lorica.methods.components import NEW_BASIS, OWN_AGGREGATION, SINGLE_REPLIES
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server, client_factors


class ConsensusAvg(Method):
    """A reconstruction after the idea of GLoRA (arXiv 2605.06733), of which only the abstract could be read.

    Idea: `(B_k, A_k)` and `(B_k G, G⁻¹ A_k)` are the same adapter, so the average uses what is the same in every basis:
    the column space of each client's product, with the projector `Π_k`, and the product. The consensus subspace is
    spanned by the r leading eigenvectors U of `Σ w_k Π_k`. The mean product is projected onto it,
    `U Z = U Uᵀ Σ w_k B_k A_k`, and factorised: with `P S Vᵀ = Z`, a client of rank `r_k` gets `B = U P_{r_k} S_{r_k}`,
    `A = V_{r_k}ᵀ`.
    Travels: A and B of the client's rank, both ways.
    DP: sound; the average is post-processing. Noise on A and B multiplies, but directions of noise alone differ between
    clients, and the average leaves out what few clients share.

    An eigenvalue is the weight of the clients that share a direction. FlexLoRA keeps the directions of the largest
    energy, so its error in the Frobenius norm is never larger; here one client with large updates cannot occupy the
    subspace. The error is zero if the column spaces of all clients together have at most r dimensions.

    Nothing here says how the published method performs. Whether it uses column spaces, row spaces or both, and how it
    splits S between the factors, could not be found out. No matrix of the size of the weight is formed.
    """

    name = "consensus-avg"
    about = About(
        paper="after GLoRA",
        arxiv="2605.06733",
        trains="A and B, any rank",
        sends="A and B",
        exact=False,
        privacy="sound; noise quadratic",
    )
    refuses = OWN_AGGREGATION | NEW_BASIS | SINGLE_REPLIES

    def round(self, server: Server) -> Round:
        replies = yield Train("AB", ranks=server.ranks)
        for site in self.sites:
            factors = client_factors(server, replies, site, server.ranks)
            pairs, weights = list(factors.values()), [replies.weights[client] for client in factors]
            subspace = consensus(pairs, weights, site.rank)
            b, a = stacked(pairs, weights)
            shared = (subspace @ (subspace.T @ b.double())).to(b)
            b, a = truncated((shared, a), site.rank)
            server.model.assign({site.b: b, site.a: a})
        server.step_head(replies)


def consensus(pairs: Sequence[Pair], weights: Sequence[float], dimension: int) -> Tensor:
    """Leading eigenvectors of `Σ w_k Π_k`, with `Π_k` the projector onto the column space of `B_k A_k`.

    They are the left singular vectors of `[√w_1 Q_1 … √w_K Q_K]`, with `Q_k` an orthonormal basis of that space, which
    is empty for a product that is zero.

    Returns:
        `(d_out, q)`, orthonormal columns, fp64, with `q` at most `dimension` and the dimension of all spaces together.

    >>> first, second = torch.eye(3)[:, :2], torch.eye(3)[:, 1:]
    >>> consensus([(first, torch.eye(2)), (second, torch.eye(2))], [0.5, 0.5], dimension=1).abs()
    tensor([[0.],
            [1.],
            [0.]], dtype=torch.float64)
    """
    bases = []
    for pair, weight in zip(pairs, weights, strict=True):
        u, s, _ = product_svd(pair)
        bases.append(weight**0.5 * u[:, s > SINGULAR * s[0]])
    together: Tensor = torch.linalg.svd(torch.cat(bases, dim=1), full_matrices=False).U
    return together[:, :dimension]
