"""What aggregation costs: every method's server seconds and bytes a round, and dense SVD against what replaces it.

    python benchmarks/aggregation.py --threads 1 --clock cpu --plot docs/images/aggregation.png

Adapters have the shape of a real model's, on query and value and without a head. Clients' replies are made up, for what
aggregation costs does not depend on what was learned. Methods run in Lorica's own round loop; seconds leave out the
clients' work, and bytes are those to and from one client that took part in the round before. One layer is driven
(`--driven`), and what it costs is scaled up to the shape's layers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import Clock, interleaved, machine, ratio, verdict
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lorica.adapters.algebra import stacked, truncated, truncated_dense
from lorica.adapters.names import SKETCH, Pair
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, leading
from lorica.config import MethodConfig, OptimizerConfig, PrivacyConfig
from lorica.local.optimizers import learning_rates
from lorica.local.sketches import sketch_matrix
from lorica.messages import Request, Training
from lorica.methods.base import make_method, registry
from lorica.methods.exchange import Replies
from lorica.methods.server import Server
from lorica.privacy.plan import ClientPlan, plan_client
from lorica.reporting.style import COLOURS, INK, MUTED, RC
from lorica.server.federation import Federation, Traffic

SEED, STEPS, RECORDS, BATCH = 0, 2, 1000, 32
# Methods that train less under DP are to do so; nothing is calibrated with the noise given.
PRIVACY = PrivacyConfig(epsilon=None, noise_multiplier=1.0)
# After these rounds no B is zero, what merges has merged, and Fed-SB has found its factors.
WARM_UP = 3
DEVIATION = 0.1
MEAN_BAR, SVD_BAR, TOLERANCE = 180.0, 50.0, 1e-5
DENSE, MEAN, FEDSVD, FLEX = "dense SVD", "AS-LoRA's mean", "FedSVD", "FlexLoRA"
MARKERS = "osD^"

Decompose = Callable[[Pair, int], Pair]


class Shape(NamedTuple):
    """An adapted model as the server sees it: two square sites a layer."""

    name: str
    layers: int
    width: int

    @property
    def sites(self) -> int:
        return 2 * self.layers


SHAPES = {"roberta-large": Shape("RoBERTa-large", 24, 1024), "llama-2-7b": Shape("Llama-2-7B", 32, 4096)}


class Setting(NamedTuple):
    """Rank of the adapters, and how many clients take part in a round."""

    rank: int
    clients: int

    def __str__(self) -> str:
        return f"r = {self.rank}, K = {self.clients}"


class Case(NamedTuple):
    """An operation on one site in a setting."""

    operation: str
    setting: Setting

    def __str__(self) -> str:
        return f"{self.operation}, {self.setting}"


@dataclass
class Cost:
    """What one method's measured rounds cost the server, and one client in traffic."""

    seconds: list[float] = field(default_factory=list)
    up: list[float] = field(default_factory=list)
    down: list[float] = field(default_factory=list)

    def add(self, seconds: float, traffic: Traffic, scale: float) -> None:
        """Take in a round whose layers stand for `scale` times as many."""
        self.seconds.append(scale * seconds)
        self.up.append(scale * traffic.bytes_up[0])
        self.down.append(scale * traffic.bytes_down[0])


@dataclass
class Measured:
    """What was measured of one shape.

    Attributes:
        dense: seconds of a dense SVD of one site.
        seconds: of each case on one site, measured in turn with `dense`.
        differences: `‖P - P_dense‖_F / ‖P_dense‖_F` of each case that decomposes a product.
        rounds: setting -> method -> cost.
    """

    dense: list[float]
    seconds: dict[Case, list[float]]
    differences: dict[Case, float]
    rounds: dict[Setting, dict[str, Cost]]

    def times_cheaper(self, case: Case) -> float:
        """How many times this case's seconds a dense SVD takes."""
        return ratio(self.dense, self.seconds[case])


