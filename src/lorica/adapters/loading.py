"""Load a model for training, and check that it does not mix examples."""

from __future__ import annotations

import numpy as np
import torch

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import load_base, resolve_device
from lorica.config import ExperimentConfig
from lorica.privacy.isolation import check_isolation
from lorica.streams import torch_stream
from lorica.tasks.records import Records, Task

CHECKED_EXAMPLES = 3


def load_model(config: ExperimentConfig, task: Task) -> AdaptedModel:
    """The base model with newly initialised factors, on its device; the same on every machine.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    device = resolve_device(config.model.device)
    if config.model.threads is not None:
        torch.set_num_threads(config.model.threads)
    base = load_base(config.model, config.task.type, task.label_names, config.seed)
    return adapt(base, config.lora, config.model, config.seed, device, task.objective)


def check_isolated(config: ExperimentConfig, model: AdaptedModel, records: Records) -> None:
    """Run `check_isolation` on a few examples, with random factors, since at `B = 0` the gradient of `A` is zero.

    The result depends on the model only.
    """
    draws = torch_stream(config.seed, "isolation")
    model.write({name: 0.1 * torch.randn(value.shape, generator=draws) for name, value in model.read().items()})
    indices = np.arange(min(CHECKED_EXAMPLES, len(records)))
    batch = next(iter(records.micro_batches(indices, 10**9))).to(model.device)
    tolerance = 1e-3 if config.model.precision == "fp32" else 0.2
    check_isolation(model.peft_model, model.losses, model.tensors, batch, tolerance)
