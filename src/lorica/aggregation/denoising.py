"""The configured denoiser of the mean update."""

from __future__ import annotations

from lorica.aggregation.kalman import KalmanFilter
from lorica.aggregation.shrinkage import Shrinkage
from lorica.config import ServerConfig

Denoiser = Shrinkage | KalmanFilter


def make_denoiser(config: ServerConfig) -> Denoiser | None:
    """The configured denoiser; None if there is none."""
    if config.denoise == "shrinkage":
        return Shrinkage()
    return KalmanFilter() if config.denoise == "kalman" else None