@dataclass
class MadeUp:
    """An engine whose clients reply with random updates of what they are to train, or with sketches of the result.

    Attributes:
        seconds: spent here, and so not by the server.
    """

    clock: Clock
    draws: torch.Generator
    seconds: float = 0.0
    held: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    trained: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def join(self, run: str) -> dict[int, ClientPlan]:
        """Nobody comes later: the federation is made with all plans."""
        return {}

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        start = self.clock.now()
        replies = {client: self._reply(client, request) for client, request in requests.items()}
        self.seconds += self.clock.now() - start
        return replies

    def _reply(self, client: int, request: Request) -> dict[str, Tensor]:
        held, work = self.held.setdefault(client, {}), request.work
        held.update(request.tensors)
        if not isinstance(work, Training):
            end = self.trained[client]
            return {
                f"{SKETCH}{site}": end[f"{site}.A"].T @ (end[f"{site}.B"].T @ basis)
                for site, basis in work.bases.items()
            }
        start = {name: leading(name, value, work.rank) for name, value in held.items()}
        updates = {
            name: 0.01 * torch.randn(work.part(name, start[name]).shape, generator=self.draws)
            for name in work.trained
            if name not in work.personal
        }
        if work.sketch_columns is None:
            return updates
        end = self.trained[client] = start | {name: start[name] + update for name, update in updates.items()}
        sketches = {}
        for site in {name.rsplit(".", 1)[0] for name in updates}:
            b, a = end[f"{site}.B"], end[f"{site}.A"]
            sketches[f"{SKETCH}{site}"] = b @ (
                a @ sketch_matrix(SEED, request.round, site, a.shape[1], work.sketch_columns)
            )
        return sketches


def federation(name: str, shape: Shape, setting: Setting, driven: int, rounds: int, engine: MadeUp) -> Federation:
    """A method on `driven` layers of a shape; every client takes part in every round."""
    width, rank = shape.width, setting.rank
    sites = [
        Site(f"layers.{layer}.{module}", f"layers.{layer}", width, width, rank, 1.0)
        for layer, module in product(range(driven), ("query", "value"))
    ]
    a = {site.a: (2 * torch.rand(rank, width, generator=engine.draws) - 1) / math.sqrt(width) for site in sites}
    weight = torch.randn(width, width, generator=engine.draws) / math.sqrt(width)
    state = AdapterState(sites, a | {site.b: torch.zeros(width, rank) for site in sites}, lambda site: weight)
    method = make_method(MethodConfig(name=name), sites)
    method.start(state, SEED)
    plans = {client: plan_client(client, RECORDS, BATCH, rounds * STEPS, PRIVACY) for client in range(setting.clients)}
    optimizer = OptimizerConfig()
    server = Server(
        model=state,
        rounds=rounds,
        terms={client: plan.terms for client, plan in plans.items()},
        optimizer=optimizer,
        local_steps=STEPS,
        full_rates=learning_rates(optimizer, list(state.tensors)),
        seed=SEED,
    )
    return Federation("benchmark", method, server, engine, plans, [list(plans)] * rounds, "uniform")


def measure_rounds(shape: Shape, setting: Setting, driven: int, repeats: int, clock: Clock) -> dict[str, Cost]:
    """Method -> what its rounds cost; all methods in turn, a round of each.

    A round's seconds are those of `Traffic.server_seconds`, by a clock of one's choice.
    """
    rounds = WARM_UP + repeats
    engines = {name: MadeUp(clock, torch.Generator().manual_seed(SEED)) for name in registry()}
    federations = {name: federation(name, shape, setting, driven, rounds, engine) for name, engine in engines.items()}
    costs = {name: Cost() for name in federations}
    for number in range(rounds):
        for name, one in federations.items():
            engines[name].seconds = 0.0
            start = clock.now()
            traffic = one.round()
            seconds = clock.now() - start - engines[name].seconds
            if number >= WARM_UP:
                costs[name].add(seconds, traffic, shape.layers / driven)
    return costs


class Factors:
    """All clients' factors at one site: common ones and, in every client, deviations from them."""

    def __init__(self, width: int, setting: Setting) -> None:
        draws = torch.Generator().manual_seed(SEED)
        self.rank = setting.rank
        b, a = torch.randn(width, self.rank, generator=draws), torch.randn(self.rank, width, generator=draws)
        clients = range(setting.clients)
        updates = {client: DEVIATION * torch.randn(b.shape, generator=draws) for client in clients}
        weights = dict.fromkeys(clients, 1 / setting.clients)
        self.replies = Replies({client: {"B": update} for client, update in updates.items()}, weights)
        self.averaged = b + self.replies.mean["B"], a
        self.pairs = [
            (b + updates[client], a + DEVIATION * torch.randn(a.shape, generator=draws)) for client in clients
        ]

    def mean(self) -> dict[str, Tensor]:
        """AS-LoRA's aggregation: `Σ_k w_k U_k` of the site's active factor."""
        # A new object each time, since replies remember their mean.
        return replace(self.replies).mean

    def fedsvd(self, decompose: Decompose) -> Pair:
        """FedSVD's: the SVD of `B̄ A`, of rank r since A is common."""
        return decompose(self.averaged, self.rank)

    def flex(self, decompose: Decompose) -> Pair:
        """FlexLoRA's: the SVD of `Σ_k w_k B_k A_k`, of rank `K r`, truncated to r."""
        return decompose(stacked(self.pairs, list(self.replies.weights.values())), self.rank)


