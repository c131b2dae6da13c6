"""Write docs/methods.md and its figure from the methods themselves, so that they cannot go stale (a test compares)."""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator

from lorica.messages import Projection, Request, size
from lorica.methods.base import Method, registry
from lorica.methods.components import COMPONENTS
from lorica.reporting.methods import HEADINGS, method_rows
from lorica.reporting.plots import WIDTH
from lorica.reporting.style import COLOURS, FACTOR_COLOURS, INK, MUTED, RC
from lorica.testing.federation import tiny_federation

ROOT = Path(__file__).parent.parent
# `scripts` is not installed.
sys.path.insert(0, str(ROOT))
from scripts.configuration_docs import _table as options_table  # noqa: E402

TARGET = ROOT / "docs" / "methods.md"
FIGURE = ROOT / "docs" / "images" / "methods.png"
CLIENTS, RANK, ROUNDS = 3, 4, 3
# Two rounds are the default, and round 3 is then that of the change from A and B to R.
OPTIONS = {"fed-sb": {"warm_up": 1}}
KINDS = {
    "A": FACTOR_COLOURS["A"],
    "B": FACTOR_COLOURS["B"],
    "R": FACTOR_COLOURS["R"],
    "sketches": COLOURS[6],
    "bases": COLOURS[5],
    "merged increments": COLOURS[1],
    "head": "#b4bcc4",
}
"""What travels, in the order of the bars -> colour."""

Sizes = dict[str, float]
"""Kind -> size in factors a site."""

