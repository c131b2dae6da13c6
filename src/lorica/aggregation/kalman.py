"""A scalar Kalman filter over rounds for the aggregated update of each tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorica.aggregation.memory import Memory


class KalmanFilter(Memory):
    """Estimates the noise-free update from those of all rounds so far.

    Model of each coordinate of a tensor's update, with the same parameters for all coordinates of a tensor: the true
    update follows a random walk `u_t = u_{t-1} + N(0, q)` and is observed as `D_t = u_t + N(0, v)`, where `v` is the
    known DP variance. In each round in which the tensor is trained:

    - predict: `p ← p + s q`, with `s` the number of rounds since it was last trained;
    - gain: `κ = p / (p + v)`; `û ← û + κ (D - û)`, `p ← (1 - κ) p`;
    - learn `q` from the innovation, whose mean square is `p + s q + v`:
      `q ← 0.9 q + 0.1 max(0, ‖D - û‖²/d - p - v) / s`.

    The filter starts at `û = 0` with `p = max(0, ‖D‖²/d - v)`, the energy of the first update without its noise, so a
    first update of pure noise has no effect. Post-processing of releases with public parameters. Kalman 1960.
    """

    LEARNING = 0.1

    def step(self, mean: Mapping[str, Tensor], noise: Mapping[str, float], round_number: int) -> dict[str, Tensor]:
        """The estimate of each update."""
        estimates = {}
        for name, value in mean.items():
            variance = noise[name]
            if variance == 0:
                estimates[name] = value
                continue
            if name not in self.tensors:
                energy = max(0.0, float(value.square().mean()) - variance)
                estimate, uncertainty, drift, age = 0 * value, energy, energy, 0
            else:
                estimate = self.tensors[name]
                uncertainty, drift, last = self.numbers[name]
                age = round_number - int(last)
                innovation = float((value - estimate).square().mean())
                excess = max(0.0, innovation - uncertainty - variance) / age
                uncertainty += age * drift
                drift = (1 - self.LEARNING) * drift + self.LEARNING * excess
            gain = uncertainty / (uncertainty + variance)
            estimate = estimate + gain * (value - estimate)
            self.tensors[name], self.numbers[name] = estimate, [(1 - gain) * uncertainty, drift, round_number]
            estimates[name] = estimate
        return estimates
