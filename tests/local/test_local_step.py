"""What happens to a noisy gradient before the optimiser: each piece against its formula."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from lorica.adapters.perturbation import weight_noise
from lorica.local.perturbation import strength
from lorica.local.preconditioning import precondition
from lorica.local.smoothing import NOISE_ENERGY, smooth
from lorica.local.step import LocalStep, transform_gradients
from lorica.privacy.released import _release
from tests.models import adapted


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    shapes = {"s.A": (3, 8), "s.B": (6, 3), "head.weight": (4, 6)}
    return {name: torch.randn(*size, generator=draws) for name, size in shapes.items()}


def shaped(local: LocalStep, gradients: Mapping[str, Tensor], **given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = given.get("values", tensors(1))
    released = {name: _release(value) for name, value in gradients.items()}
    found = transform_gradients(released, values, given.get("start", values), given.get("corrections", {}), local)
    return {name: value.tensor for name, value in found.items()}


def test_nothing_configured_changes_nothing() -> None:
    gradients = tensors()
    assert all(torch.equal(value, gradients[name]) for name, value in shaped(LocalStep(), gradients).items())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [(2, 3), (9, 17), (4, 2)])
def test_the_filter_is_a_mirrored_convolution(axis: int, size: tuple[int, int]) -> None:
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0)).double()
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    # SciPy calls the half-sample symmetric mirror "reflect".
    expected = scipy.ndimage.convolve1d(gradient.numpy(), kernel, axis=axis, mode="reflect")
    np.testing.assert_allclose(smooth(gradient, axis).numpy(), expected, atol=1e-12)


def test_the_filter_runs_along_the_width_never_across_ranks() -> None:
    gradients = tensors()
    found = shaped(LocalStep(smoothing="gaussian"), gradients)
    torch.testing.assert_close(found["s.A"], smooth(gradients["s.A"], 1))
    torch.testing.assert_close(found["s.B"], smooth(gradients["s.B"], 0))
    assert torch.equal(found["head.weight"], gradients["head.weight"])


def test_rescaling_leaves_as_much_white_noise_as_the_filter() -> None:
    noise = torch.randn(50, 4000, generator=torch.Generator().manual_seed(0))
    assert float(smooth(noise, 1).var()) == pytest.approx(NOISE_ENERGY, rel=0.02)
    assert pytest.approx(70 / 256) == NOISE_ENERGY
    found = shaped(LocalStep(smoothing="rescale"), {"s.A": noise})["s.A"]
    assert float(found.var()) == pytest.approx(NOISE_ENERGY, rel=0.02)


def test_fedprox_is_the_gradient_of_its_penalty() -> None:
    values, start, gradients = tensors(1), tensors(2), tensors(3)
    found = shaped(LocalStep(proximal=0.7), gradients, values=values, start=start)
    for name, value in values.items():
        free = value.clone().requires_grad_()
        penalty = 0.35 * (free - start[name]).square().sum()
        torch.testing.assert_close(found[name], gradients[name] + torch.autograd.grad(penalty, free)[0])


def test_tail_penalty_is_the_gradient_of_the_tail_norms() -> None:
    values, gradients = tensors(1), {name: torch.zeros_like(value) for name, value in tensors(1).items()}
    found = shaped(LocalStep(tail_penalty=0.3, kept=0.7), gradients, values=values)
    a, b = values["s.A"].clone().requires_grad_(), values["s.B"].clone().requires_grad_()
    expected = torch.autograd.grad(0.3 * a[2:].norm() * b[:, 2:].norm(), (a, b))
    torch.testing.assert_close(found["s.A"], expected[0])
    torch.testing.assert_close(found["s.B"], expected[1])
    assert not found["head.weight"].any()
    zero = values | {"s.B": torch.zeros_like(values["s.B"])}
    assert not shaped(LocalStep(tail_penalty=0.3, kept=0.7), gradients, values=zero)["s.A"].any()


def test_corrections_are_added() -> None:
    gradients = tensors()
    found = shaped(LocalStep(), gradients, corrections={"s.A": torch.ones(3, 8)})
    torch.testing.assert_close(found["s.A"], gradients["s.A"] + 1)
    assert torch.equal(found["s.B"], gradients["s.B"])


def test_preconditioning_is_the_damped_inverse_of_the_other_factor() -> None:
    values, gradients = tensors(1), tensors(2)
    found = shaped(LocalStep(damping=0.2), gradients, values=values)
    a, b = values["s.A"].double().numpy(), values["s.B"].double().numpy()
    left, right = np.linalg.inv(b.T @ b + 0.2 * np.eye(3)), np.linalg.inv(a @ a.T + 0.2 * np.eye(3))
    np.testing.assert_allclose(found["s.A"].numpy(), left @ gradients["s.A"].numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["s.B"].numpy(), gradients["s.B"].numpy() @ right, rtol=1e-3, atol=1e-4)
    assert torch.equal(found["head.weight"], gradients["head.weight"])


def test_preconditioned_steps_do_not_depend_on_how_the_product_is_split() -> None:
    """DEeR's aim: the step in W is the same for (B, A) and (B/10, 10 A); damping bounds it where a factor is zero."""
    values, product_gradient = tensors(1), torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    steps = []
    for scale in (1.0, 10.0):
        b, a = values["s.B"] / scale, values["s.A"] * scale
        gradient = b.T @ product_gradient
        steps.append(b @ precondition("s.A", gradient, {"s.A": a, "s.B": b}, 1e-9))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-4)
    zero = {"s.A": values["s.A"], "s.B": torch.zeros(6, 3)}
    noise = torch.ones(3, 8)
    torch.testing.assert_close(precondition("s.A", noise, zero, 0.1), 10 * noise)


def test_alternating_steps_start_with_b_and_always_train_the_head() -> None:
    trained = ("s.A", "s.B", "head.weight")
    local = LocalStep(alternate=True)
    assert local.active(trained, 0) == ["s.B", "head.weight"]
    assert local.active(trained, 1) == ["s.A", "head.weight"]
    assert LocalStep().active(trained, 0) == list(trained)


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_noise_has_each_rows_scale(transposed: bool) -> None:
    weight = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6.0)[:, None]
    noise = weight_noise(weight, 0.05, torch.Generator().manual_seed(1), transposed)
    rows = noise.T if transposed else noise
    expected = 0.05 * weight.norm(dim=1) / math.sqrt(4000)
    torch.testing.assert_close(rows.std(dim=1), expected, rtol=0.05, atol=0)
    again = weight_noise(weight, 0.05, torch.Generator().manual_seed(1), transposed)
    assert torch.equal(noise, again)


def test_strength_rises_from_nothing_to_all() -> None:
    values = [strength(step, 10) for step in range(11)]
    assert values[0] == 0
    assert values[-1] == pytest.approx(1)
    assert values == sorted(values)
    assert strength(5, 10) == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_perturbed_weights_come_back_bit_for_bit(family: str) -> None:
    model = adapted(family)

    def weights() -> list[Tensor]:
        inner = model.peft_model.base_model.model
        return [inner.get_submodule(site.name).get_base_layer().weight.clone() for site in model.sites]

    before = weights()
    with model.perturbed(0.05, torch.Generator().manual_seed(0)):
        assert all(not torch.equal(x, y) for x, y in zip(before, weights(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, weights(), strict=True))

    def fail() -> None:
        with model.perturbed(0.05, torch.Generator().manual_seed(0)):
            raise ValueError("in the pass")

    with pytest.raises(ValueError, match="in the pass"):
        fail()
    assert all(torch.equal(x, y) for x, y in zip(before, weights(), strict=True))