INTRODUCTION = """# Methods

Generated from the methods themselves by `python scripts/methods_docs.py`; do not edit. `lorica methods` prints the
table, and `lorica new-method NAME` creates a package for your own method.

## Why there are so many methods

LoRA keeps the weight `W0` of a linear map fixed and learns a product beside it: `W = W0 + γ B A`, where A has `r` rows
and B has `r` columns, for a small rank `r`. Only A and B are trained and sent. In a federation, each client `k` returns
its own `A_k` and `B_k`, and the server has to combine them into one model. This causes two problems.

**Averaging the factors is not averaging the models.** The weighted mean of the clients' models has
`Σ_k w_k B_k A_k`. A server that averages A and B separately gets `B̄ Ā`, and its error is
`Σ_k w_k (B_k - B̄)(A_k - Ā)`: the clients' disagreement in B times their disagreement in A. The error is zero if all
clients have the same A or the same B. It grows with the number of local steps and with the difference between the
clients' data. The true mean does not fit into factors of rank `r` either: its rank is up to `K r` for `K` clients.

**Noise on both factors multiplies.** Under DP each client adds noise to whatever it trains. With noise on both factors,
`(B + N_B)(A + N_A) = B A + N_B A + B N_A + N_B N_A`, and the last term contains no signal: the noise in the weight is
quadratic in the noise of the factors. With noise on B alone it is `N_B A`, which is linear. Moreover, A has no gradient
while B is zero, as it is at the start: a client that trains A then uploads nothing but noise.

The methods solve these problems in different ways.

* **One factor.** All clients share one factor and train the other one. The mean of the products is then the product of
  the means, and the noise is linear. But the model can move only in the directions that the shared factor allows.
  `ffa-lora` keeps the initial A, `fed-rac-lora` draws a new factor in every round, and `fed-sb` fixes both factors and
  trains a small matrix between them.
* **Alternate.** Train B while A is shared, then A while B is shared. Aggregation is exact each time, and both factors
  learn. `ro-lora` alternates by round and `deer` by half-round; `random-lora` chooses at random for each layer, and
  `as-lora` by a score for each layer. `lora-a2` alternates by round and trains only the ranks with the largest
  updates. `la-lora` alternates by local step, so no step multiplies two noises; but by the end of a round both factors
  have moved, so averaging them is inexact again.
* **Re-factorise.** Form the mean product and factorise it again by an SVD. `fedsvd` does so after training B alone,
  `flex-lora` after training both factors, with truncation to rank `r`, `consensus-avg` after a projection onto the
  directions that clients share, and `fedask` from two sketches of each client's product.
  So does `fed-power`, where a trusted server noises the sketches (`privacy.unit: client`).
* **Align or correct.** Average both factors, but reduce the error. `fedrot-lora` first rotates the clients' factors
  into one basis, `lora-fair` corrects B afterwards, and `het-lora` averages factors of different ranks, weighted by the
  size of their products. `fed-avg` does neither and is the baseline.
* **Stack and merge.** Merge into the frozen weight what the factors cannot hold. `flora` merges the stacked factors of
  all clients, `fedex-lora` the error of averaging, and `fed-rac-lora` the product of each round. This is exact, but the
  server sends more down. `frlora` merges the change of the averaged factors, and starts every round from the principal
  factors of the weight.
* **Personalise.** `fedsa-lora` averages A and leaves B and the head with the client, so every client has its own model.
* **Project.** `galore-avg` trains the weight itself, along a projection of its gradient that all clients share.
* **Leave it out.** `head-only` trains no adapter. It shows what the head learns alone, which is no merit of LoRA.

## A gauge for the factor that rests

`B A = (B M)(M⁻¹ A)` for every invertible M, so the basis of the factors is free to choose: it changes no weight and
costs no privacy. It does decide how much of the noise reaches the weight. Noise on B arrives as `γ N_B A` and noise on
A as `γ B N_A`, multiplied by the factor that rests, and a noisy factor grows with every round that trains it. Under
strict privacy B soon is many times as large as A, and then every step on A does more harm than good.

With `method.gauge: orthonormal`, the default of `as-lora`, `random-lora` and `ro-lora`, the server changes the basis
before each round, so that the factor that rests has orthonormal rows or columns, times `s = 1/√3` as in PEFT's
initial A:

* B will be trained: `Aᵀ = Q R`, `A ← s Qᵀ`, `B ← B Rᵀ / s`.
* A will be trained: `B = Q R`, `B ← s Q`, `A ← R A / s`.

The product stays. Noise of standard deviation `τ` in each coordinate then has the norm `γ s τ √(r d)` in the weight in
every round, with `d = d_out` for noise on B and `d = d_in` for noise on A. The rank must not exceed the dimensions of
any adapted map. Where the basis changed, both factors travel down. State that the server keeps in the old basis
(momentum, a Kalman filter, an average over rounds) is refused.

The gauge is Lorica's, not that of the papers: `method.gauge: none` is the papers' algorithm.

`method.first` says which factor is trained first. LoRA starts with a random A and B at zero, so B has to be first:
for a while, the update reads a few random directions of the layer's input. With `first: A` the roles are exchanged: B
starts with random orthonormal columns and A at zero, and the first rounds learn which directions of the input matter.
Hayou et al. (arXiv 2406.08447) found a random A the better start on average, without privacy and with both factors
trained. Under DP on the digits, it made no clear difference for `as-lora`
([results](results.md#methods-tuned-alike-on-the-digits)).

## Two methods that are not here

The Sketched Gaussian Mechanism on Matrix (SGMM, OpenReview 4xzpNtnowK) sends a random sketch `S U` of an update `U`
with `‖U‖ ≤ C`, plus noise, and claims that the noise may shrink as `1/√b` for a sketch of b rows. That holds only for
an observer who does not know S. But the server has to know S to undo the sketch, and so does every client, since all
of them use one seed. Given S, this is the Gaussian mechanism with sensitivity `C ‖S‖₂`. A Gaussian S has
`‖S‖₂ ≈ 1 + √(d/b)`, so it needs more noise, not less. A sketch of an update that is already private costs nothing, as
in `fedask`.

FedRand (arXiv 2503.07216) draws for each map whether a client sends A or B, and lets the other one stay with the
client, so that the server never sees a whole model. This is not DP. The factor that is sent was trained beside the
one that stays, so it depends on that too. The draws are no secret from an observer who knows the seed, and the
factors sent in two consecutive rounds together show the model. With noise on everything that is trained, the
guarantee is that of the noise, and hiding factors adds nothing to it.
"""

COLUMNS = """Aggregation is `exact` if the new global model is the weighted mean of the clients' models at every adapted
map. Client ranks are `any` if `lora.client_ranks` can give the clients different ranks, and `one` if the method refuses
that. Noise is linear or quadratic in the sense above. All methods use the same step, which clips the gradient of every
example. The statements about privacy therefore hold for Lorica, but not always for the code released with a paper.
"""