def measure(
    shape: Shape, settings: list[Setting], driven: int, repeats: int, svd_repeats: int, clock: Clock
) -> Measured:
    """Time the operations on one site in turn, compare their products with dense ones, and measure the rounds.

    One dense SVD is timed, FedSVD's in the first setting: what it costs depends on the shape of the product alone.
    """
    factors = {setting: Factors(shape.width, setting) for setting in settings}
    products = {Case(FEDSVD, setting): held.fedsvd for setting, held in factors.items()}
    products |= {Case(FLEX, setting): held.flex for setting, held in factors.items()}
    steps: dict[Case, Callable[[], object]] = {Case(MEAN, setting): held.mean for setting, held in factors.items()}
    steps |= {case: partial(decomposed, truncated) for case, decomposed in products.items()}
    dense = partial(factors[settings[0]].fedsvd, truncated_dense)
    seconds = interleaved({DENSE: dense} | {str(case): step for case, step in steps.items()}, svd_repeats, clock)
    differences = {}
    for case, decomposed in products.items():
        found, expected = (b @ a for b, a in (decomposed(truncated), decomposed(truncated_dense)))
        differences[case] = float((found - expected).norm() / expected.norm())
    rounds = {setting: measure_rounds(shape, setting, driven, repeats, clock) for setting in settings}
    return Measured(seconds[DENSE], {case: seconds[str(case)] for case in steps}, differences, rounds)


def seconds_table(shape: Shape, measured: Measured) -> Table:
    result = Table(
        "method", *map(str, measured.rounds), title=f"{shape.name}: server seconds a round, median (slowest)"
    )
    for name in registry():
        seconds = [costs[name].seconds for costs in measured.rounds.values()]
        result.add_row(name, *(f"{statistics.median(took):.3f} ({max(took):.3f})" for took in seconds))
    result.add_section()
    result.add_row(
        "dense SVDs alone", *[f"{shape.sites * statistics.median(measured.dense):.3f}"] * len(measured.rounds)
    )
    return result


def bytes_table(shape: Shape, measured: Measured) -> Table:
    title = f"{shape.name}: MiB up / down of a client in a round, median (most)"
    result = Table("method", *map(str, measured.rounds), title=title)
    for name in registry():
        cells = []
        for costs in measured.rounds.values():
            usual, most = statistics.median(costs[name].down), max(costs[name].down)
            rare = f" ({_mebibytes(most):.2f})" if most > usual else ""
            cells.append(f"{_mebibytes(statistics.median(costs[name].up)):.2f} / {_mebibytes(usual):.2f}{rare}")
        result.add_row(name, *cells)
    return result


def operations_table(shape: Shape, measured: Measured) -> Table:
    title = (
        f"{shape.name}, one site, dense SVD {1000 * statistics.median(measured.dense):.0f} ms: "
        "milliseconds, times cheaper, difference of the products"
    )
    result = Table("setting", MEAN, f"{FEDSVD}, factor space", f"{FLEX}, factor space", title=title)
    for setting in measured.rounds:
        cells = []
        for case in (Case(operation, setting) for operation in (MEAN, FEDSVD, FLEX)):
            milliseconds = 1000 * statistics.median(measured.seconds[case])
            difference = f", {measured.differences[case]:.1e}" if case in measured.differences else ""
            cells.append(f"{milliseconds:.2f}, {measured.times_cheaper(case):.1f} x{difference}")
        result.add_row(str(setting), *cells)
    return result


def figure(results: dict[Shape, Measured]) -> Figure:
    """Server seconds and, at the largest rank, MiB of every method; methods down, shapes across."""
    methods = list(registry())[::-1]
    with matplotlib.rc_context(RC):
        drawn = Figure(figsize=(9.5, 10.5), layout="constrained")
        for part, draw in zip(drawn.subfigures(2, 1), (_draw_seconds, _draw_traffic), strict=True):
            panels = part.subplots(1, len(results), sharey=True, squeeze=False)[0]
            for panel, (shape, measured) in zip(panels, results.items(), strict=True):
                draw(panel, shape, measured, methods)
                panel.set_title(f"{shape.name}, {shape.sites} sites of width {shape.width}", fontsize=9.5)
                panel.set_xscale("log")
                panel.xaxis.set_major_formatter("{x:g}")
                panel.set_yticks(range(len(methods)), methods)
                panel.tick_params(axis="y", labelcolor=INK)
                panel.grid()
            part.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return drawn


