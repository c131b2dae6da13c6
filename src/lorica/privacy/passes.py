"""The clipped gradients of a batch, pass after pass, within the device's memory."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lorica.errors import UserError
from lorica.privacy.clipping import clipped_sum
from lorica.privacy.gradients import TrainedTensor, per_example_gradients

if TYPE_CHECKING:
    from lorica.tasks.records import Batch, Records

GRADIENT_BYTES = 2**30
"""Maximum size of the per-example gradients of a pass."""
logger = logging.getLogger(__name__)


def clipped_batch(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    trained: Mapping[str, TrainedTensor],
    records: Records,
    indices: np.ndarray,
    clip_norm: float,
    tokens: int,
) -> dict[str, Tensor]:
    """`Σ_{i∈S} clip_C(g_i)` over the records at `indices`, in passes that fit into memory.

    A pass has at most `tokens` padded tokens. It has at most so many rows that their gradients, of 4 bytes for each
    value of a trained parameter, take `GRADIENT_BYTES`. A single record may exceed both.

    If the device runs out of memory, the budget is halved until the failed pass exceeds it. That pass and those after
    it are cut again. What a failed pass computed is dropped, so each record contributes exactly once, and the sum is
    that of smaller passes. Dropout masks are drawn anew.

    Returns:
        name -> `(*shape)`, fp64, on the model's device. Zero for no records, without running the model.

    Raises:
        UserError: a single record does not fit into the device's memory.
    """
    device = next(model.parameters()).device
    total = {name: tensor.zeros(1)[0].double() for name, tensor in trained.items()}
    rows = max(1, GRADIENT_BYTES // max(1, _gradient_bytes(trained)))
    passes = deque(records.micro_batch_indices(indices, tokens, rows))
    while passes:
        found = _clipped_pass(model, losses, trained, records.batch(passes[0]), clip_norm, device)
        if found is not None:
            passes.popleft()
            for name, value in found.items():
                total[name] += value
            continue
        if len(passes[0]) == 1:
            raise UserError(
                "model.device",
                str(device),
                "a single record does not fit into its memory",
                "set model.gradient_checkpointing=true or model.precision=bf16, or shorten the records",
            )
        tokens = _halved(tokens, records, passes[0])
        logger.warning("out of memory: a pass now has at most %d tokens (federation.micro_batch_tokens)", tokens)
        passes = deque(records.micro_batch_indices(np.concatenate(passes), tokens, rows))
    return total


def _clipped_pass(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch], Tensor],
    trained: Mapping[str, TrainedTensor],
    batch: Batch,
    clip_norm: float,
    device: torch.device,
) -> dict[str, Tensor] | None:
    """The clipped sum of one pass; None if the device is out of memory."""
    # Counted before the batch is moved: a number from a GPU would have to be waited for.
    examples = len(batch)
    try:
        moved = batch.to(device)
        gradients = per_example_gradients(lambda: losses(model, moved), trained, examples, moved.example_of_row)
        return clipped_sum(gradients, clip_norm)
    except torch.OutOfMemoryError:
        # The caller goes on after the error is gone: it holds on to all tensors of the pass.
        return None


def _gradient_bytes(trained: Mapping[str, TrainedTensor]) -> int:
    """Bytes of one row's gradients, before a view cuts them."""
    return sum(4 * getattr(tensor.module, tensor.kind).numel() for tensor in trained.values())


def _halved(tokens: int, records: Records, failed: np.ndarray) -> int:
    used = int(records.row_counts[failed].sum() * records.lengths[failed].max())
    while tokens >= used:
        tokens //= 2
    return max(1, tokens)