TRAVELS = f"""What one client receives and sends in round {ROUNDS}, the last round of a tiny run under DP: {CLIENTS}
clients, four adapted maps of 16 × 16, rank {RANK}, every method with its defaults (`fed-sb` with one round of warm-up,
which is over by then). Sizes are per adapted map, in units of one factor: A counts 1, and so does B. The head travels
with every method that shares it. A client receives what has changed since it last took part.

![What a client sends and receives in one round of each method](images/methods.png)

Some sizes depend on the setting. R has `r²` numbers, which is negligible in a wide model. Sketches and bases have
`r + 8` columns (`method.oversampling`) and count `(r + 8) / r`. The merged increments of `flora` and `fedex-lora` have
the ranks of all clients of the round, so they grow with the number of clients.
"""

COMPOSED = """These components work with any method that does not refuse them. A refused combination is an error before
the run starts. A method that refuses `server.denoise=shrinkage` also refuses `server.optimizer=fedadam`, for the same
reason. Some components exclude each other or need plain SGD; the error message says which ones and why.
"""


@cache
def traffic() -> dict[str, tuple[Sizes, Sizes]]:
    """Method -> what client 0 sent up and was sent down in the last round, by running all of it.

    Raises:
        ValueError: something travelled that is of no known kind.
    """
    found = {}
    for name in registry():
        with tempfile.TemporaryDirectory() as folder:
            run = tiny_federation(name, Path(folder), clients=CLIENTS, rank=RANK, options=OPTIONS.get(name))
            for _ in range(ROUNDS):
                before = len(run.engine.requests)
                moved = run.round()
        sites = run.server.model.sites
        unit = sum(run.server.model.tensors[site.a].nbytes for site in sites)
        up, down = Counter[str](), Counter[str]()
        for requests, replies in zip(run.engine.requests[before:], run.engine.replies[before:], strict=True):
            for key, value in replies[0].items():
                up[_kind(key)] += value.nbytes
            for key, count in _received(requests[0]):
                down[key] += count
        counted = sum(way[kind] for way in (up, down) for kind in KINDS)
        if counted != moved.bytes_up[0] + moved.bytes_down[0]:
            raise ValueError(f"{name}: something travelled that is none of {', '.join(KINDS)}")
        sent, received = ({kind: way[kind] / unit for kind in KINDS if way[kind]} for way in (up, down))
        found[name] = (sent, received)
    return found


def _received(request: Request) -> list[tuple[str, int]]:
    parts = [(_kind(name), value.nbytes) for name, value in request.tensors.items()]
    parts += [("merged increments", b.nbytes + a.nbytes) for b, a in request.increments.values()]
    if isinstance(request.work, Projection):
        parts.append(("bases", size(request.work.bases)))
    return parts


def _kind(name: str) -> str:
    """`head.weight` -> `head`, `sketch:SITE` -> `sketches`, `SITE.A` -> `A`."""
    prefix, colon, _ = name.partition(":")
    if colon:
        return "sketches" if prefix == "sketch" else prefix
    return "head" if name.startswith("head.") else name.rsplit(".", 1)[-1]


def render() -> str:
    """The whole page."""
    parts = [_linked(INTRODUCTION), "## The methods\n", COLUMNS, _methods(), "## What travels\n", _linked(TRAVELS)]
    parts += [_travelled(), "## Components that can be added\n", COMPOSED, _components(), "## Each method\n"]
    for name, method in registry().items():
        parts += [f"### `{name}`\n", _docstring(method), _refused(method)]
        if method.Options.model_fields:
            parts.append(options_table(method.Options))
    return "\n".join(part for part in parts if part)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _linked(text: str) -> str:
    """Names of methods as links to their sections."""
    return re.sub(r"`([a-z0-9-]+)`", lambda found: _link(found[1]) if found[1] in registry() else found[0], text)


def _link(name: str) -> str:
    return f"[`{name}`](#{name})"


def _methods() -> str:
    rows = []
    for name, *cells, papers in method_rows():
        links = re.sub(r"\d{4}\.\d{5}", r"[\g<0>](https://arxiv.org/abs/\g<0>)", papers)
        rows.append([_link(name), *cells, links])
    return _table(HEADINGS, rows)


