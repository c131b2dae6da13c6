"""Norms of per-example gradients of B and of A before the first round, and the share that the clip norm cuts.

    python benchmarks/gradient_norms.py examples/sst2-minilm.yaml privacy.clip_norm=0.1

The norms are not private: this is for public data, to choose a clip norm for a benchmark.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lorica.adapters.base_files import resolve_base
from lorica.adapters.names import is_a, is_b
from lorica.config import load
from lorica.methods.gauge import GaugeOptions, start_with
from lorica.privacy.gradients import per_example_gradients
from lorica.run.setup import Prepared, prepare
from lorica.tasks.loading import load_task

TOKENS, ROWS = 4096, 64
console = Console()


def main(
    experiment: Annotated[Path | None, typer.Argument(help="By default the embedded digits.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    records: Annotated[int, typer.Option(help="Number of training records.")] = 256,
) -> None:
    config = load(experiment, [*(overrides or []), "privacy.noise=reproducible"])
    prepared = prepare(config, load_task(config.task, resolve_base(config.model.base)))
    clip_norm = config.privacy.clip_norm
    table = Table("trained", "10 %", "median", "90 %", f"above {clip_norm:g}")
    factors: tuple[Literal["A", "B"], ...] = ("B", "A")
    for factor in factors:
        # With this factor first, it is zero and the other one is as the method starts it.
        start_with(GaugeOptions(first=factor), prepared.state, config.seed)
        prepared.model.write(prepared.state.tensors)
        norms = gradient_norms(prepared, factor, records)
        quantiles = np.quantile(norms, [0.1, 0.5, 0.9])
        table.add_row(factor, *(f"{value:.3g}" for value in quantiles), f"{100 * np.mean(norms > clip_norm):.0f} %")
    console.print(table)


def gradient_norms(prepared: Prepared, factor: str, count: int) -> np.ndarray:
    """The norm of each record's gradient over all factors of one kind, `(count,)`."""
    model, records = prepared.model, prepared.task.train
    chosen = is_a if factor == "A" else is_b
    trained = {name: tensor for name, tensor in model.tensors.items() if chosen(name)}
    indices = np.random.default_rng(prepared.config.seed).choice(len(records), min(count, len(records)), replace=False)
    found: list[Tensor] = []
    for part in records.micro_batch_indices(indices, TOKENS, ROWS):
        batch = records.batch(part)
        losses = partial(model.losses, model.peft_model, batch)
        gradients = per_example_gradients(losses, trained, len(batch), batch.example_of_row)
        found.append(torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1).norm(dim=1))
    norms: np.ndarray = torch.cat(found).numpy()
    return norms


if __name__ == "__main__":
    typer.run(main)
