"""Averaging of the model over rounds, for evaluation and export."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorica.aggregation.memory import Memory


class RoundAverage(Memory):
    """`θ̄_t = Σ_i β^{t-i} θ_i / Σ_i β^{t-i}` over the finished rounds `i ≤ t`, of every tensor by itself.

    Training goes on from `θ_t`; only evaluation and export take `θ̄_t`, whose noise is averaged out. Exact for a factor
    that is trained alone; where both move, the product of averages is not the average of products, to second order in
    what moved. De et al., arXiv 2204.13650, section 3.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._decay = decay
        self.numbers = {"weight": 0.0}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Take in the model after a round."""
        weight = self._decay * self.numbers["weight"] + 1
        self.numbers["weight"] = weight
        for name, value in values.items():
            before = self.tensors.get(name, value)
            self.tensors[name] = before + (value - before) / weight
