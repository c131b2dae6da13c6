"""The table of batch sizes and numbers of steps at the same ε."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorica.errors import UserError
from lorica.privacy.planning import NEAR, least_noise, option, usual_batch_sizes


def compared_options(records: int, epsilon: float, delta: float, steps: list[int]) -> dict[str, Any]:
    """JSON-able: a row for each number of steps and batch size, with the run's noise as a multiple of the least.

    Raises:
        UserError: a number of steps is out of bounds, or no noise multiplier meets ε.
    """
    for count in steps:
        if not 1 <= count <= 10**6:
            raise UserError("--steps", count, "not between 1 and 1,000,000", "choose rounds times local steps")
    rows = []
    for count in steps:
        least = least_noise(records, count, epsilon, delta)
        for batch_size in usual_batch_sizes(records):
            one = option(records, batch_size, count, epsilon, delta)
            rows.append(
                {
                    "steps": count,
                    "batch_size": batch_size,
                    "sampling_rate": batch_size / records,
                    "noise_multiplier": one.noise_multiplier,
                    "run_noise": one.run_noise,
                    "times_least": one.run_noise / least,
                    "gradients": batch_size * count,
                }
            )
    return {"records": records, "epsilon": epsilon, "delta": delta, "options": rows}


def options_table(found: dict[str, Any]) -> Group:
    """For the terminal; of each number of steps the smallest batch that comes near the least noise is in bold."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("Steps", "Batch", "q", "σ", "Noise of the run", "Gradients"):
        table.add_column(heading, justify="right")
    marked: set[int] = set()
    for row in found["options"]:
        first = row["times_least"] <= NEAR and row["steps"] not in marked
        if first:
            marked.add(row["steps"])
        table.add_row(
            f"{row['steps']:,}",
            f"{row['batch_size']:,}",
            f"{row['sampling_rate']:.4g}",
            f"{row['noise_multiplier']:.3g}",
            f"{row['times_least']:.2f} x least",
            f"{row['gradients']:,}",
            style="bold" if first else None,
            end_section=row["batch_size"] == found["options"][-1]["batch_size"],
        )
    text = (
        f"{found['records']:,} records at ε = {found['epsilon']:g}, δ = {found['delta']:g}. Noise of the run: "
        "σ / (batch √steps), the deviation of the mean of all its gradients. A larger batch lowers it at the same ε "
        f"until it comes near the least; in bold, the smallest batch within {100 * (NEAR - 1):.0f} %. More steps alone "
        "hardly change it once it is there."
    )
    return Group(table, Text(text))
