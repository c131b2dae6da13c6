"""Check, on public examples, that a model lets each example's gradient be told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorica.errors import UserError
from lorica.privacy.gradients import RowsError, TrainedTensor, per_example_gradients
from lorica.tasks.records import Batch


def check_isolation(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    trained: Mapping[str, TrainedTensor],
    batch: Batch,
    tolerance: float,
) -> None:
    """Compare per-example gradients of a batch with those of each of its examples without the others.

    A model that mixes examples, or lays its rows out otherwise than examples first, would be clipped wrongly without a
    word; here it is refused before any budget is spent. Every `B` should be non-zero, or the check of `A` is empty.

    In evaluation mode, each example is compared with itself alone. In training mode, where a model may mix only then
    (batch normalisation) and dropout draws for each place in the batch, it is compared with itself at the same place of
    a batch of the same shape, with its own rows in place of all others and the same draws. The model ends in the mode
    it came in.

    Args:
        batch: public examples, at least two.
        tolerance: largest allowed `‖difference‖ / ‖gradient‖`.

    Raises:
        UserError: names the tensor whose gradient differs; or a trained module sees no rows of examples at all.
    """
    mode = model.training
    try:
        model.eval()
        together = _gradients(model, losses, trained, batch)
        for index in range(len(batch)):
            alone = _gradients(model, losses, trained, batch.example(index))
            _compare(together, index, alone, 0, tolerance)
        model.train()
        together = _gradients(model, losses, trained, batch)
        for index in range(len(batch)):
            _compare(together, index, _gradients(model, losses, trained, _filled(batch, index)), index, tolerance)
    finally:
        model.train(mode)


def _gradients(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    trained: Mapping[str, TrainedTensor],
    batch: Batch,
) -> dict[str, Tensor]:
    """Per-example gradients, under the same draws in every call."""
    device = batch.labels.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            return per_example_gradients(lambda: losses(model, batch), trained, len(batch), batch.example_of_row)
        except RowsError as error:
            raise UserError(
                "model.base",
                error.name,
                f"records cannot be clipped one by one: {error}",
                "use another model, or leave this module out of lora.target_modules",
            ) from None


def _filled(batch: Batch, index: int) -> Batch:
    """A batch of the same shape, with an example's rows where they were and again in place of all others."""
    places = torch.arange(len(batch.labels), device=batch.labels.device)
    is_own = (places if batch.example_of_row is None else batch.example_of_row) == index
    own = places[is_own]
    rows = torch.where(is_own, places, own[places % len(own)])
    inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
    return replace(batch, inputs=inputs, labels=batch.labels[rows])


def _compare(
    together: Mapping[str, Tensor], index: int, without: Mapping[str, Tensor], place: int, tolerance: float
) -> None:
    for name, gradients in without.items():
        difference = torch.linalg.vector_norm(together[name][index] - gradients[place])
        if not difference <= tolerance * torch.linalg.vector_norm(gradients[place]) + 1e-6:
            raise UserError(
                "model.base",
                name,
                "an example's gradient depends on the examples beside it, so records cannot be clipped one by one",
                "use another model, or leave this module out of lora.target_modules",
            )
