"""Per-example gradients against one-example-at-a-time autograd and against Opacus."""

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from lorica.privacy.gradients import TrainedTensor, per_example_gradients
from lorica.tasks.records import Batch
from tests.models import FAMILIES, adapted, batch, one_at_a_time
from tests.tiers import integration


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_autograd_one_example_at_a_time(family: str) -> None:
    model, examples = adapted(family), batch(family, 4)
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), model.tensors, 4)
    expected = one_at_a_time(model, examples)
    assert set(found) == set(expected) == set(model.tensors)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"albert"}))
@pytest.mark.parametrize("trained", ["", *integration(".A", ".B")])
def test_recomputed_layers_have_the_same_gradients(family: str, trained: str) -> None:
    model, examples = adapted(family, gradient_checkpointing=True), batch(family, 4)
    passes = []
    where = model.tensors[model.sites[0].a].module
    where.register_forward_pre_hook(lambda *_: passes.append(0))
    expected = one_at_a_time(model, examples)
    once = len(passes) // 4
    passes.clear()
    model.peft_model.train()
    some = {name: tensor for name, tensor in model.tensors.items() if name.endswith(trained)}
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), some, 4)
    assert len(passes) > once
    for name in some:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_recomputed_layers_drop_what_they_dropped_before() -> None:
    examples = batch("bert", 4)
    gradients = []
    for recompute in (False, True):
        model = adapted("bert", gradient_checkpointing=recompute, lora_dropout=0.5)
        model.peft_model.train()
        torch.manual_seed(1)
        gradients.append(
            per_example_gradients(lambda model=model: model.losses(model.peft_model, examples), model.tensors, 4)
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.any()


@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "gpt2", "llama"])
@pytest.mark.filterwarnings("ignore")
def test_equal_opacus_hooks(family: str) -> None:
    # Not Swin: Opacus takes every window for an example.
    model, examples = adapted(family), batch(family, 4)
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), model.tensors, 4)
    parameters = {name: getattr(module, kind) for name, (module, kind, _) in model.tensors.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    # Opacus collects in training mode only, where dropout would differ between the two passes.
    for module in model.peft_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.peft_model.config.attention_probs_dropout_prob = 0.0
    wrapped = GradSampleModule(model.peft_model, loss_reduction="sum").train()
    model.losses(wrapped, examples).sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad_sample, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("trained", ["A", "B", "weight"])
def test_a_subset_has_the_same_gradients_and_touches_nothing_else(trained: str) -> None:
    model, examples = adapted("bert"), batch("bert", 3)
    some = {name: where for name, where in model.tensors.items() if name.endswith(trained)}
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), some, 3)
    expected = one_at_a_time(model, examples)
    assert set(found) == set(some)
    for name in some:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.peft_model.parameters())
    assert not any(module._forward_hooks for module, *_ in model.tensors.values())


def test_switching_factors_leaves_no_stale_hook() -> None:
    # Opacus breaks here: a factor frozen or un-frozen after wrapping raises, or is clipped wrongly without a word.
    model, examples = adapted("vit"), batch("vit", 3)
    expected = one_at_a_time(model, examples)
    for suffix in ("A", "B", "A", "bias", "B"):
        some = {name: where for name, where in model.tensors.items() if name.endswith(suffix)}
        found = per_example_gradients(lambda: model.losses(model.peft_model, examples), some, 3)
        assert set(found) == set(some)
        for name in some:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_module_used_twice_sums_its_contributions() -> None:
    linear = nn.Linear(5, 5, bias=True).requires_grad_(False)
    trained = {"w": TrainedTensor(linear, "weight"), "b": TrainedTensor(linear, "bias")}
    x = torch.randn(4, 3, 5)
    found = per_example_gradients(lambda: linear(linear(x).tanh()).square().sum((1, 2)), trained, 4)
    weight, bias = linear.weight.clone().requires_grad_(), linear.bias.clone().requires_grad_()
    for index in range(4):
        inner = torch.nn.functional.linear(x[index], weight, bias).tanh()
        loss = torch.nn.functional.linear(inner, weight, bias).square().sum()
        for name, gradient in zip(("w", "b"), torch.autograd.grad(loss, (weight, bias)), strict=True):
            torch.testing.assert_close(found[name][index], gradient, rtol=1e-4, atol=1e-5)


def test_rows_of_one_example_belong_together() -> None:
    # Swin cuts an image into windows: one example makes several rows, in order.
    linear = nn.Linear(5, 2, bias=False).requires_grad_(False)
    x = torch.randn(3 * 4, 6, 5)
    trained = {"w": TrainedTensor(linear, "weight")}
    found = per_example_gradients(lambda: linear(x).square().reshape(3, -1).sum(1), trained, 3)
    for index in range(3):
        rows = x[4 * index : 4 * index + 4].reshape(-1, 5)
        torch.testing.assert_close(found["w"][index], 2 * (rows @ linear.weight.T).T @ rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_example_are_summed_by_example(family: str) -> None:
    model, rows = adapted(family), batch(family, 6)
    example_of_row, weights = torch.tensor([0, 0, 0, 1, 2, 2]), torch.rand(6)
    examples = Batch(rows.inputs, rows.labels, example_of_row, weights)
    assert len(examples) == 3
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), model.tensors, 3, example_of_row)
    for name, gradient in one_at_a_time(model, rows).items():
        weighted = weights.reshape(-1, *[1] * (gradient.dim() - 1)) * gradient
        expected = torch.stack([weighted[:3].sum(0), weighted[3], weighted[4:].sum(0)])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_without_weights_count_equally() -> None:
    model, rows = adapted("bert"), batch("bert", 5)
    examples = Batch(rows.inputs, rows.labels, torch.tensor([0, 0, 1, 1, 1]))
    alone = model.losses(model.peft_model, rows)
    found = model.losses(model.peft_model, examples)
    torch.testing.assert_close(found, torch.stack([alone[:2].mean(), alone[2:].mean()]))


