"""Local optimisers against `torch.optim` on the same gradients."""

import pytest
import torch

from lorica.config import OptimizerConfig
from lorica.local.optimizers import learning_rates, make_optimizer
from lorica.privacy.released import Released, _release, post_process

NAMES = ["x.A", "x.B", "head.weight"]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sgd", "lr": 0.3},
        {"name": "sgd", "lr": 0.3, "momentum": 0.9},
        {"name": "sgd", "lr": 0.3, "momentum": 0.5, "weight_decay": 0.1},
        {"name": "adamw", "lr": 0.01},
        {"name": "adamw", "lr": 0.01, "weight_decay": 0.2},
    ],
)
def test_equal_torch(settings: dict[str, object]) -> None:
    config = OptimizerConfig(**settings, lr_a=0.02, lr_b=0.07)
    rates = learning_rates(config, NAMES)
    assert rates == {"x.A": 0.02, "x.B": 0.07, "head.weight": config.lr}
    draws = torch.Generator().manual_seed(0)
    start = {name: torch.randn(3, 4, generator=draws) for name in NAMES}
    reference = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [{"params": [reference[name]], "lr": rates[name]} for name in NAMES]
    if config.name == "adamw":
        oracle: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    else:
        oracle = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    ours = make_optimizer(config, rates)
    moved: dict[str, Released] = {name: _release(torch.zeros(3, 4)) for name in NAMES}
    for _ in range(5):
        gradients = {name: torch.randn(3, 4, generator=draws) for name in NAMES}
        for name in NAMES:
            reference[name].grad = gradients[name]
        oracle.step()
        current = {name: start[name] + moved[name].tensor for name in NAMES}
        released = {name: _release(value) for name, value in gradients.items()}
        for name, increment in ours.step(released, current).items():
            moved[name] = post_process(torch.add, moved[name], increment)
        for name in NAMES:
            expected = reference[name].detach()
            torch.testing.assert_close(start[name] + moved[name].tensor, expected, rtol=1e-5, atol=1e-6)


def test_unset_rates_fall_back_to_the_common_one() -> None:
    assert learning_rates(OptimizerConfig(lr=0.4), NAMES) == dict.fromkeys(NAMES, 0.4)


def test_adam_counts_the_steps_of_each_tensor() -> None:
    """A tensor that rests for a while is corrected for its own steps: as if the others' steps had not been."""
    rates = {"x.A": 0.1, "x.B": 0.1}
    alternating, alone = (
        make_optimizer(OptimizerConfig(name="adamw"), rates),
        make_optimizer(OptimizerConfig(name="adamw"), rates),
    )
    gradient, value = {"x.A": _release(torch.full((2,), 0.3))}, {"x.A": torch.zeros(2), "x.B": torch.zeros(2)}
    for _ in range(3):
        alternating.step({"x.B": _release(torch.ones(2))}, value)
        mine, theirs = alternating.step(gradient, value), alone.step(gradient, value)
        assert torch.equal(mine["x.A"].tensor, theirs["x.A"].tensor)
