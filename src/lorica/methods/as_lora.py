"""AS-LoRA: every layer chooses its factor in every round, by a curvature-aware score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from lorica.adapters.names import Pair, other_factor
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, Factors
from lorica.aggregation.noise import mean_noise_variance, step_weights
from lorica.config import OptimizerConfig
from lorica.errors import UserError
from lorica.methods.base import About, Method
from lorica.methods.components import SCORED
from lorica.methods.exchange import Replies, Round, Train
from lorica.methods.gauge import (
    REFUSES,
    SCALE,
    GaugeOptions,
    alternating,
    check_gauge,
    fix_gauge,
    refused_with,
    start_with,
    trainable,
)
from lorica.methods.scores import (
    alignment,
    cross_client_energy,
    cross_client_spread,
    curvature_score_variance,
    debiased_energy,
    energy_variance,
    shared_dimension,
    weight_alignment,
)
from lorica.methods.server import Server


@dataclass
class Block:
    """The server's state for one factor of one group of sites.

    Attributes:
        sites: the sites of the group.
        factor: "A" or "B".
        gain: EMA of `a S`, the predicted decrease of the loss by one round on this block; None until first active.
        variance: variance of `gain`, from the known noise and from its age.
        complete: whether `gain` includes a score with its cross-round term, beyond the energy of the first activation.
        energy: `Q` of the latest activation, whose score is completed at the next one.
        gradient: `Ḡ` of the latest activation, by tensor; empty before the first one.
        resting: with a gauge, the other factors during that activation, by tensor.
        noise: `v` of that activation.
        energy_noise: variance of `energy` from the noise alone.
    """

    sites: list[Site]
    factor: Literal["A", "B"]
    gain: float | None = None
    variance: float = 0.0
    complete: bool = False
    energy: float = 0.0
    gradient: dict[str, Tensor] = field(default_factory=dict)
    resting: dict[str, Tensor] = field(default_factory=dict)
    noise: float = 0.0
    energy_noise: float = 0.0

    @property
    def names(self) -> list[str]:
        """Names of its tensors."""
        return [site.a if self.factor == "A" else site.b for site in self.sites]

    def steps(self, gradient: Mapping[str, Tensor], resting: Mapping[str, Tensor]) -> list[Pair]:
        """A step on this block in weight space, for each site: `(Ḡ, A)` for B, `(B, Ḡ)` for A."""
        pairs = [(gradient[name], resting[other_factor(name)]) for name in self.names]
        return pairs if self.factor == "B" else [(b, a) for a, b in pairs]


STATE_FIELDS = ("gain", "variance", "complete", "energy", "gradient", "resting", "noise", "energy_noise")


class ASLoRA(Method):
    """AS-LoRA (Kim, Park, Han and Ahn, arXiv 2605.05769), with a score that is pure post-processing.

    Idea: in each layer and round, train and average only one of A and B, so that aggregation is exact, and choose the
    one whose step is predicted to lower the loss most, to second order.
    Travels: the active factor of each layer; nothing else is uploaded (`last-step-energy` adds one number per tensor).
    With a gauge, both factors of a layer travel down when its active factor changes.
    DP: sound. Scores and choices are functions of releases and public numbers, so they have no privacy cost.

    Round `t`:

    1. Warm-up (the first tenth of the rounds, at least two): the layers alternate. After that, `select` decides. A
       layer with a factor that is zero trains that one.
    2. `gauge: orthonormal`: the server changes the basis of each layer's factors, so that the one that rests is
       orthonormal times 1/√3. Their product stays.
    3. Clients train the active factors; the server adds the weighted mean of their updates.
    4. The server scores each active block by its predicted decrease `a S`:
        - `curvature`: `S_t = (Q_t + X_t)/2`, the trapezoidal rule for the directional derivative along the executed
         noisy step (`lorica.methods.scores`). `X_t` is known only at the block's next activation, so a score is
         complete one activation later; before the first complete score, `Q` alone is used. With a gauge, `X_t` is an
         inner product in weight space, since bases change between activations.
        - `energy`: `‖Ḡ‖² - d v`. It also replaces `Q` when a secure sum hides single updates.
        - `last-step-energy`: `Σ_k w_k max(‖ĝ_k‖² - d τ_k², 0)` of the last local step. This is the released code's
         score in most rounds, computed here from the privatised gradient.
    5. `gain ← β gain + (1-β) a S` for the active blocks.

    `select: significance`: the factor that the layer did not train last, unless `|S_A - S_B|` exceeds `deviations`
    times `√(s_A² + s_B²)`; then the one with the larger gain. So where noise hides the difference, layers alternate as
    in RoLoRA. A choice that follows noisy gains tends to stay: the estimate for the factor at rest is as old as its
    last activation, and its gradient changes with every step of the other one. So the variance of a gain at rest grows
    by `(staleness · max(|S_A|, |S_B|))²` in each round. With 0.25, a factor rests for four rounds at most, unless its
    step is predicted to do harm.

    `select: softmax`, the paper's: with `D = (S_A - S_B)/(|S_A| + |S_B|)` and temperature `T = max(0.1, 0.95^(t -
    warm-up))`, A is chosen with probability `1/(1 + exp(-D/T))`. `select: thompson`: A is chosen with probability
    `Φ((S_A - S_B)/√(s_A² + s_B²))`, clipped to `[floor, 1 - floor]`.

    With `freeze`, which needs known variances, a layer trains neither factor while both gains are below zero by a
    standard deviation. Under DP each round records `|S_A - S_B|/√(s_A² + s_B²)` of every choice, its signal-to-noise
    ratio.

    The paper's algorithm is `gauge: none`, `select: softmax`, `ema: 0.9`. The gauge (`lorica.methods.gauge`) is not in
    the paper. Without it, noise on A reaches the weight multiplied by B, and B grows with the noise that it has
    collected, so that under strict privacy steps on A do more and more harm. With it, the gain is the same in all
    rounds, and gradients of A and B have the same unit.

    Denoising may change the step, and so may server optimisers without a gauge, but scores always use the plain mean.

    Where the released code differs: its first version scored the raw gradient (not private); its later version uploads
    the finite-difference curvature of raw private batches in the last rounds (not private; not offered here); it
    compares the factors without their learning rates; it scores a random projection of the gradient, with equal
    expected energy.
    """

    name = "as-lora"
    about = About(
        paper="AS-LoRA",
        arxiv="2605.05769",
        trains="A or B per layer, by score",
        sends="the active factor of each layer up, A and B down",
        exact=True,
        privacy="sound; score is free post-processing",
    )
    refuses = REFUSES | SCORED
    client_level = 1

    class Options(GaugeOptions):
        granularity: Literal["layer", "module", "tied"] = "layer"
        """What shares one decision: the sites of a layer, each site by itself, or all sites."""
        score: Literal["curvature", "energy", "last-step-energy"] = "curvature"
        """How a factor's gain is predicted."""
        select: Literal["significance", "softmax", "thompson"] = "significance"
        """How the gains determine the choice."""
        warm_up: float = Field(0.1, ge=0, le=1)
        """Fraction of the rounds, at the start, that alternate; at least two rounds."""
        ema: float = Field(0.5, ge=0, lt=1)
        """`β` of the gains' moving average."""
        deviations: float = Field(2.0, ge=0)
        """With `significance`, how many standard deviations the gains have to differ by to break the alternation."""
        staleness: float = Field(0.25, ge=0)
        """With `significance` or `thompson`, how fast a gain at rest becomes uncertain, in parts of the larger gain."""
        floor: float = Field(0.05, ge=0, le=0.5)
        """Minimum probability of either factor with `thompson`."""
        freeze: bool = False
        """With `significance` or `thompson`, let a layer train neither factor while both appear harmful."""

    options: Options

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        super().__init__(options, sites)
        self.refuses = refused_with(self.options) | SCORED
        if self.options.score == "last-step-energy":
            self.refuses |= {"secure_sum": "it clamps the energy of each client at zero before summing"}
        self.groups: dict[str, list[Site]] = {}
        for site in sites:
            key = {"layer": site.layer, "module": site.name, "tied": "all"}[self.options.granularity]
            self.groups.setdefault(key, []).append(site)
        self.blocks: dict[tuple[str, str], Block] = {}
        for group, members in self.groups.items():
            self.blocks[group, "A"] = Block(members, "A")
            self.blocks[group, "B"] = Block(members, "B")
        self.latest: dict[str, Factors] = dict.fromkeys(self.groups, "")
        self.probabilities: dict[str, float] = {}
        self.signal_to_noise: dict[str, float] = {}

    def check(self, optimizer: OptimizerConfig, clients: int, local_steps: int) -> None:
        if optimizer.name == "adamw" and (
            self.options.score == "energy" or self.options.select != "softmax" or clients == 1
        ):
            raise UserError(
                "optimizer.name",
                "adamw",
                "AdamW rescales the noise, so the server does not know the noise variance of an update",
                "use sgd, or set method.score=curvature and method.select=softmax with at least two clients per round",
            )
        if self.options.freeze and self.options.select == "softmax":
            reason = "method.select=softmax does not use the variances of the gains, which tell harm from noise"
            raise UserError("method.freeze", True, reason, "set method.select=significance")
        check_gauge(self.options, self.sites)

    def start(self, model: AdapterState, seed: int) -> None:
        start_with(self.options, model, seed)

    def round(self, server: Server) -> Round:
        choice = self._choose(server)
        factors = {site.name: choice[group] for group, members in self.groups.items() for site in members}
        fix_gauge(self.options, server.model, factors)
        replies = yield Train(factors, last_step_energy=self.options.score == "last-step-energy")
        self._age(choice)
        self._score(server, replies, choice)
        server.step(replies)

    def _choose(self, server: Server) -> dict[str, Factors]:
        coins = server.generator("as-lora")
        warm_up = max(2, int(self.options.warm_up * server.rounds))
        self.probabilities, self.signal_to_noise = {}, {}
        choice: dict[str, Factors] = {}
        for group, members in self.groups.items():
            coin = coins.random()
            if server.round <= warm_up:
                choice[group] = alternating(self.options.first, server.round)
            else:
                self.probabilities[group] = self._probability_of_a(group, server.round - warm_up)
                if server.private and server.optimizer.name == "sgd":
                    self._measure(group)
                choice[group] = "A" if coin < self.probabilities[group] else "B"
                if self.options.freeze and self._harmful(group):
                    choice[group] = ""
            choice[group] = trainable(choice[group], server.model, members)
            self.latest[group] = choice[group] or self.latest[group]
        if not any(choice.values()) and not server.model.head:
            best = max(self.blocks, key=lambda key: self.blocks[key].gain or 0.0)
            choice[best[0]] = cast(Factors, best[1])
        return choice

    def _measure(self, group: str) -> None:
        a, b = self.blocks[group, "A"], self.blocks[group, "B"]
        if a.gain is not None and b.gain is not None:
            self.signal_to_noise[group] = abs(a.gain - b.gain) / math.sqrt(a.variance + b.variance)

    def _probability_of_a(self, group: str, rounds_since_warm_up: int) -> float:
        a, b = self.blocks[group, "A"], self.blocks[group, "B"]
        if a.gain is None or b.gain is None:
            return 0.5
        difference = a.gain - b.gain
        if self.options.select == "softmax":
            temperature = max(0.1, 0.95**rounds_since_warm_up)
            relative = difference / max(abs(a.gain) + abs(b.gain), 1e-30)
            return 1 / (1 + math.exp(-min(max(relative / temperature, -30.0), 30.0)))
        deviation = math.sqrt(a.variance + b.variance)
        if self.options.select == "significance":
            if abs(difference) > self.options.deviations * deviation:
                return float(difference > 0)
            return float(self.latest[group] == "B")
        certainty = 0.5 * (1 + math.erf(difference / max(deviation, 1e-30) / math.sqrt(2)))
        return min(max(certainty, self.options.floor), 1 - self.options.floor)

    def _harmful(self, group: str) -> bool:
        blocks = (self.blocks[group, "A"], self.blocks[group, "B"])
        return all(block.gain is not None and block.gain + math.sqrt(block.variance) < 0 for block in blocks)

    def _age(self, choice: dict[str, Factors]) -> None:
        """Let the gains of factors at rest become uncertain: they were measured before the other factor moved."""
        for group in self.groups:
            pair = {factor: self.blocks[group, factor] for factor in ("A", "B")}
            larger = max(abs(block.gain or 0.0) for block in pair.values())
            for factor, block in pair.items():
                if choice[group] != factor:
                    block.variance += (self.options.staleness * larger) ** 2

    def _score(self, server: Server, replies: Replies, choice: dict[str, Factors]) -> None:
        # A secure sum hides the single updates; the debiased energy then replaces `Q`.
        clients = sorted(replies.updates)
        weights = [replies.weights[client] for client in clients]
        coefficients = step_weights(server.local_steps, server.optimizer.momentum)
        noise_variance = mean_noise_variance(server.terms, replies.weights, coefficients)
        spread = 2.0
        if len(clients) > 1:
            spread = cross_client_spread([server.terms[client].noise_std ** 2 for client in clients], weights)
        for (group, factor), block in self.blocks.items():
            if choice[group] != factor:
                continue
            length = server.rates[block.names[0]] * float(coefficients.sum())
            # Gains of different rounds are compared, so they are those of the full rate.
            full = server.full_rates[block.names[0]] * float(coefficients.sum())
            if self.options.score == "last-step-energy":
                score, variance = self._last_step_energy(server, replies, block)
                self._learn(block, full * score, full**2 * variance)
                continue
            gradient = self._gradient(server, replies.mean, block, length)
            mean = torch.cat([value.flatten() for value in gradient.values()])
            energy = debiased_energy(mean, noise_variance)
            if self.options.score == "energy":
                variance = energy_variance(mean.numel(), noise_variance, energy)
                self._learn(block, full * energy, full**2 * variance)
                continue
            if len(clients) > 1:
                single = (self._gradient(server, replies.updates[client], block, length) for client in clients)
                energies = [sum(float(own.square().sum()) for own in gradients.values()) for gradients in single]
                energy = cross_client_energy(mean, energies, weights)
            resting = self._resting(server, block)
            if not block.gradient:
                variance = energy_variance(mean.numel(), noise_variance, energy, spread)
                block.gain, block.variance = full * energy, full**2 * variance
            else:
                aligned, shared = self._alignment(block, gradient, resting)
                score = (block.energy + aligned) / 2
                noises = (block.noise, noise_variance)
                variance = curvature_score_variance(block.energy_noise, shared, noises, score)
                if not block.complete:
                    block.gain, block.complete = None, True
                self._learn(block, full * score, full**2 * variance)
            block.energy, block.gradient, block.resting = energy, gradient, resting
            block.noise, block.energy_noise = noise_variance, energy_variance(mean.numel(), noise_variance, 0.0, spread)

    def _gradient(self, server: Server, update: Mapping[str, Tensor], block: Block, length: float) -> dict[str, Tensor]:
        """`G` of each tensor of a block, fp64: the update over `-a`, without the known weight decay."""
        decay = server.optimizer.weight_decay
        return {
            name: update[name].double() / -length - decay * server.model.tensors[name].double() for name in block.names
        }

    def _resting(self, server: Server, block: Block) -> dict[str, Tensor]:
        if self.options.gauge == "none":
            return {}
        # Copies, since a checkpoint cannot hold a tensor twice.
        return {other_factor(name): server.model.tensors[other_factor(name)].clone() for name in block.names}

    def _alignment(
        self, block: Block, gradient: Mapping[str, Tensor], resting: Mapping[str, Tensor]
    ) -> tuple[float, float]:
        """`X` between a block's latest activation and this one, and the dimension of its noise."""
        if self.options.gauge == "none":
            pairs = [(block.gradient[name].flatten(), gradient[name].flatten()) for name in block.names]
            return sum(alignment(*pair) for pair in pairs), sum(value.numel() for value in gradient.values())
        aligned = weight_alignment(block.steps(block.gradient, block.resting), block.steps(gradient, resting), SCALE)
        spans = []
        for name in block.names:
            first, second = block.resting[other_factor(name)], resting[other_factor(name)]
            if block.factor == "A":
                first, second = first.T, second.T
            spans.append((first, second, gradient[name].numel() // len(first)))
        return aligned, shared_dimension(spans, SCALE)

    def _last_step_energy(self, server: Server, replies: Replies, block: Block) -> tuple[float, float]:
        score = variance = 0.0
        for client, weight in replies.weights.items():
            noise = server.terms[client].noise_std ** 2
            for name in block.names:
                dimension = server.model.tensors[name].numel()
                energy = max(replies.energies[client][name] - dimension * noise, 0.0)
                score += weight * energy
                variance += weight**2 * energy_variance(dimension, noise, energy)
        return score, variance

    def _learn(self, block: Block, gain: float, variance: float) -> None:
        keep = self.options.ema
        if block.gain is None:
            block.gain, block.variance = gain, variance
        else:
            block.gain = keep * block.gain + (1 - keep) * gain
            block.variance = keep**2 * block.variance + (1 - keep) ** 2 * variance

    def decisions(self) -> dict[str, object]:
        return {"probability_a": self.probabilities, "signal_to_noise": self.signal_to_noise}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"latest": dict(self.latest)}
        for (group, factor), block in self.blocks.items():
            state[f"{group}:{factor}"] = {key: getattr(block, key) for key in STATE_FIELDS}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest = dict(state["latest"])
        for (group, factor), block in self.blocks.items():
            for key, value in state[f"{group}:{factor}"].items():
                setattr(block, key, value)
