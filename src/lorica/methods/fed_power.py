"""FedPower: the mean product from two noisy products with thin orthonormal matrices."""

from __future__ import annotations

from pydantic import Field

from lorica.adapters.state import Factors
from lorica.methods.base import About
from lorica.methods.fedask import FedASK
from lorica.methods.server import Server


class FedPower(FedASK):
    """A reconstruction after the idea of FedPower (arXiv 2605.08443), of which only the abstract could be read.

    Idea: clients train A and B. The server finds the mean change of the product, `M = (1/K₀) Σ c_k (B_k A_k - B A)`, by
    a subspace iteration, in which each client's change is clipped as one matrix, `c_k = min(1, C/‖·‖_F)` over all sites
    and the head, and every product is noised before it is orthonormalised:

    1. `Y = M V + noise`, with V orthonormal and public; `Q = qr(B A V + Y)`;
    2. `Z = Mᵀ Q + noise`; the new factors are the truncated SVD of `Q (Qᵀ B A + Zᵀ)`.

    Travels: two sketches of `r + p` columns up; Q, A and B down.
    DP: for `privacy.unit: client`, where the server is trusted. Removing a client moves M by at most `C/K₀`, and so
    `M V` and `Mᵀ Q`, since V is public and Q a function of what was released. Each product is a step of its own, over
    its own secret sample of clients: two steps a round. If only the last product were noised, Q would depend on exact
    values, and could turn by a right angle when one client is removed.

    Under the other units every client adds its noise when it trains, on A and B, so the products need none: the method
    is then FlexLoRA by a randomised SVD, exact up to the truncation if `r + p` is at least the rank of the mean.

    Nothing here says how the published method performs: how many products it takes, and how it noises and composes
    them, could not be found out. A federation needs hundreds of clients in a round: the noise in M has the norm
    `σ (C/K₀) √(s (d_out + d_in))` per site for `s = r + p`, against a mean change of at most C over all sites.
    """

    name = "fed-power"
    about = About(
        paper="after FedPower",
        arxiv="2605.08443",
        trains="A and B, any rank",
        sends="two sketches up; a basis, A and B down",
        exact=False,
        privacy="sound; with unit client, noise on products",
    )
    client_level = 2

    class Options(FedASK.Options):
        oversampling: int = Field(0, ge=0)
        """`p`: number of columns beyond the rank. More of them lose less of the mean and carry more noise."""
        balanced: bool = False
        """Split the singular values evenly between the factors; if false, all of them go to B."""

    options: Options

    def trained(self, server: Server) -> Factors:
        return "AB"
