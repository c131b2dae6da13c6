"""Norms of per-example gradients of B, of A and of the head, and the share that the clip norm cuts.

    python benchmarks/gradient_norms.py examples/sst2-minilm.yaml privacy.clip_norm=0.1
    python benchmarks/gradient_norms.py examples/sst2-minilm.yaml --after 5 --after 10

They are measured before the first round, and with `--after` along a run of the experiment. The norms are not private:
this is for public data, to choose a clip norm for a benchmark.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from lorica.adapters.names import is_a, is_b
from lorica.config import load
from lorica.engines.local import prepare_local
from lorica.methods.gauge import GaugeOptions, start_with
from lorica.privacy.gradients import per_example_gradients
from lorica.run.rounds import train
from lorica.run.setup import Prepared

TOKENS, ROWS = 4096, 64
console = Console()
Norms = dict[str, np.ndarray]


def main(
    experiment: Annotated[Path | None, typer.Argument(help="By default the embedded digits.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    records: Annotated[int, typer.Option(help="Number of training records.")] = 256,
    after: Annotated[list[int] | None, typer.Option(help="Run the experiment, and measure after this round.")] = None,
) -> None:
    moments = after or []
    with TemporaryDirectory() as folder:
        own = [f"output={folder}", f"privacy.ledger={folder}/ledger.sqlite", "privacy.noise=reproducible"]
        config = load(experiment, [*(overrides or []), *own])
        if max(moments, default=0) > config.federation.rounds:
            raise typer.BadParameter(
                f"the run has {config.federation.rounds} rounds; set federation.rounds", param_hint="--after"
            )
        prepared, engine = prepare_local(config)
        clip_norm = config.privacy.clip_norm
        table = Table("after round", "trained", "10 %", "median", "90 %", f"above {clip_norm:g}")
        left: list[tuple[int, float, float]] = []

        def add(moment: int, trained: str, norms: np.ndarray) -> None:
            quantiles = np.quantile(norms, [0.1, 0.5, 0.9])
            share = f"{100 * np.mean(norms > clip_norm):.0f} %"
            table.add_row(str(moment), trained, *(f"{value:.3g}" for value in quantiles), share)

        def on_round(row: dict[str, Any]) -> None:
            if row["round"] in moments:
                norms = gradient_norms(prepared, records)
                for trained in combinations(norms):
                    add(row["round"], trained, together(norms, trained))
                left.append((row["round"], *(kept(norms, factor, clip_norm) for factor in ("B", "A"))))

        start = dict(prepared.state.tensors)
        factors: tuple[Literal["A", "B"], ...] = ("B", "A")
        for factor in factors:
            # With this factor first, it is zero and the other one is as the method starts it.
            start_with(GaugeOptions(first=factor), prepared.state, config.seed)
            add(0, factor, gradient_norms(prepared, records)[factor])
        if moments:
            prepared.state.assign(start)
            train(prepared, engine, data={}, on_round=on_round)
    console.print(table)
    for moment, b, a in left:
        console.print(f"After round {moment}, a step on both factors keeps {b:.0%} of B's part and {a:.0%} of A's.")


def gradient_norms(prepared: Prepared, count: int) -> Norms:
    """The norm of each record's gradient over all factors A, over all factors B and over a trained head, `(count,)`."""
    model, records, state = prepared.model, prepared.task.train, prepared.state
    model.merge(state.merged)
    model.write(state.tensors)
    kinds = {
        "A": [name for name in model.tensors if is_a(name)],
        "B": [name for name in model.tensors if is_b(name)],
        "head": state.head,
    }
    trained = {name: model.tensors[name] for names in kinds.values() for name in names}
    indices = np.random.default_rng(prepared.config.seed).choice(len(records), min(count, len(records)), replace=False)
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind, names in kinds.items() if names}
    for part in records.micro_batch_indices(indices, TOKENS, ROWS):
        batch = records.batch(part)
        losses = partial(model.losses, model.peft_model, batch)
        gradients = per_example_gradients(losses, trained, len(batch), batch.example_of_row)
        for kind, norms in found.items():
            norms.append(torch.cat([gradients[name].flatten(1) for name in kinds[kind]], dim=1).norm(dim=1))
    return {kind: torch.cat(norms).numpy() for kind, norms in found.items()}


def combinations(norms: Norms) -> list[str]:
    """What a step may train."""
    factors = ["B", "A", "B, A"]
    return [*factors, "head", *(f"{trained}, head" for trained in factors)] if "head" in norms else factors


def together(norms: Norms, trained: str) -> np.ndarray:
    """The norm over everything that a step trains, which is what the clip norm bounds."""
    total: np.ndarray = np.sqrt(sum(norms[kind] ** 2 for kind in trained.split(", ")))
    return total


def kept(norms: Norms, factor: Literal["A", "B"], clip_norm: float) -> float:
    """What a step on both factors keeps of one factor's clipped gradients.

    `Σ_i ‖g_F‖ min(1, C/‖g_BA‖) / Σ_i ‖g_F‖ min(1, C/‖g_F‖)`, for a factor F.

    The denominator is the step on that factor alone; with a trained head, `g` includes its gradient in both. Both
    factors in every round give more signal to noise than one in turn if this is above `1/√2`: two steps of `κ` have
    `√2 κ` times the signal to noise of one step of 1.
    """
    head = ", head" * ("head" in norms)
    both, alone = together(norms, "B, A" + head), together(norms, factor + head)
    scale = [np.minimum(1, clip_norm / np.maximum(values, 1e-30)) for values in (both, alone)]
    share: float = np.sum(norms[factor] * scale[0]) / np.sum(norms[factor] * scale[1])
    return share


if __name__ == "__main__":
    typer.run(main)
