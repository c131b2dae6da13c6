"""Check, on public examples, that a model lets each example's gradient be told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lorica.errors import UserError
from lorica.privacy.gradients import TrainedTensor, per_example_gradients
from lorica.tasks.records import Batch


def check_isolation(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    trained: Mapping[str, TrainedTensor],
    batch: Batch,
    tolerance: float,
) -> None:
    """Compare per-example gradients of a batch with those of each of its examples alone.

    A model that mixes examples, or lays its rows out otherwise than examples first, would be clipped wrongly without a
    word; here it is refused before any budget is spent. Every `B` should be non-zero, or the check of `A` is empty.

    Args:
        batch: public examples, at least two.
        tolerance: largest allowed `‖difference‖ / ‖gradient‖`.

    Raises:
        UserError: names the tensor whose gradient differs.
    """
    together = per_example_gradients(lambda: losses(model, batch), trained, len(batch), batch.owners)
    for index in range(len(batch)):
        one = batch.example(index)
        alone = per_example_gradients(lambda one=one: losses(model, one), trained, 1, one.owners)  # type: ignore[misc]
        for name, gradient in alone.items():
            difference = torch.linalg.vector_norm(together[name][index] - gradient[0])
            if not difference <= tolerance * torch.linalg.vector_norm(gradient) + 1e-6:
                raise UserError(
                    "model.base",
                    name,
                    "an example's gradient depends on the examples beside it, so records cannot be clipped one by one",
                    "use another model, or leave this module out of lora.target_modules",
                )
