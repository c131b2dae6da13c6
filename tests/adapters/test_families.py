"""Every family of base models, from a checkpoint in a folder through a round of AS-LoRA under DP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import load_base
from lorica.adapters.shared_rows import separate_examples
from lorica.adapters.state import AdapterState
from lorica.client import Client
from lorica.config import LoraSection, MethodConfig, ModelConfig, OptimizerConfig, PrivacyConfig
from lorica.engines.local import LocalEngine
from lorica.federation import Federation
from lorica.methods.base import Server, make_method
from lorica.optimizers import learning_rates
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import plan_client
from tests.models import FAMILIES, IMAGES, LABELS, batch, one_at_a_time
from tests.records import TinyRecords

NAMES = ["bad", "fair", "good"]
RECORDS, STEPS = 6, 2


def loaded(folder: Path, family: str) -> AdaptedModel:
    """With factors that are all non-zero, so that both have a gradient."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    config = ModelConfig(base=str(folder))
    task = "image-classification" if family in IMAGES else "text-classification"
    model = adapt(load_base(config, task, NAMES, 0), LoraSection(r=2), config, 0, torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    model.write({name: 0.3 * torch.randn(value.shape, generator=draws) for name, value in model.read().items()})
    return model


def federation(model: AdaptedModel, family: str, folder: Path, privacy: Any, clients: int, steps: int) -> Federation:
    state = AdapterState(model.sites, model.read())
    method = make_method(MethodConfig(name="as-lora"), model.sites)
    method.start(state, 0)
    plans = {number: plan_client(number, RECORDS, RECORDS, steps, privacy) for number in range(clients)}
    ledger = Ledger(folder / "ledger.sqlite")
    # Micro-batches of about two texts, or of all images.
    members = {
        number: Client(number, TinyRecords.of(family, RECORDS, number), plans[number], ledger, "data", 0, 24)
        for number in range(clients)
    }
    optimizer = OptimizerConfig(lr=0.5)
    rates = learning_rates(optimizer, list(state.tensors))
    server = Server(
        model=state,
        rounds=1,
        terms={number: plan.terms for number, plan in plans.items()},
        optimizer=optimizer,
        local_steps=steps,
        rates=rates,
        seed=0,
    )
    return Federation("run", method, server, LocalEngine(model, members), plans, [list(range(clients))], "uniform")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_private_round(tmp_path: Path, family: str) -> None:
    privacy = PrivacyConfig(epsilon=3.0, delta=1e-3, clip_norm=1.0, noise="reproducible")
    model = loaded(tmp_path / "base", family)
    some = federation(model, family, tmp_path, privacy, 2, STEPS)
    before = dict(some.server.model.tensors)
    some.round()
    after = some.server.model.tensors
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert all(torch.isfinite(value).all() for value in after.values())
    assert {name for name in after if name.startswith("head.")} <= moved
    for site in model.sites:
        assert len({site.a, site.b} & moved) == 1, site.name
    for number, plan in some.plans.items():
        assert Ledger(tmp_path / "ledger.sqlite").steps("run", number) == STEPS == plan.max_steps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_noise_is_gradient_descent(tmp_path: Path, family: str) -> None:
    """In training mode and in micro-batches of several lengths: `-η` times the mean of one-at-a-time gradients."""
    model = loaded(tmp_path / "base", family)
    some = federation(model, family, tmp_path, "none", 1, 1)
    before = dict(some.server.model.tensors)
    model.write(before)
    gradients = one_at_a_time(model, TinyRecords.of(family, RECORDS, 0).batch(np.arange(RECORDS)))
    some.round()
    for name, value in some.server.model.tensors.items():
        if not torch.equal(value, before[name]):
            assert gradients[name].abs().max() > 0
            torch.testing.assert_close(value - before[name], -0.5 * gradients[name].mean(0), rtol=1e-3, atol=1e-6)


def test_projecting_copied_positions_is_copying_projected_ones() -> None:
    torch.manual_seed(0)
    model, examples = FAMILIES["deberta-v3"]().eval(), batch("deberta-v3", 5)
    positions = [module for module in model.modules() if hasattr(module, "query_proj")]
    seen: list[Tensor] = []
    for module in positions:
        # Larger than they are drawn, so that the positions count.
        torch.nn.init.normal_(module.query_proj.weight)
        torch.nn.init.normal_(module.key_proj.weight)
        module.query_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(**examples.inputs).logits
    assert {len(value) for value in seen} == {1, 5}
    seen.clear()
    separate_examples(model)
    torch.testing.assert_close(model(**examples.inputs).logits, logits)
    assert logits.shape == (5, LABELS)
    assert {len(value) for value in seen} == {5}
    seen.clear()
    with torch.inference_mode():
        torch.testing.assert_close(model(**examples.inputs).logits, logits)
    assert {len(value) for value in seen} == {1, 5}
