"""The claims of AS-LoRA's paper (arXiv 2605.05769), each with an experiment that could refute it.

    python benchmarks/claims.py floor
    python benchmarks/claims.py convergence
    python benchmarks/claims.py flatness
    python benchmarks/claims.py privacy

The fifth claim, cheap aggregation, is measured by `aggregation.py`. Everything runs in Lorica's own round loop and
methods. `floor` and `convergence` use matrix factorisation, whose optimum is known: client k holds, for each site, the
target `W* + H_k` with `Σ_k H_k = 0`, and its loss is `Σ_sites c/2 ‖B A - W* - H_k‖²`. `W*` has the rank of the adapter,
so that the mean loss can reach its minimum. Curvatures `c` differ between layers.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import lorica
from lorica.adapters.base_files import resolve_base
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, Factors
from lorica.config import OptimizerConfig, PrivacyConfig, load
from lorica.local.optimizers import learning_rates
from lorica.messages import Request, Training
from lorica.methods.base import make_method
from lorica.methods.server import Server
from lorica.privacy.plan import ClientPlan, plan_client
from lorica.run.variants import parse_variant
from lorica.server.federation import Federation, TooFewReplies
from lorica.streams import torch_stream
from lorica.tasks.loading import load_task
from lorica.testing.federation import RecordingEngine, tiny_federation
from lorica.testing.records import TinyRecords

LAYERS, WIDTH, RANK, CLIENTS, ROUNDS = 8, 24, 3, 6, 100
RATES = (0.1, 0.3, 1.0, 3.0)
RECORDS, BATCH, CLIP = 1000, 100, 100.0
# The warm-up of two rounds, the least, since a tenth of the rounds would be enough to alternate to the minimum.
BY_LAYER, TIED = "as-lora:warm_up=0", "as-lora:warm_up=0+granularity=tied"
SOFTMAX = "as-lora:warm_up=0+select=softmax+ema=0.9"
"""The paper's rule, in the gauge that all share."""
ALTERNATING = f"{BY_LAYER},{TIED},{SOFTMAX},random-lora,ro-lora"
METHODS = f"{ALTERNATING},ffa-lora,fed-avg"
app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help="Put the claims of AS-LoRA's paper to the test."
)
console = Console()


@dataclass
class Factorisation:
    """An engine whose clients factorise matrices, one gradient step an exchange, with the noise of their terms.

    Attributes:
        targets: site name -> `W*`.
        shifts: client -> site name -> `H_k`.
        curvatures: site name -> `c`.
    """

    targets: dict[str, Tensor]
    shifts: list[dict[str, Tensor]]
    curvatures: dict[str, float]
    draws: torch.Generator
    held: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def drawn(cls, seed: int) -> Factorisation:
        """`W*` of norm 1 with equal singular values in random subspaces; `c` from 0.1 to 1; shifts of norm 0.5."""
        draws = torch_stream(seed, "claims")
        names = [f"layers.{layer}.query" for layer in range(LAYERS)]

        def random(rank: int) -> Tensor:
            left, right = (torch.linalg.qr(torch.randn(WIDTH, rank, generator=draws))[0] for _ in range(2))
            return left @ right.T / math.sqrt(rank)

        shifts = [{name: 0.5 * random(WIDTH) for name in names} for _ in range(CLIENTS)]
        for name in names:
            mean = torch.stack([shift[name] for shift in shifts]).mean(dim=0)
            for shift in shifts:
                shift[name] -= mean
        curvatures = np.logspace(-1, 0, LAYERS)[torch.randperm(LAYERS, generator=draws).numpy()]
        return cls(
            {name: random(RANK) for name in names}, shifts, dict(zip(names, map(float, curvatures), strict=True)), draws
        )

    def loss(self, state: AdapterState) -> float:
        """The mean loss above its minimum."""
        return sum(
            0.5 * self.curvatures[site.name] * float(self.missing(state, site).square().sum()) for site in state.sites
        )

    def missing(self, state: AdapterState, site: Site) -> Tensor:
        """`W* - B A`: the update that would solve a site."""
        return self.targets[site.name] - state.tensors[site.b] @ state.tensors[site.a]

    def join(self, run: str) -> dict[int, ClientPlan]:
        return {}

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        return {client: self._reply(client, request) for client, request in requests.items()}

    def _reply(self, client: int, request: Request) -> dict[str, Tensor]:
        held, work = self.held.setdefault(client, {}), request.work
        held.update(request.tensors)
        assert isinstance(work, Training)
        updates = {}
        for name in work.trained:
            site, factor = name.rsplit(".", 1)
            b, a = held[f"{site}.B"], held[f"{site}.A"]
            error = self.curvatures[site] * (b @ a - self.targets[site] - self.shifts[client][site])
            gradient = error @ a.T if factor == "B" else b.T @ error
            noise = work.terms.noise_std * torch.randn(gradient.shape, generator=self.draws)
            updates[name] = -work.rates[name] * (gradient + noise)
        return updates


