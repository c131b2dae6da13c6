"""Check on public examples that a model does not mix the examples of a batch."""

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
    """Compare per-example gradients in a batch with the gradients of each example without the others.

    If a model mixes examples, or does not put them along the first dimension, clipping would silently be wrong. Such a
    model is refused before any budget is spent. Every `B` should be non-zero, otherwise the gradients of `A` are zero
    and the check proves nothing.

    In evaluation mode, each example is compared with itself alone. Some models mix examples only in training mode
    (batch normalisation), and dropout depends on the position in the batch. In training mode, each example is therefore
    compared with itself at the same position of a batch of the same shape that contains only its own rows, with the
    same random numbers. The model's mode is restored.

    Args:
        batch: at least two public examples.
        tolerance: largest allowed `‖difference‖ / ‖gradient‖`.

    Raises:
        UserError: names the tensor whose gradient differs, or whose module's rows cannot be split by example.
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
    """Per-example gradients, with the same random numbers in every call."""
    device = batch.labels.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            return per_example_gradients(lambda: losses(model, batch), trained, len(batch), batch.example_of_row)
        except RowsError as error:
            raise UserError(
                "model.base",
                error.name,
                f"records cannot be clipped separately: {error}",
                "use another model, or remove this module from lora.target_modules",
            ) from None


def _filled(batch: Batch, index: int) -> Batch:
    """A batch of the same shape, with the rows of one example in their places and repeated in all other places."""
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
                "an example's gradient depends on the other examples, so records cannot be clipped separately",
                "use another model, or remove this module from lora.target_modules",
            )
