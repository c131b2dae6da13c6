"""A model that mixes examples is refused before anything is released."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorica.errors import UserError
from lorica.privacy.gradients import TrainedTensor
from lorica.privacy.isolation import check_isolation
from lorica.tasks.records import Batch
from tests.models import FAMILIES, adapted, batch


class Mixing(nn.Module):
    """Subtracts the batch's mean: harmless to look at, and each example's gradient depends on all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        return hidden - hidden.mean(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_models_pass(family: str) -> None:
    model = adapted(family)
    check_isolation(model.peft_model, model.losses, model.tensors, batch(family, 3), 1e-3)


def test_rows_of_one_example_may_hang_together() -> None:
    model, rows = adapted("bert"), batch("bert", 4)
    examples = Batch(rows.inputs, rows.labels, torch.tensor([0, 0, 0, 1]), torch.tensor([0.5, 0.2, 0.3, 1.0]))
    check_isolation(model.peft_model, model.losses, model.tensors, examples, 1e-3)


def test_a_model_that_mixes_examples_is_refused() -> None:
    model = Mixing()
    trained = {"w": TrainedTensor(model.linear, "weight")}
    examples = Batch({"x": torch.randn(3, 4)}, torch.tensor([0, 1, 2]))

    def losses(module: nn.Module, some: Batch) -> Tensor:
        return nn.functional.cross_entropy(module(**some.inputs), some.labels, reduction="none")

    for owners in (None, torch.tensor([0, 0, 1])):
        some = replace(examples, owners=owners)
        with pytest.raises(UserError, match="depends on the examples beside it"):
            check_isolation(model, lambda *args: args[1].by_example(losses(*args)), trained, some, 1e-3)
