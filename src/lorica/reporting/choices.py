"""How certain the choices of factors were: the signal-to-noise ratios in decisions.jsonl."""

from __future__ import annotations

import math
import statistics

from lorica.reporting.run_folder import Run


def median_signal_to_noise(run: Run) -> list[tuple[int, float]]:
    """Round and median signal-to-noise ratio of its choices, for the rounds that recorded any.

    The ratio of a choice is `|S_A - S_B|` over its standard deviation, `√(s_A² + s_B²)`. If the scores are pure noise,
    its median is 0.67.
    """
    found = []
    for row in run.decisions:
        ratios = [ratio for ratio in row.get("signal_to_noise", {}).values() if math.isfinite(ratio)]
        if ratios:
            found.append((int(row["round"]), statistics.median(ratios)))
    return found


def mostly_noise(run: Run) -> str | None:
    """A sentence that says so, if the median ratio is below 1 in most rounds; None otherwise."""
    ratios = [ratio for _, ratio in median_signal_to_noise(run)]
    below = sum(ratio < 1 for ratio in ratios)
    if 2 * below <= len(ratios):
        return None
    return (
        f"The ratio was below 1 in {below} of {len(ratios)} rounds: the scores were mostly noise and said little "
        "about which factor to train."
    )
