"""Server optimisers, from the mean update of a round to the step of the global tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.aggregation.memory import Memory
from lorica.config import ServerConfig


class ServerAverage(Memory):
    """`θ ← θ + η D` with the mean update `D = Σ_k w_k U_k`; FedAvg at `η = 1`. McMahan et al., arXiv 1602.05629."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = rate

    def step(self, mean: Mapping[str, Tensor], noise: Mapping[str, float], round_number: int) -> dict[str, Tensor]:
        """The step of each tensor."""
        return {name: self._rate * value for name, value in mean.items()}


class FedAvgM(Memory):
    """Momentum on the mean update of each tensor: `m ← β^s m + D`, `θ ← θ + η m`. Hsu et al., arXiv 1909.06335.

    `s` is the number of rounds since the tensor was last trained, and 1 if it is trained in every round: the momentum
    of a factor becomes stale while the other factor is trained.
    """

    def __init__(self, rate: float, momentum: float) -> None:
        super().__init__()
        self._rate, self._momentum = rate, momentum

    def step(self, mean: Mapping[str, Tensor], noise: Mapping[str, float], round_number: int) -> dict[str, Tensor]:
        """The step of each tensor."""
        for name, value in mean.items():
            if name in self.tensors:
                age = round_number - self.numbers[name]
                value = self._momentum**age * self.tensors[name] + value
            self.tensors[name], self.numbers[name] = value, round_number
        return {name: self._rate * self.tensors[name] for name in mean}


class FedAdam(Memory):
    """Adam on the mean update, with the known noise variance subtracted from the second moment.

    `m ← β₁ m + (1-β₁) D`, `s ← β₂ s + (1-β₂) (D² - v)`, `θ ← θ + η m / (√max(s, 0) + ε)`, where `v` is the variance of
    the DP noise in each coordinate of `D`. Without this correction `√s` would be dominated by the noise, equal for all
    coordinates, and Adam would not adapt. Moments change only in rounds in which the tensor is trained. Reddi et al.,
    arXiv 2003.00295, Algorithm 2; correction of Tang et al., arXiv 2312.14334, for DP-Adam, applied on the server.
    """

    def __init__(self, rate: float, first_decay: float, second_decay: float, epsilon: float) -> None:
        super().__init__()
        self._rate, self._first, self._second, self._epsilon = rate, first_decay, second_decay, epsilon

    def step(self, mean: Mapping[str, Tensor], noise: Mapping[str, float], round_number: int) -> dict[str, Tensor]:
        """The step of each tensor. `noise` is name -> `v`."""
        steps = {}
        for name, value in mean.items():
            first = self.tensors.get(f"first:{name}", torch.zeros_like(value))
            second = self.tensors.get(f"second:{name}", torch.zeros_like(value))
            first = self._first * first + (1 - self._first) * value
            second = self._second * second + (1 - self._second) * (value.square() - noise[name])
            self.tensors[f"first:{name}"], self.tensors[f"second:{name}"] = first, second
            steps[name] = self._rate * first / (second.clamp(min=0).sqrt() + self._epsilon)
        return steps


ServerOptimizer = ServerAverage | FedAvgM | FedAdam


def make_server_optimizer(config: ServerConfig) -> ServerOptimizer:
    """The configured server optimiser."""
    if config.optimizer == "fedavgm":
        return FedAvgM(config.lr, config.momentum)
    if config.optimizer == "fedadam":
        return FedAdam(config.lr, config.momentum, config.second_momentum, config.epsilon)
    return ServerAverage(config.lr)
