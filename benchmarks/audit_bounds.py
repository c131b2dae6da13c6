"""What lower bounds on ε can reach: the estimators alone, on a claim that is tight.

One step of the Gaussian mechanism on all canaries has the claimed ε exactly, and independent scores `N(0, 1)` and
`N(1/σ, 1)` are the best that an attack could get from it. So what a bound lacks of the claim here, no attack can add.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import brentq
from scipy.stats import norm

from lorica.audit.estimators import (
    CONFIDENCE,
    Guesses,
    Plan,
    Scores,
    best_plans,
    fdp_bound,
    fdp_refutes,
    one_run_bound,
    trade_off_inverse,
)
from lorica.privacy.accounting import Steps, epsilon

SIZES = [int(30 * 2 ** (power / 2)) for power in range(14)]
"""Numbers of guesses that are compared."""


def main(
    claims: Annotated[str, typer.Option()] = "1,3,8",
    canaries: Annotated[str, typer.Option()] = "4000,15000",
    runs: Annotated[int, typer.Option()] = 20,
    delta: Annotated[float, typer.Option()] = 1e-5,
    confidence: Annotated[float, typer.Option()] = CONFIDENCE,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Print the mean and the standard deviation of both bounds over runs, and the largest f-DP bounds of all plans.

    `typical` is the f-DP bound of scores that fall as expected, by the number of guesses that gives the largest one:
    one-sided guesses are "included" only, two-sided ones are of both kinds.
    """
    table = Table("claim", "canaries", "ε, one run", "ε, f-DP", "typical, one-sided", "typical, two-sided")
    cases = [(float(claim), int(count)) for claim in claims.split(",") for count in canaries.split(",")]
    draws = np.random.default_rng(seed)
    for claim, count in cases:
        steps = Steps(1.0, brentq(lambda s, claim=claim: epsilon([Steps(1.0, s, 1)], delta) - claim, 0.2, 50), 1)
        for_one_run, for_fdp = best_plans(count, steps, delta)
        found = []
        for _ in track(range(runs), f"ε = {claim:g}, {count:,} canaries", console=Console(stderr=True)):
            included = draws.random(count) < 0.5
            scores = Scores(included / steps.noise_multiplier + draws.standard_normal(count), included)
            found.append(
                (
                    one_run_bound(scores, delta, for_one_run, confidence),
                    fdp_bound(scores, steps, delta, for_fdp, confidence),
                )
            )
        means, deviations = np.mean(found, axis=0), np.std(found, axis=0)
        cells = [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in zip(means, deviations, strict=True)]
        table.add_row(
            f"{claim:g}", f"{count:,}", *cells, *(_typical(count, steps, delta, low, confidence) for low in (0, 1))
        )
    Console().print(table)


def _typical(canaries: int, steps: Steps, delta: float, low: int, confidence: float) -> str:
    """The largest f-DP bound of expected scores, and the number of guesses that gives it.

    Args:
        low: whether as many canaries are guessed to be left out as are guessed to be included.
    """
    bounds = []
    for size in SIZES:
        made = size * (1 + low)
        if made <= canaries:
            guesses = _expected(canaries, Plan(size, low * size), steps)
            bounds.append((_bound(canaries, guesses, steps, delta, confidence), made))
    bound, made = max(bounds)
    return f"{bound:.2f} by {made} guesses"


def _expected(canaries: int, plan: Plan, steps: Steps) -> Guesses:
    """By a threshold `t`, whose share of false positives is `Φ(-t)`, and of true ones `Φ(1/σ - t)`."""
    mean, share = 1 / steps.noise_multiplier, 2 * plan.high / canaries
    threshold = brentq(lambda t: norm.sf(t) + norm.cdf(mean - t) - share, -9.0, 9.0 + mean)
    return Guesses(plan.made, round(plan.made * norm.cdf(mean - threshold) / share))


def _bound(canaries: int, guesses: Guesses, steps: Steps, delta: float, confidence: float) -> float:
    """The ε of the largest noise multiplier that these guesses refute, without a correction for several plans."""

    def noisier(logarithm: float) -> Steps:
        return replace(steps, noise_multiplier=steps.noise_multiplier * math.exp(logarithm))

    low, high = 0.0, math.log(32)
    while high - low > 0.005:
        middle = (low + high) / 2
        refuted = fdp_refutes(canaries, guesses, trade_off_inverse(noisier(middle)), 1 - confidence)
        low, high = (low, middle) if refuted else (middle, high)
    return epsilon([noisier(high)], delta)


if __name__ == "__main__":
    typer.run(main)