def _draw_seconds(panel: Axes, shape: Shape, measured: Measured, methods: list[str]) -> None:
    ranks = sorted({setting.rank for setting in measured.rounds})
    for setting, costs in measured.rounds.items():
        seconds = [statistics.median(costs[name].seconds) for name in methods]
        marker = MARKERS[ranks.index(setting.rank) % len(MARKERS)]
        panel.plot(seconds, range(len(methods)), marker, color=_colour(measured, setting), label=str(setting))
    dense = shape.sites * statistics.median(measured.dense)
    panel.axvline(dense, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="dense SVD of every site")
    panel.set_xlabel("Server seconds a round")


def _draw_traffic(panel: Axes, shape: Shape, measured: Measured, methods: list[str]) -> None:
    rank = max(setting.rank for setting in measured.rounds)
    shown = [setting for setting in measured.rounds if setting.rank == rank]
    for place, setting in enumerate(shown):
        down = [_mebibytes(statistics.median(measured.rounds[setting][name].down)) for name in methods]
        rows = [row - 0.26 * place for row in range(len(methods))]
        panel.plot(down, rows, "v", color=_colour(measured, setting), markersize=4.5, label=f"down, {setting}")
    # What goes up is the same for any number of clients.
    up = [_mebibytes(statistics.median(measured.rounds[shown[0]][name].up)) for name in methods]
    rows = [row + 0.26 for row in range(len(methods))]
    panel.plot(up, rows, "^", color=INK, markersize=4.5, label=f"up, r = {rank}")
    panel.set_xlabel("MiB of one client in a round")


def _colour(measured: Measured, setting: Setting) -> str:
    """One for each number of clients."""
    counts = sorted({other.clients for other in measured.rounds})
    return COLOURS[counts.index(setting.clients) % len(COLOURS)]


def _mebibytes(count: float) -> float:
    return count / 2**20


def main(
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = ",".join(SHAPES),
    ranks: str = "8,16",
    clients: Annotated[str, typer.Option(help="How many take part in a round.")] = "6,50",
    width: Annotated[int | None, typer.Option(help="In place of the shapes' own.")] = None,
    driven: Annotated[int, typer.Option(help="Layers that are driven; costs are scaled to the shape's.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measured rounds.")] = 5,
    svd_repeats: Annotated[int, typer.Option(help="Of the operations on one site.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Default: as many as PyTorch takes.")] = None,
    clock: Annotated[Clock, typer.Option(help="cpu, with one thread, on a machine that others use.")] = Clock.wall,
    plot: Annotated[Path | None, typer.Option(help="Draw what rounds cost, as PNG.")] = None,
) -> None:
    """Measure each shape, print its tables, and hold the operations on one site against two bars."""
    console = Console()
    torch.set_num_threads(threads or torch.get_num_threads())
    console.print(machine(clock))
    settings = [Setting(int(rank), int(count)) for rank, count in product(ranks.split(","), clients.split(","))]
    results: dict[Shape, Measured] = {}
    for name in shapes.split(","):
        shape = SHAPES[name]._replace(width=width or SHAPES[name].width)
        results[shape] = measured = measure(shape, settings, driven, repeats, svd_repeats, clock)
        for made in (seconds_table, bytes_table, operations_table):
            console.print(made(shape, measured))
    console.print(
        f"Rounds: of {driven} driven layer(s), scaled to the shape's. One dense SVD was timed per width, as its cost\n"
        "depends on neither r nor K; every product was compared with that of a dense SVD of its own."
    )
    cheaper, where = _worst(results, MEAN)
    met = verdict(cheaper >= MEAN_BAR)
    console.print(
        f"bar 1: {MEAN} at least {MEAN_BAR:.0f} x cheaper than dense SVD: {cheaper:.0f} x at worst ({where}): {met}"
    )
    parts = []
    for operation in (FEDSVD, FLEX):
        cheaper, where = _worst(results, operation)
        difference = max(
            value
            for measured in results.values()
            for case, value in measured.differences.items()
            if case[0] == operation
        )
        met = verdict(cheaper >= SVD_BAR and difference <= TOLERANCE)
        parts.append(
            f"{operation}'s product {cheaper:.1f} x at worst ({where}), differs by {difference:.1e} at most: {met}"
        )
    console.print(
        f"bar 2: factor-space SVD at least {SVD_BAR:.0f} x cheaper than dense SVD with the same product to "
        f"{TOLERANCE:.0e}: {'; '.join(parts)}"
    )
    if plot is not None:
        figure(results).savefig(plot, format="png", dpi=150)


def _worst(results: dict[Shape, Measured], operation: str) -> tuple[float, str]:
    """Least of how many times cheaper an operation is than a dense SVD, and where."""
    return min(
        (measured.times_cheaper(case), f"{shape.name}, {case.setting}")
        for shape, measured in results.items()
        for case in measured.seconds
        if case.operation == operation
    )


if __name__ == "__main__":
    typer.run(main)