def noisy(noise_multiplier: float, clip_norm: float) -> PrivacyConfig:
    return PrivacyConfig(epsilon=None, noise_multiplier=noise_multiplier, clip_norm=clip_norm, noise="reproducible")


@dataclass(frozen=True)
class Course:
    """One run on a factorisation.

    Attributes:
        losses: before the first round and after each round.
        tied, free: in each round, the part of the wanted update that is out of reach of one step, if all layers train
            the same factor and if each trains its better one.
    """

    losses: list[float]
    tied: list[float]
    free: list[float]


def run(label: str, rate: float, noise_multiplier: float, seed: int) -> Course:
    """Run a method for `ROUNDS` rounds."""
    engine = Factorisation.drawn(seed)
    privacy = noisy(noise_multiplier, CLIP) if noise_multiplier else PrivacyConfig(noise="none", clip_norm=None)
    sites = [Site(name, name.rsplit(".", 1)[0], WIDTH, WIDTH, RANK, 1.0) for name in engine.targets]
    bound = 1 / math.sqrt(WIDTH)
    a = {site.a: bound * (2 * torch.rand(RANK, WIDTH, generator=engine.draws) - 1) for site in sites}
    state = AdapterState(sites, a | {site.b: torch.zeros(WIDTH, RANK) for site in sites})
    method = make_method(parse_variant(label, load()).config.method, sites)
    method.start(state, seed)
    plans = {client: plan_client(client, RECORDS, BATCH, ROUNDS, privacy) for client in range(CLIENTS)}
    optimizer = OptimizerConfig(name="sgd", lr=rate)
    terms = {client: plan.terms for client, plan in plans.items()}
    server = Server(state, ROUNDS, terms, optimizer, 1, learning_rates(optimizer, list(state.tensors)), seed)
    federation = Federation("claims", method, server, engine, plans, [list(plans)] * ROUNDS, "uniform")
    losses, tied, free = [engine.loss(state)], [], []
    for _ in range(ROUNDS):
        out_of_reach = _out_of_reach(engine, state)
        tied.append(min(sum(each[factor] for each in out_of_reach) for factor in (0, 1)))
        free.append(sum(map(min, out_of_reach)))
        try:
            federation.round()
        except TooFewReplies:
            # The server refuses updates that are not finite: the run has diverged.
            losses += [math.inf] * (ROUNDS + 1 - len(losses))
            break
        losses.append(engine.loss(state))
    return Course(losses, tied, free)


def _out_of_reach(engine: Factorisation, state: AdapterState) -> list[tuple[float, float]]:
    """For each site, the share of `D = W* - B A` that a step on A, and one on B, cannot reach.

    `‖(I - P_B) D‖² / ‖D‖²` and `‖D (I - P_A)‖² / ‖D‖²`, with the projections onto the span of B and the rows of A.
    """
    shares = []
    for site in state.sites:
        wanted = engine.missing(state, site).double()
        left, right = (_projection(state.tensors[name].double()) for name in (site.b, site.a))
        total = float(wanted.square().sum())
        by_a = float((wanted - left @ wanted).square().sum())
        by_b = float((wanted - wanted @ right).square().sum())
        shares.append((by_a / total, by_b / total))
    return shares


def _projection(factor: Tensor) -> Tensor:
    """Onto the column space of B `(d_out, r)` or the row space of A `(r, d_in)`."""
    columns = factor if factor.shape[0] > factor.shape[1] else factor.T
    basis, values, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = basis[:, values > 1e-9 * max(float(values.max()), 1e-30)]
    return basis @ basis.T


Rounds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]
Methods = Annotated[str, typer.Option(help="As in `lorica compare`.")]


