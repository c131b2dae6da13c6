"""DEeR: two half-rounds, and noise regulated by the frozen factor."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from lorica.config import OptimizerConfig, Strict
from lorica.errors import UserError
from lorica.methods.base import About, Method
from lorica.methods.components import SEVERAL_STEPS, SHAPED
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class DEeR(Method):
    """DEeR (IEEE TMI, arXiv 2410.12926).

    Idea: a round has two halves, B and then A. In each half all clients share the other factor, so averaging is exact.
    The noise is shaped with the pseudo-inverse of the frozen factor, to make the noise in `W` independent of the
    factors' sizes.
    Travels: B, then A, both ways; two exchanges per round, which share its local steps.
    DP: sound here. Isotropic noise is added to the clipped gradient first. Then the *noisy gradient* is multiplied by
    `(A Aᵀ + δI)⁻¹` (by `(BᵀB + δI)⁻¹` in the second half). This is scaled gradient descent, which is post-processing
    (`lorica.local.preconditioning`).

    Where the released code differs: it clips each tensor of a client's update separately without accounting for the
    number of tensors, adds noise for a record-level accountant to that client-level bound, and shapes the noise by
    `B⁺`, so that the noise is too small wherever B is large. It is therefore not differentially private. It adds the
    noise on the server.
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
    refuses = (
        SHAPED
        | SEVERAL_STEPS
        | {
            "scaffold": "control variates are updated per round, but it trains each factor for half a round",
            "scaled_gd": "it already preconditions gradients (method.damping)",
            "server_optimizer": "the head is updated twice per round, but a server optimiser expects one update",
        }
    )

    class Options(Strict):
        damping: float = Field(0.1, gt=0)
        """`δ`; where the frozen factor is near zero, noise is amplified by at most `1/δ`."""

    options: Options

    def check(self, optimizer: OptimizerConfig, clients: int, local_steps: int) -> None:
        if local_steps < 2:
            raise UserError(
                "federation.local_steps",
                local_steps,
                "deer divides the steps of a round between B and A",
                "choose at least 2",
            )

    def round(self, server: Server) -> Round:
        local = replace(server.local, damping=self.options.damping)
        second = server.local_steps // 2
        server.step((yield Train("B", steps=server.local_steps - second, local=local)))
        server.step((yield Train("A", steps=second, local=local)))
