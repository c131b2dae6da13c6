"""The norms from which a clip norm is chosen are those of one example at a time."""

from __future__ import annotations

import math
import re
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
    model, records, state = prepared.model, prepared.task.train, prepared.state
    generator = torch.Generator().manual_seed(0)
    state.assign({name: torch.randn(value.shape, generator=generator) / 10 for name, value in state.tensors.items()})
    found = script.gradient_norms(prepared, 8)
    kinds: dict[str, list[torch.Tensor]] = {"A": [], "B": [], "head": []}
    for name, (module, kind, _) in model.tensors.items():
        weight = getattr(module, kind)
        weight.requires_grad_()
        kinds["head" if name.startswith("head.") else name[-1]].append(weight)
    expected: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in np.random.default_rng(config.seed).choice(len(records), 8, replace=False):
        loss = model.losses(model.peft_model, records.batch(np.array([index]))).sum()
        for kind, weights in kinds.items():
            gradients = torch.autograd.grad(loss, weights, retain_graph=True)
            expected[kind].append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
    assert found.keys() == kinds.keys()
    for kind in kinds:
        assert sorted(found[kind]) == pytest.approx(sorted(expected[kind]), rel=1e-4)


def test_the_part_that_a_step_on_both_factors_keeps() -> None:
    script = load_script(SCRIPT)
    small = {"A": np.array([0.3]), "B": np.array([0.4])}
    assert script.kept(small, "B", clip_norm=1.0) == 1
    assert script.kept(small, "B", clip_norm=0.4) == pytest.approx(0.8)
    equal = {"A": np.array([5.0, 20.0]), "B": np.array([5.0, 20.0])}
    assert script.kept(equal, "A", clip_norm=1.0) == pytest.approx(1 / math.sqrt(2))
    assert script.kept(equal | {"head": np.array([500.0, 2000.0])}, "A", clip_norm=1.0) == pytest.approx(1, abs=1e-3)


def test_norms_along_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["federation.rounds=2", "federation.local_steps=1", "federation.evaluate_every=2", "model.head=freeze"]
    load_script(SCRIPT).main(None, overrides, records=16, after=[1, 2])
    output = capsys.readouterr().out
    assert re.findall(r"After round (\d), a step on both factors keeps", output) == ["1", "2"]
    rows = [line.split("│")[1:3] for line in output.splitlines() if line.startswith("│")]
    trained = [(moment.strip(), what.strip()) for moment, what in rows]
    assert trained == [("0", "B"), ("0", "A")] + [(moment, what) for moment in "12" for what in ("B", "A", "B, A")]
