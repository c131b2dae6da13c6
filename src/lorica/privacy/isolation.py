"""Check on public examples that a model does not mix the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorica.errors import UserError
from lorica.privacy.gradients import RowsError, TrainedTensor, per_example_gradients
from lorica.tasks.records import Batch

# In batches of the same shape, each example goes through the same operations. Rounding differs only if shapes depend on
# the content (routing to experts).
SAME_SHAPE = 1e-4
# A tensor's gradient may be a difference of large terms. Clipping uses the norm over all tensors, so rounding errors
# are compared with that norm.
ROUNDING = 1e-5
OUTLIER_SCALE = 1e3


def check_isolation(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    trained: Mapping[str, TrainedTensor],
    batch: Batch,
    tolerance: float,
    base: str,
) -> None:
    """Check that no example's gradient depends on the other examples of a batch.

    If a model mixes examples, or does not put them along the first dimension, clipping would silently be wrong: the
    bound C would hold for gradients that other examples have already moved. Such a model is refused before any budget
    is spent. Every `B` should be non-zero, otherwise the gradients of `A` are zero and the check proves nothing.

    Each comparison runs in evaluation and in training mode, with the same random numbers:

    * the batch against itself with its first, and with its last, example replaced by an outlier (pixels scaled by
      1,000, one extreme token in all places, another label): all other gradients must be unchanged;
    * the batch against a batch of the same shape that contains only one example's rows: its gradient must be unchanged;
    * in evaluation mode, an example in the batch against the example alone, since mixing may depend on the number of
      examples. Batches of different shapes round differently, so a bf16 base is converted to fp32 for this comparison.
      It is not done in training mode, where dropout depends on the place in the batch.

    The model's mode and weights are restored.

    Args:
        batch: at least two public examples; use the batch size of training, since a model may mix only large batches.
        tolerance: largest allowed `‖difference‖ / ‖gradient‖` between a batch and an example alone.
        base: `model.base`, which an error names.

    Raises:
        UserError: the model fails on the batch; or names the tensor whose gradient differs, or whose module's rows
            cannot be split by example.
    """
    mode = model.training
    ends = sorted({0, len(batch) - 1})
    try:
        for training in (False, True):
            model.train(training)
            together = _gradients(model, losses, trained, batch, base)
            for index in ends:
                disturbed = _gradients(model, losses, trained, _with_outlier(batch, index), base)
                for other in range(len(batch)):
                    if other != index:
                        _compare(together, other, disturbed, other, SAME_SHAPE)
                filled = _gradients(model, losses, trained, _filled(batch, index), base)
                _compare(together, index, filled, index, SAME_SHAPE)
        model.eval()
        with _in_fp32(model):
            together = _gradients(model, losses, trained, batch, base)
            for index in sorted({*ends, len(batch) // 2}):
                _compare(together, index, _gradients(model, losses, trained, batch.example(index), base), 0, tolerance)
    finally:
        model.train(mode)


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Convert bf16 and fp16 weights to fp32 within the context, and restore them exactly."""
    halves = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype.itemsize == 2]
    halves = [tensor for tensor in halves if tensor.is_floating_point()]
    kinds = [tensor.dtype for tensor in halves]
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, kind in zip(halves, kinds, strict=True):
            tensor.data = tensor.data.to(kind)


def _gradients(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    trained: Mapping[str, TrainedTensor],
    batch: Batch,
    base: str,
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
        # Whatever a model stumbles over, such as images of another size than its own.
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                "model.base",
                base,
                f"it fails on public examples ({words})",
                "use a base model whose settings (image size, positions, token types) fit its weights and its data",
            ) from error


def _rows_of(batch: Batch, index: int) -> Tensor:
    """(rows,) bool: whether each row belongs to the example `index`."""
    places = torch.arange(len(batch.labels), device=batch.labels.device)
    return (places if batch.example_of_row is None else batch.example_of_row) == index


def _filled(batch: Batch, index: int) -> Batch:
    """A batch of the same shape, with the rows of one example in their places and repeated in all other places."""
    is_own = _rows_of(batch, index)
    places = torch.arange(len(is_own), device=is_own.device)
    own = places[is_own]
    rows = torch.where(is_own, places, own[places % len(own)])
    inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
    return replace(batch, inputs=inputs, labels=batch.labels[rows])


def _with_outlier(batch: Batch, index: int) -> Batch:
    """The batch with one example replaced by an outlier of the same shape and with the same padding."""
    own = _rows_of(batch, index)
    inputs = {name: tensor.clone() for name, tensor in batch.inputs.items()}
    labels = batch.labels.clone()
    for name, tensor in inputs.items():
        if tensor.is_floating_point():
            tensor[own] = OUTLIER_SCALE * (1 + tensor[own])
        elif name == "input_ids":
            # The same token everywhere, so that a router sends all of them to one expert.
            tensor[own] = torch.where(inputs["attention_mask"][own] > 0, tensor.max(), tensor[own])
    if labels.is_floating_point():
        labels[own] = OUTLIER_SCALE * (1 + labels[own])
    elif labels.dim() == 1:
        labels[own] = labels.flip(0)[own]
    return replace(batch, inputs=inputs, labels=labels)


def _compare(
    together: Mapping[str, Tensor], index: int, without: Mapping[str, Tensor], place: int, tolerance: float
) -> None:
    whole = torch.stack([torch.linalg.vector_norm(gradients[place]) for gradients in without.values()]).norm()
    for name, gradients in without.items():
        difference = torch.linalg.vector_norm(together[name][index] - gradients[place])
        if not difference <= tolerance * torch.linalg.vector_norm(gradients[place]) + ROUNDING * whole:
            raise UserError(
                "model.base",
                name,
                "an example's gradient depends on the other examples, so records cannot be clipped separately",
                "use another model, or remove this module from lora.target_modules",
            )
