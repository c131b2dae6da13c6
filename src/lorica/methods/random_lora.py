"""Random-LoRA: a random factor per layer and round, an ablation of AS-LoRA."""

from __future__ import annotations

from lorica.adapters.state import Factors
from lorica.methods.base import About
from lorica.methods.exchange import Round, Train
from lorica.methods.gauge import GaugedMethod, fix_gauge, trainable
from lorica.methods.server import Server


class RandomLoRA(GaugedMethod):
    """AS-LoRA without its score: an ablation.

    Idea: an independent fair coin chooses the factor for each layer and round. Under DP noise AS-LoRA's released score
    is almost a coin flip, so this is the baseline that a score has to beat. In the first round
    all layers train the factor that is zero.
    Travels: the active factors up; with a gauge, both factors down where the choice changes. Aggregation is exact.
    DP: sound under the canonical step.
    """

    name = "random-lora"
    about = About(
        paper="ablation of AS-LoRA",
        arxiv="2605.05769",
        trains="A or B per layer, at random",
        sends="the active factor of each layer up, A and B down",
        exact=True,
        privacy="sound; noise linear",
    )

    def round(self, server: Server) -> Round:
        coins = server.generator("random-lora")
        layers = {site.layer: [other for other in self.sites if other.layer == site.layer] for site in self.sites}
        choice = {
            layer: trainable("A" if coins.random() < 0.5 else "B", server.model, sites)
            for layer, sites in layers.items()
        }
        factors: dict[str, Factors] = {site.name: choice[site.layer] for site in self.sites}
        fix_gauge(self.options, server.model, factors)
        replies = yield Train(factors)
        server.step(replies)
