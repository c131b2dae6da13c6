"""The noise multiplier for a target ε, by search over `lorica.privacy.accounting.epsilon`."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from lorica.errors import UserError
from lorica.files import cache_folder, read_json, write_atomically
from lorica.privacy.accounting import ACCOUNTANT, DISCRETIZATION, LEAST_NOISE, Steps, epsilon

CALIBRATION_TOLERANCE = 1e-4
# Range of calibrated noise. With less, one step on all records costs ε = 34 at δ = 1e-5; with more, no run can learn.
MOST_NOISE = 1e6
# Sampling rates at which noise is calibrated for interpolation: 2^(-j/2).
NODES_AN_OCTAVE = 2
# Relative. tests/privacy/test_calibration.py compares noise raised by it with the exact noise and the target ε.
INTERPOLATION_MARGIN = 5e-4


def calibrate(sampling_rate: float, steps: int, target_epsilon: float, delta: float) -> float:
    """The smallest noise multiplier (to 1e-4) with which `steps` steps cost at most `target_epsilon` at `delta`.

    Brent's method between two powers of two times `LEAST_NOISE`. Results are cached on disk in Lorica's cache folder,
    since a calibration takes about a second.

    Raises:
        UserError: the result would be outside `LEAST_NOISE` … `MOST_NOISE`.

    >>> noise_multiplier = calibrate(sampling_rate=0.1, steps=10, target_epsilon=3.0, delta=1e-5)
    >>> round(epsilon([Steps(0.1, noise_multiplier, 10)], delta=1e-5), 2)
    3.0
    """
    key = [sampling_rate, steps, target_epsilon, delta, DISCRETIZATION, CALIBRATION_TOLERANCE, LEAST_NOISE, ACCOUNTANT]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = cache_folder() / "noise-multipliers" / f"{name}.json"
    known = _stored(path)
    if known is not None:
        return known

    def excess(sigma: float) -> float:
        return epsilon([Steps(sampling_rate, sigma, steps)], delta) - target_epsilon

    # The noise of a Gaussian mechanism whose sensitivity is the mean number of times that a record is sampled.
    guess = sampling_rate * math.sqrt(2 * steps * math.log(1 / delta)) / target_epsilon
    low, high = _bracket(excess, target_epsilon, guess)
    noise_multiplier = float(brentq(excess, low, high, xtol=CALIBRATION_TOLERANCE))
    while excess(noise_multiplier) > 0:
        noise_multiplier += CALIBRATION_TOLERANCE
    record = asdict(Steps(sampling_rate, noise_multiplier, steps)) | {"epsilon": target_epsilon, "delta": delta}
    record["crc32"] = _checksum(path, noise_multiplier)
    write_atomically(path, json.dumps(record).encode())
    return noise_multiplier


def calibrate_many(sampling_rate: float, steps: int, target_epsilon: float, delta: float) -> float:
    """As `calibrate`, for any number of sampling rates at the cost of a few.

    `log σ` is interpolated over `log q` by the cubic through the four nearest of the rates `2^(-j/2)`, whose noise is
    calibrated, and raised by `INTERPOLATION_MARGIN`. Above `q = 2^(-1/2)`, and where a node has no noise in
    `LEAST_NOISE` … `MOST_NOISE`, it is `calibrate` itself.

    Raises:
        UserError: as `calibrate`.
    """
    place = -NODES_AN_OCTAVE * math.log2(sampling_rate)
    first = math.floor(place) - 1
    if first < 0 or place == first + 1:
        return calibrate(sampling_rate, steps, target_epsilon, delta)
    nodes = range(first, first + 4)
    try:
        values = [math.log(_calibrated_at(node, steps, target_epsilon, delta)) for node in nodes]
    except UserError:
        return calibrate(sampling_rate, steps, target_epsilon, delta)
    offset = place - first
    weights = [math.prod((offset - m) / (n - m) for m in range(4) if m != n) for n in range(4)]
    return float(np.exp(np.dot(weights, values) + INTERPOLATION_MARGIN))


@cache
def _calibrated_at(node: int, steps: int, target_epsilon: float, delta: float) -> float:
    return calibrate(2.0 ** (-node / NODES_AN_OCTAVE), steps, target_epsilon, delta)


def _checksum(path: Path, noise_multiplier: float) -> int:
    """The name of the file stands for the terms."""
    return zlib.crc32(f"{path.stem} {noise_multiplier!r}".encode())


def _stored(path: Path) -> float | None:
    """A noise multiplier from the cache; None if there is none, or if its file is damaged."""
    try:
        record = read_json(path)
        known = float(record["noise_multiplier"])
        if record["crc32"] == _checksum(path, known):
            return known
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _bracket(excess: Callable[[float], float], target_epsilon: float, guess: float) -> tuple[float, float]:
    """`σ` and `2σ` around the root of a decreasing function.

    The search starts near the guess, or at a noise whose loss distribution is small, and moves towards the root: far
    below the root, loss distributions are large.
    """
    high = LEAST_NOISE * 2.0 ** max(4, math.ceil(math.log2(guess / LEAST_NOISE)))
    while high <= MOST_NOISE and excess(high) > 0:
        high *= 2
    if high > MOST_NOISE:
        problem = f"it requires a noise multiplier above {MOST_NOISE:g}"
        raise UserError("privacy.epsilon", target_epsilon, problem, "raise privacy.epsilon")
    while high > LEAST_NOISE and excess(high / 2) <= 0:
        high /= 2
    if high <= LEAST_NOISE:
        problem = f"it allows a noise multiplier below {LEAST_NOISE:g}, which protects nothing"
        raise UserError("privacy.epsilon", target_epsilon, problem, "lower privacy.epsilon or privacy.delta")
    return high / 2, high