@app.command()
def floor(seeds: Rounds = 10, methods: Methods = ALTERNATING) -> None:
    """Claim 1: a choice for each layer has a lower reconstruction error than one choice for all layers."""
    table = Table(
        Column("choice", overflow="fold"),
        "rate",
        "out of reach, tied",
        "out of reach, free",
        "loss after 10 rounds",
        f"after {ROUNDS}",
    )
    for label in methods.split(","):
        rate, courses = tuned(label, 0.0, seeds)
        shares = [statistics.fmean(share) / LAYERS for share in (_joined(courses, "tied"), _joined(courses, "free"))]
        early, late = ([course.losses[place] for course in courses] for place in (10, ROUNDS))
        table.add_row(label, f"{rate:g}", *(f"{share:.3f}" for share in shares), spread(early), spread(late))
    console.print(table)
    console.print(
        "Out of reach: mean over all rounds of the share of the wanted update that one step cannot realise, if all\n"
        "layers train the same factor, and if each trains its better one. Losses are above the minimum, without noise."
    )


@app.command()
def convergence(seeds: Rounds = 10, methods: Methods = METHODS) -> None:
    """Claim 2: AS-LoRA converges faster: rounds until the loss is a tenth and a hundredth of that at the start."""
    for noise_multiplier in (0.0, 0.03, 0.1):
        deviation = noise_multiplier * CLIP / BATCH
        table = Table(
            *(Column("method", overflow="fold"), "rate", "rounds to 1/10", "rounds to 1/100", f"loss after {ROUNDS}"),
            title=f"Noise of standard deviation {deviation:g} in each coordinate of a client's gradient",
        )
        for label in methods.split(","):
            rate, courses = tuned(label, noise_multiplier, seeds)
            table.add_row(
                label,
                f"{rate:g}",
                *(_rounds_to(courses, part) for part in (0.1, 0.01)),
                spread([course.losses[-1] for course in courses]),
            )
        console.print(table)


def tuned(label: str, noise_multiplier: float, seeds: int) -> tuple[float, list[Course]]:
    """The rate with the least loss at the end on three seeds of their own, and the runs with it."""
    tried = {
        rate: statistics.fmean(run(label, rate, noise_multiplier, seed).losses[-1] for seed in (100, 101, 102))
        for rate in RATES
    }
    rate = min(tried, key=tried.__getitem__)
    return rate, [run(label, rate, noise_multiplier, seed) for seed in range(seeds)]


def _joined(courses: list[Course], name: str) -> list[float]:
    return [value for course in courses for value in getattr(course, name)]


def _rounds_to(courses: list[Course], part: float) -> str:
    """Median number of rounds until the loss is a part of that at the start, over the runs that get there."""
    reached = []
    for course in courses:
        below = (number for number, loss in enumerate(course.losses) if loss <= part * course.losses[0])
        reached.append(next(below, None))
    found = sorted(number for number in reached if number is not None)
    if len(found) <= len(reached) // 2:
        return f"never in {len(reached) - len(found)} of {len(reached)} runs"
    # Runs that do not get there are longer than all others, so the median stays one of those that do.
    return f"{found[len(reached) // 2]}"


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{deviation}"


@app.command()
def flatness(
    seeds: Rounds = 3,
    methods: Methods = "as-lora,ro-lora,ffa-lora,fed-avg",
    probes: Annotated[int, typer.Option(help="Vectors of Hutchinson's estimator.")] = 30,
    rounds: int = 60,
    rate: Annotated[float, typer.Option(help="Learning rate of all methods.")] = 0.3,
) -> None:
    """Claim 3: AS-LoRA ends in flatter minima: the Hessian of the loss on the digits' public test set.

    The largest eigenvalue by Lanczos (ARPACK in SciPy) and the trace by Hutchinson's estimator. Derivatives are taken
    by the adapted dense weights, which are the same for all methods.
    """
    for privacy in (
        ["privacy=none", "federation.weights=uniform"],
        ["privacy.epsilon=3", "privacy.noise=reproducible"],
    ):
        table = Table("method", "loss", "largest eigenvalue", "trace", title=" ".join(privacy))
        for label in methods.split(","):
            found = [_hessian(label, [*privacy, f"optimizer.lr={rate}"], rounds, seed, probes) for seed in range(seeds)]
            table.add_row(label, *(spread(list(values)) for values in zip(*found, strict=True)))
        console.print(table)