def _travelled() -> str:
    rows = []
    for name, ways in traffic().items():
        cells = [cell for way in ways for cell in (f"{sum(way.values()):.2f}", _made_of(way))]
        rows.append([_link(name), *cells])
    return _table(["method", "up", "made of", "down", "made of"], rows)


def _made_of(sizes: Sizes) -> str:
    return ", ".join(f"{kind} {amount:.2f}" for kind, amount in sizes.items())


def _components() -> str:
    rows = []
    for component, (_, what) in COMPONENTS.items():
        reasons: dict[str, list[str]] = {}
        for name, method in registry().items():
            if component in method.refuses:
                reasons.setdefault(method.refuses[component], []).append(_link(name))
        refusals = "<br>".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        rows.append([f"`{_spelled(component)}`", what, refusals or "none"])
    return _table(["key", "what it is", "refused by"], rows)


def _spelled(component: str) -> str:
    """The component's key, with its value where other values of the key are other components, or none."""
    if component == "frozen_head":
        return "model.head=freeze"
    key = COMPONENTS[component][0]
    return key if [key for key, _ in COMPONENTS.values()].count(key) == 1 else f"{key}={component}"


def _refused(method: type[Method]) -> str:
    reasons: dict[str, list[str]] = {}
    for component, reason in method.refuses.items():
        reasons.setdefault(reason, []).append(f"`{_spelled(component)}`")
    return "".join(f"* Refuses {', '.join(components)}: {reason}.\n" for reason, components in reasons.items())


def _docstring(method: type[Method]) -> str:
    """The docstring with a paragraph for each of its labelled lines; everything else is Markdown as it is."""
    labels = "Idea|Travels|DP|Where the released code differs"
    text = re.sub(rf"^({labels}): ", r"\n**\1:** ", inspect.getdoc(method) or "", flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def draw(sizes: Mapping[str, tuple[Sizes, Sizes]]) -> Figure:
    """A row a method; what a client sends on the left, what it receives on the right, on one scale."""
    row, left, right, top, bottom, between = 0.27, 1.12, 0.35, 0.62, 0.5, 0.55
    height = row * len(sizes)
    longest = [max(sum(ways[side].values()) for ways in sizes.values()) + 0.7 for side in (0, 1)]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, height + top + bottom))
        total = figure.get_size_inches()[1]
        inch = (WIDTH - left - right - between) / sum(longest)
        start = left
        for side, title in ((0, "Up: what a client sends"), (1, "Down: what it receives")):
            width = inch * longest[side]
            panel = figure.add_axes((start / WIDTH, bottom / total, width / WIDTH, height / total))
            start += width + between
            for place, ways in enumerate(sizes.values()):
                reached = 0.0
                for kind, colour in KINDS.items():
                    amount = ways[side].get(kind, 0.0)
                    panel.barh(place, amount, 0.7, reached, color=colour, edgecolor="white", linewidth=0.7)
                    reached += amount
                panel.annotate(
                    f"{reached:.2g}",
                    (reached, place),
                    (4, 0),
                    textcoords="offset points",
                    va="center_baseline",
                    fontsize=9,
                )
            panel.set_xlim(0, longest[side])
            panel.set_ylim(len(sizes) - 0.4, -0.6)
            panel.set_title(title, loc="left", fontsize=9.5, color=INK, pad=5)
            panel.xaxis.set_major_locator(MultipleLocator(1))
            panel.grid(axis="x")
            panel.set_yticks(range(len(sizes)), list(sizes) if side == 0 else [])
            panel.tick_params(axis="y", labelcolor=INK)
        figure.text(left / WIDTH, 0.12 / total, "Size per adapted map, in factors (A = B = 1)", color=MUTED, fontsize=9)
        figure.legend(
            handles=[Patch(color=colour, label=kind) for kind, colour in KINDS.items()],
            loc="upper left",
            bbox_to_anchor=(left / WIDTH, 1 - 0.06 / total),
            ncols=len(KINDS),
            frameon=False,
            fontsize=9,
            borderpad=0,
            borderaxespad=0,
            handlelength=1,
            handleheight=1,
            columnspacing=1.6,
        )
    return figure


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    draw(traffic()).savefig(FIGURE, dpi=160, metadata={"Software": None})
