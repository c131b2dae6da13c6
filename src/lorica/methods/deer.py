"""DEeR: two half-rounds, and noise that is regulated by the frozen factor."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from lorica.config import OptimizerConfig, Strict
from lorica.errors import UserError
from lorica.methods.base import About, Method
from lorica.methods.exchange import Round, Train
from lorica.methods.pieces import SHAPED
from lorica.methods.server import Server


class DEeR(Method):
    """DEeR (IEEE TMI, arXiv 2410.12926).

    Idea: a round has two halves, B and then A, each averaged with the other factor common, so exactly; and the noise
    in `W` is to be independent of the factors' sizes, by shaping it with the pseudo-inverse of the frozen factor.
    Travels: B, then A, both ways; two exchanges a round, which share its local steps.
    DP: sound here: isotropic noise on the clipped gradient first, then the *noisy gradient* is multiplied by
    `(A Aᵀ + δI)⁻¹` (by `(BᵀB + δI)⁻¹` in the second half): scaled gradient descent, which is post-processing
    (`lorica.local.preconditioning`).

    Where the released code differs: it clips each tensor of a client's update by itself without counting the tensors,
    adds noise for a record-level accountant to that client-level bound, and shapes the noise by `B⁺`, so that it is
    too small wherever B is large: it is not differentially private. It adds the noise on the server.
    """

    name = "deer"
    about = About(
        paper="DEeR",
        arxiv="2410.12926",
        trains="B, then A, in halves of a round",
        sends="B, then A",
        exact=True,
        privacy="sound; noise linear",
    )
    refuses = SHAPED | {
        "scaffold": "control variates are those of whole rounds, and its exchanges are half ones",
        "scaled_gd": "it preconditions by itself (method.damping)",
        "server_optimizer": "the head moves twice in a round, and a server optimiser counts rounds",
    }

    class Options(Strict):
        damping: float = Field(0.1, gt=0)
        """`δ`; it bounds the amplification of noise by `1/δ` where the frozen factor is near zero."""

    options: Options

    def check(self, optimizer: OptimizerConfig, clients: int, local_steps: int) -> None:
        if local_steps < 2:
            raise UserError(
                "federation.local_steps",
                local_steps,
                "deer divides a round's steps between B and A",
                "choose at least 2",
            )

    def round(self, server: Server) -> Round:
        local = replace(server.local, damping=self.options.damping)
        second = server.local_steps // 2
        server.step((yield Train("B", steps=server.local_steps - second, local=local)))
        server.step((yield Train("A", steps=second, local=local)))