def test_windows_of_rows_of_one_example() -> None:
    # `example_of_row` counts rows of the model's input; a module inside may see several windows of each.
    linear = nn.Linear(5, 2).requires_grad_(False)
    x, example_of_row = torch.randn(3 * 4, 6, 5), torch.tensor([0, 0, 1])
    trained = {"w": TrainedTensor(linear, "weight"), "b": TrainedTensor(linear, "bias")}

    def losses() -> torch.Tensor:
        by_row = linear(x).square().reshape(3, -1).sum(1)
        return torch.stack([by_row[0] + by_row[1], by_row[2]])

    found = per_example_gradients(losses, trained, 2, example_of_row)
    for index, rows in enumerate((x[:8].reshape(-1, 5), x[8:].reshape(-1, 5))):
        output = rows @ linear.weight.T + linear.bias
        torch.testing.assert_close(found["w"][index], 2 * output.T @ rows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["b"][index], 2 * output.sum(0), rtol=1e-4, atol=1e-5)


def test_a_module_that_sees_examples_and_not_rows_is_refused() -> None:
    linear = nn.Linear(3, 2).requires_grad_(False)
    example_of_row = torch.tensor([0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="2 rows for 4 of the input"):
        per_example_gradients(
            lambda: linear(torch.randn(2, 3)).sum(1), {"w": TrainedTensor(linear, "weight")}, 2, example_of_row
        )


def test_an_unreached_tensor_has_gradient_zero() -> None:
    used, unused = nn.Linear(3, 2).requires_grad_(False), nn.Linear(3, 2).requires_grad_(False)
    trained = {"used": TrainedTensor(used, "weight"), "unused": TrainedTensor(unused, "weight")}
    found = per_example_gradients(lambda: used(torch.randn(2, 3)).sum(1), trained, 2)
    assert found["unused"].shape == (2, 2, 3)
    assert not found["unused"].any()
    assert found["used"].any()


def test_rows_that_do_not_divide_are_refused() -> None:
    linear = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(RuntimeError, match="5 rows for 2 of the input"):
        per_example_gradients(lambda: linear(torch.randn(5, 3)).sum(1), {"w": TrainedTensor(linear, "weight")}, 2)


def test_a_mean_loss_is_refused() -> None:
    linear = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(RuntimeError, match="one per example"):
        per_example_gradients(lambda: linear(torch.randn(2, 3)).mean(), {"w": TrainedTensor(linear, "weight")}, 2)


def test_bf16_base_keeps_gradients_fp32() -> None:
    from lorica.adapters.adapted import adapt
    from lorica.adapters.base_model import BaseModel
    from lorica.config import LoraSection, ModelConfig

    torch.manual_seed(0)
    base = BaseModel(FAMILIES["bert"]().eval().requires_grad_(False), "classifier", True, [])
    config = ModelConfig(base="tiny", precision="bf16")
    model = adapt(base, LoraSection(r=2), config, 0, torch.device("cpu"))
    assert {value.dtype for value in model.read().values()} == {torch.float32}
    examples = batch("bert", 3)
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), model.tensors, 3)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert model.peft_model.base_model.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [1, 2])
def test_a_client_of_smaller_rank_has_the_gradient_of_its_leading_ranks(rank: int) -> None:
    model, examples = adapted("bert"), batch("bert", 3)
    expected = one_at_a_time(model, examples)
    tensors = model.read()
    trained = {name: model.trained(name, range(rank), tensors) for name in model.tensors}
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), trained, 3)
    for name, value in expected.items():
        cut = value[:, :rank] if name.endswith(".A") else value[:, :, :rank] if name.endswith(".B") else value
        assert found[name].shape == trained[name].zeros(3).shape == cut.shape
        torch.testing.assert_close(found[name], cut, rtol=1e-4, atol=1e-6)


def test_the_matrix_between_fixed_factors_has_autograds_gradient() -> None:
    """`W = W0 + γ B R A`: differentiated through a product of three matrices, one example at a time."""
    model, examples = adapted("bert"), batch("bert", 3)
    draws = torch.Generator().manual_seed(0)
    tensors = model.read()
    middles = {site.r: torch.randn(2, 2, generator=draws) for site in model.sites}
    model.write(tensors | middles)
    trained = {name: model.trained(name, None, tensors) for name in middles}
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), trained, 3)
    for site in model.sites:
        free = middles[site.r].clone().requires_grad_()
        layer = model.peft_model.base_model.model.get_submodule(site.name).lora_B["default"]
        for index in range(3):
            here = slice(index, index + 1)
            one = Batch({name: value[here] for name, value in examples.inputs.items()}, examples.labels[here])
            handle = layer.register_forward_hook(
                lambda module, inputs, output, basis=tensors[site.b], free=free: inputs[0] @ (basis @ free).T
            )
            loss = model.losses(model.peft_model, one).sum()
            handle.remove()
            (expected,) = torch.autograd.grad(loss, free)
            torch.testing.assert_close(found[site.r][index], expected, rtol=1e-4, atol=1e-6)
