"""Averaging of the model over rounds, for evaluation and export."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorica.aggregation.memory import Memory


class RoundAverage(Memory):
    """`θ̄_t = Σ_i β^{t-i} θ_i / Σ_i β^{t-i}` over the finished rounds `i ≤ t`, separately for each tensor.

    Training continues from `θ_t`; only evaluation and export use `θ̄_t`, in which the noise is averaged. The average is
    exact if only one factor of a site is trained. If both are trained, the product of the averages differs from the
    average of the products by terms of second order. De et al., arXiv 2204.13650, section 3.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._decay = decay
        self.numbers = {"weight": 0.0}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Include the model after a round in the average."""
        weight = self._decay * self.numbers["weight"] + 1
        self.numbers["weight"] = weight
        for name, value in values.items():
            before = self.tensors.get(name, value)
            self.tensors[name] = before + (value - before) / weight
