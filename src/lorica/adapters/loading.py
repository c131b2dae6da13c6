"""Load a model for training, and check that it does not mix examples."""

from __future__ import annotations

import logging

import numpy as np
import torch

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import load_base, resolve_device
from lorica.adapters.memory import pass_tokens
from lorica.config import ExperimentConfig
from lorica.privacy.isolation import check_isolation
from lorica.streams import torch_stream
from lorica.tasks.records import Records, Task

MOST_EXAMPLES = 32
# On x86 and on ARM, as PyTorch names them.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
logger = logging.getLogger(__name__)


def load_model(config: ExperimentConfig, task: Task) -> AdaptedModel:
    """The base model with newly initialised factors, on its device; the same on every machine.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    device = resolve_device(config.model.device)
    if config.model.precision == "bf16" and device.type == "cpu" and not has_bf16():
        logger.warning("model.precision=bf16 is much slower than fp32 on this CPU, which has no instructions for it")
    if config.model.threads is not None:
        torch.set_num_threads(config.model.threads)
    base = load_base(config.model, config.task.type, task.label_names, config.seed)
    return adapt(base, config.lora, config.model, config.seed, device, task.objective)


def has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices by itself. True where this PyTorch does not tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in BF16_INSTRUCTIONS)


def check_isolated(config: ExperimentConfig, model: AdaptedModel, records: Records) -> None:
    """Run `check_isolation` on a batch like those of training. Factors are random: at `B = 0`, `A` has no gradient.

    The batch has the expected batch size, limited to one forward pass of training and to 32 examples; records are
    repeated if there are too few. The result depends on the model only.
    """
    draws = torch_stream(config.seed, "isolation")
    drawn = {name: value for name, value in model.read().items() if name in model.tensors}
    model.write({name: 0.1 * torch.randn(value.shape, generator=draws) for name, value in drawn.items()})
    wanted = min(max(2, config.federation.batch_size), MOST_EXAMPLES)
    indices = np.resize(np.arange(len(records)), wanted)
    tokens = pass_tokens(config.federation.micro_batch_tokens, model.peft_model, model.device)
    passes = list(records.micro_batch_indices(indices, tokens))
    largest = max(passes, key=len)
    batch = records.batch(largest if len(largest) > 1 else indices[:2]).to(model.device)
    # Quantised weights are not converted, and their kernels round differently for a single example.
    tolerance = 0.2 if config.model.precision in ("int8", "nf4") else 1e-3
    check_isolation(model.peft_model, model.losses, model.tensors, batch, tolerance, config.model.base)
