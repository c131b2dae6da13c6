"""A model whose gradients are known in closed form, and canaries whose gradients are orthogonal.

Two linear maps `y = (W0 + γ B A) x` with LoRA factors and a linear head, side by side. Canary `j` has the input
`x = s e_j` and the loss `Σ_sites y_j + logit_c`, with `c = j mod 2`. Its gradients, `e_j` being a unit vector,

    ∂/∂B = γ s e_j (A e_j)ᵀ,   ∂/∂A = γ s (Bᵀ e_j) e_jᵀ,   ∂/∂R = γ s (Bᵀ e_j) (A e_j)ᵀ,   ∂/∂W_head = h e_c e_jᵀ

occupy a row of each B and a column of each A and of the head that no other canary touches. Only R and the head's bias,
a small part of the gradient, are shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorica.adapters.adapted import HEAD_BIAS, HEAD_WEIGHT, AdaptedModel, adapt
from lorica.adapters.base_model import BaseModel
from lorica.adapters.names import factor_a, factor_b, is_a, is_b, is_middle, middle, site_of
from lorica.adapters.sites import Site
from lorica.config import LoraSection, ModelConfig
from lorica.tasks.classification import Classification
from lorica.tasks.records import Batch, digest, stack_digests
from lorica.testing.records import TinyRecords

RANK, CLASSES, SITES = 2, 2, 2
# Every canary's gradient is far above any clip norm, with about equal parts in the factors and in the head.
SIZE, HEAD_SIZE = 1000.0, 40.0


class LinearModel(nn.Module):
    """Takes the position of each canary's unit vector, `(n, width)`, and gives the sum of its maps and the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"q_proj": nn.Linear(width, width, bias=False)}) for _ in range(SITES)]
        )
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, units: Tensor) -> Any:
        maps: Any = self.layers
        outputs = sum(layer["q_proj"](SIZE * units) for layer in maps)
        return SimpleNamespace(outputs=outputs, logits=self.classifier(HEAD_SIZE * units))


class LinearLoss(Classification):
    """`y_j + logit_c` of canary `j`."""

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        rows, positions = torch.arange(len(batch.labels)), batch.labels
        return batch.by_example(outputs.outputs[rows, positions] + outputs.logits[rows, positions % CLASSES])


def linear_model(width: int, seed: int) -> AdaptedModel:
    """The model with LoRA in place, on the CPU."""
    torch.manual_seed(seed)
    base = BaseModel(LinearModel(width).eval().requires_grad_(False), "classifier", True, [])
    lora = LoraSection(r=RANK, lora_alpha=4, target_modules=["q_proj"])
    return adapt(base, lora, ModelConfig(base="linear"), seed, torch.device("cpu"), LinearLoss())


@dataclass(frozen=True)
class Gradients:
    """The gradients of canaries in closed form.

    Attributes:
        sites: of the model.
        positions: (n,), the unit vector of each canary.
        width: number of unit vectors.
    """

    sites: list[Site]
    positions: np.ndarray
    width: int

    def records(self, owner: int) -> TinyRecords:
        """The canaries as records; those of different owners have different digests."""
        units = torch.eye(self.width)[torch.from_numpy(self.positions)]
        names = [digest([owner.to_bytes(4, "little"), int(one).to_bytes(4, "little")]) for one in self.positions]
        return TinyRecords(self.positions.astype(np.int64), stack_digests(names), {"units": units})

    def at(self, values: Mapping[str, Tensor], trained: list[str]) -> dict[str, Tensor]:
        """Name -> `(n, *shape)`, fp64: the gradient of each canary.

        Args:
            values: the adapter's tensors; those of a smaller rank give gradients of that rank.
        """
        return {name: self._of(name, values) for name in trained}

    def _of(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        n, positions = len(self.positions), torch.from_numpy(self.positions)
        rows = torch.arange(n)
        if name in (HEAD_WEIGHT, HEAD_BIAS):
            found = torch.zeros(n, *values[name].shape, dtype=torch.float64)
            place = (rows, positions % CLASSES)
            found[(*place, positions) if name == HEAD_WEIGHT else place] = HEAD_SIZE if name == HEAD_WEIGHT else 1.0
            return found
        site = next(site for site in self.sites if site.name == site_of(name))
        a, b = values[factor_a(site.name)].double(), values[factor_b(site.name)].double()
        between = values.get(middle(site.name))
        size = SIZE * site.scale
        columns = size * a.T[positions]
        if is_b(name):
            found = torch.zeros(n, *b.shape, dtype=torch.float64)
            found[rows, positions] = columns
            return found
        if is_a(name):
            whole = b if between is None else b @ between.double()
            found = torch.zeros(n, *a.shape, dtype=torch.float64)
            found[rows, :, positions] = size * whole[positions]
            return found
        assert is_middle(name)
        return b[positions][:, :, None] * columns[:, None, :]
