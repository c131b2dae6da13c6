"""How many tokens go through a model in one pass."""

from __future__ import annotations

import torch
from torch import nn

ON_CPU = 1024
"""On a CPU, small passes over texts of equal length are fastest."""
MOST = 32_768
VALUES_KEPT = 3
"""Values that autograd keeps for each output of a linear map, at most: for the activation, normalisation, residual and
dropout behind it, and for the gradient."""


def pass_tokens(configured: int | None, model: nn.Module, device: torch.device) -> int:
    """Padded tokens (text) or patches (images) in one pass: `federation.micro_batch_tokens`, or its default.

    The default on a GPU lets the activations take half of the memory that the weights leave (`fitting_tokens`). It
    depends on the size of the memory and not on how much of it is free, so that a resumed run has the same passes.
    """
    if configured is not None:
        return configured
    if device.type == "cpu":
        return ON_CPU
    if device.type != "cuda":
        return MOST
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(MOST, fitting_tokens(model, (memory - weights) // 2)))


def fitting_tokens(model: nn.Module, memory: int) -> int:
    """How many tokens' activations fit into so many bytes: `memory / (3 · Σ d_out · bytes of a value)`.

    The sum is over the model's linear maps, a language model's map to its vocabulary included. An upper bound where
    attention does not store its weights (`sdpa`) and each module is used once.
    """
    from transformers.pytorch_utils import Conv1D

    outputs = sum(
        module.nf if isinstance(module, Conv1D) else module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
    )
    value = min(parameter.element_size() for parameter in model.parameters() if parameter.is_floating_point())
    return memory // (VALUES_KEPT * outputs * value)