def _hessian(label: str, overrides: list[str], rounds: int, seed: int, probes: int) -> tuple[float, float, float]:
    """Loss, largest eigenvalue and trace of the Hessian at the end of a run with a frozen head."""
    fixed = ["model.head=freeze", f"federation.rounds={rounds}", "federation.local_steps=1", f"seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        config = load(None, [*overrides, *fixed, f"federation.evaluate_every={rounds}", f"output={folder}"])
        result = lorica.Experiment(parse_variant(label, config).config).run()
        console.print(f"{label}, seed {seed}: {100 * result.score:.1f} %")
        model = lorica.load_adapter(result.adapter)
        targets = json.loads((result.adapter / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    records = load_task(config.task, resolve_base(config.model.base)).test
    batch = records.batch(np.arange(len(records)))
    adapted = {
        name: weight.detach().requires_grad_()
        for name, weight in model.named_parameters()
        if name.endswith(".weight") and "lora_" not in name and any(target in name for target in targets)
    }
    # The fused kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        logits = functional_call(model, adapted, kwargs=batch.inputs).logits
        loss = nn.functional.cross_entropy(logits, batch.labels)
        gradient = flat(torch.autograd.grad(loss, list(adapted.values()), create_graph=True))

    def product(vector: np.ndarray) -> np.ndarray:
        """`H v`."""
        inner = gradient @ torch.from_numpy(vector).to(gradient).flatten()
        return flat(torch.autograd.grad(inner, list(adapted.values()), retain_graph=True)).numpy()

    return loss.item(), *spectrum(product, gradient.numel(), seed, probes)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def spectrum(product: Callable[[np.ndarray], np.ndarray], size: int, seed: int, probes: int) -> tuple[float, float]:
    """Largest eigenvalue and trace of a symmetric matrix.

    Args:
        product: `H v` of a vector `(size,)`.
        probes: number of random sign vectors; the trace is the mean of `vᵀ H v` over them.
    """
    operator = LinearOperator((size, size), matvec=product, dtype=np.float32)
    draws = np.random.default_rng(seed)
    start = draws.standard_normal(size).astype(np.float32)
    largest = eigsh(operator, k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)[0]
    signs = (draws.choice(np.array([-1, 1], np.float32), size) for _ in range(probes))
    return float(largest), statistics.fmean(float(np.dot(sign, product(sign))) for sign in signs)


@app.command()
def privacy(rounds: int = 30) -> None:
    """Claim 4: the choices cost no privacy: they are the same for other private records, if the uploads are."""
    table = Table("score", "selection", "same choices and scores, bit for bit", "same with uploads of its own")
    for score, select in product(("curvature", "energy", "last-step-energy"), ("significance", "softmax", "thompson")):
        options = {"score": score, "select": select}
        kept = _choices(options, rounds, records=0)
        others = _choices(options, rounds, records=100, uploads=kept.uploads)
        own = _choices(options, rounds, records=100)
        same = others.factors == kept.factors and identical(others.state, kept.state)
        changed = own.factors != kept.factors or not identical(own.state, kept.state)
        table.add_row(score, select, "yes" if same else "no", "no" if changed else "yes")
    console.print(table)
    console.print("The last column is the control: the other records matter once their own uploads are used.")


@dataclass
class Choices:
    """What as-lora chose in a run.

    Attributes:
        factors: one entry for each round and site.
        state: the method's state at the end.
        uploads: the replies of each exchange.
    """

    factors: list[Factors]
    state: dict[str, Any]
    uploads: list[dict[int, dict[str, Tensor]]]


def _choices(
    options: Mapping[str, str], rounds: int, records: int, uploads: list[dict[int, dict[str, Tensor]]] | None = None
) -> Choices:
    """Run as-lora on private texts drawn with the seed `records`.

    Args:
        uploads: replies that take the place of the clients' own.
    """
    with tempfile.TemporaryDirectory() as folder:
        # So little noise that the records decide.
        federation = tiny_federation("as-lora", Path(folder), options, rounds=rounds, privacy=noisy(0.01, 1.0))
        engine = federation.engine
        assert isinstance(engine, RecordingEngine)
        for number, client in engine.clients.items():
            client.records = TinyRecords.texts(len(client.records), records + number)
        if uploads is not None:
            federation.engine = Repeating(iter(uploads))
        factors = [factor for _ in range(rounds) for factor in federation.round().factors.values()]
    return Choices(factors, federation.method.state_dict(), engine.replies)


@dataclass
class Repeating:
    """An engine whose clients send what others sent before."""

    uploads: Iterator[dict[int, dict[str, Tensor]]]

    def join(self, run: str) -> dict[int, ClientPlan]:
        return {}

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        return next(self.uploads)


def identical(one: Any, other: Any) -> bool:
    """Bit by bit, in nested dictionaries."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(value, other[key]) for key, value in one.items())
    return bool(one == other)


if __name__ == "__main__":
    # A rate with which a method diverges is not chosen; every refused update would be a warning.
    logging.getLogger("lorica").setLevel(logging.ERROR)
    app()
