"""LA-LoRA: the factors alternate by local step, and noisy gradients are smoothed."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lorica.config import OptimizerConfig, Strict
from lorica.errors import UserError
from lorica.methods.base import About, Method
from lorica.methods.components import SEVERAL_STEPS, SHAPED
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class LALoRA(Method):
    """LA-LoRA (ICLR 2026, arXiv 2602.19926).

    Idea: within a round, odd local steps train B and even ones A, so that no step multiplies two noises; a low-pass
    filter removes noise from each gradient. Both factors are averaged, which is inexact, since both moved on every
    client.
    Travels: A and B, both ways.
    DP: sound here, where every example is clipped and the filter acts on the noisy gradient.

    `smoothing: gaussian` filters A along `d_in` and B along `d_out` with `[1, 4, 6, 4, 1]/16`. The order of a factor's
    coordinates has no meaning, so neighbouring coordinates are not related, and the filter may do no more than shrink
    the noise. For comparison, `rescale` multiplies by `√(Σ k²) = 0.523` instead, which shrinks the noise just as much
    without smoothing, and `none` does neither. The authors set `lr_b = 2 lr_a`.

    Where the released code differs: it clips the gradient of the whole batch, per tensor, at a bound that is itself
    computed from private gradients, adds noise for a sensitivity that is too small by a factor of the batch size, and
    has no accountant, so it is not differentially private. It starts with A while B is zero. Its filter is
    two-dimensional and periodic, mixes ranks, and its unsmoothed step is applied as well.
    """

    name = "la-lora"
    about = About(
        paper="LA-LoRA",
        arxiv="2602.19926",
        trains="B, A, B, A… by local step, smoothed",
        sends="A and B",
        exact=False,
        privacy="sound; noise linear on each client",
    )
    refuses = SHAPED | SEVERAL_STEPS | {"scaffold": "control variates require each factor to be trained in every step"}

    class Options(Strict):
        smoothing: Literal["gaussian", "rescale", "none"] = "gaussian"
        """The paper's filter, a plain rescaling to the same noise energy, or nothing."""

    options: Options

    def check(self, optimizer: OptimizerConfig, clients: int, local_steps: int) -> None:
        if local_steps < 2:
            raise UserError(
                "federation.local_steps",
                local_steps,
                "la-lora trains A from the second local step on",
                "choose at least 2",
            )

    def round(self, server: Server) -> Round:
        local = replace(server.local, alternate=True, smoothing=self.options.smoothing)
        replies = yield Train("AB", local=local)
        server.step(replies)
