"""The norms from which a clip norm is chosen are those of one example at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorica.adapters.base_files import resolve_base
from lorica.config import load
from lorica.run.setup import prepare
from lorica.tasks.loading import load_task
from tests.scripts import load_script

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "gradient_norms.py"


def test_norms_are_those_of_autograd_one_example_at_a_time() -> None:
    script = load_script(SCRIPT)
    config = load(None, ["privacy.noise=reproducible"])
    prepared = prepare(config, load_task(config.task, resolve_base(config.model.base)))
    model, records = prepared.model, prepared.task.train
    found = script.gradient_norms(prepared, "B", 8)
    factors = [module.weight for name, (module, _, _) in model.tensors.items() if name.endswith(".B")]
    for weight in factors:
        weight.requires_grad_()
    expected = []
    for index in np.random.default_rng(config.seed).choice(len(records), 8, replace=False):
        loss = model.losses(model.peft_model, records.batch(np.array([index]))).sum()
        gradients = torch.autograd.grad(loss, factors)
        expected.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
    assert sorted(found) == pytest.approx(sorted(expected), rel=1e-4)
