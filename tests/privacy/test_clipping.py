"""No single example moves the pre-noise sum by more than C: the property that the guarantee rests on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.privacy.clipping import clipped_sum
from lorica.privacy.gradients import per_example_gradients
from lorica.tasks.records import Batch
from tests.models import adapted, batch, clipped_one_at_a_time

BAD = st.sampled_from([0.0, 1.0, -3.0, 1e-30, 1e18, 3e38, math.nan, math.inf, -math.inf])
MODELS = {family: adapted(family) for family in ("bert", "vit", "gpt2")}
# LoRA in the upper layer only.
MODELS["bert, upper"] = adapted("bert", layers_to_transform=[1])


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    squares = [(one[name].double() - other[name].double()).square().sum() for name in one]
    return math.sqrt(float(torch.stack(squares).sum()))


@given(
    values=st.lists(st.lists(BAD, min_size=6, max_size=6), min_size=1, max_size=6),
    clip_norm=st.sampled_from([1e-3, 0.5, 2.0, 100.0]),
    data=st.data(),
)
def test_removing_any_example_moves_the_sum_by_at_most_c(values: list, clip_norm: float, data: st.DataObject) -> None:
    flat = torch.tensor(values)
    gradients = {"a": flat[:, :2].reshape(-1, 1, 2), "b": flat[:, 2:]}
    leave = data.draw(st.integers(0, len(values) - 1))
    keep = [index for index in range(len(values)) if index != leave]
    everything = clipped_sum(gradients, clip_norm)
    without = clipped_sum({name: value[keep] for name, value in gradients.items()}, clip_norm)
    assert all(torch.isfinite(value).all() for value in everything.values())
    assert distance(everything, without) <= clip_norm


@pytest.mark.integration
@pytest.mark.parametrize("value", ["normal", "uniform", "equal"])
def test_an_example_of_twenty_million_coordinates_adds_at_most_c(value: str) -> None:
    """fp32 norms of as many coordinates are too small by up to 1 %, and the clipped gradient is as much too large."""
    generator = torch.Generator().manual_seed(0)
    make = {"normal": torch.randn, "uniform": torch.rand, "equal": lambda *shape, generator: torch.full(shape, 0.1)}
    summed = clipped_sum({"w": make[value](1, 20_000_000, generator=generator)}, 0.5)
    assert 0.5 * (1 - 2e-5) <= distance(summed, {"w": torch.zeros(20_000_000)}) <= 0.5


@pytest.mark.parametrize("sizes", [[1_000_000, 1_000_000], [2_000_000, 7], [1] * 500], ids=["two", "unequal", "many"])
def test_removing_an_example_of_large_tensors_moves_the_sum_by_at_most_c(sizes: list[int]) -> None:
    """Of several examples, one of them with an overflow in fp32's square and one with NaN."""
    generator = torch.Generator().manual_seed(1)
    gradients = {str(place): torch.rand(4, size, generator=generator) for place, size in enumerate(sizes)}
    gradients["0"][1] *= 1e30
    gradients["0"][2, 0] = math.nan
    everything = clipped_sum(gradients, 2.0)
    for leave, least in enumerate([1.9999, 1.9999, 0.0, 1.9999]):
        zeroed = {name: value.clone() for name, value in gradients.items()}
        for value in zeroed.values():
            value[leave] = 0.0
        assert least <= distance(everything, clipped_sum(zeroed, 2.0)) <= 2.0


def test_a_sum_of_many_examples_stays_within_c() -> None:
    """All in one direction: rounded to fp32, a sum of 3,000 clipped gradients is off by more than the margin."""
    generator = torch.Generator().manual_seed(0)
    gradients = {"w": 1 + 0.01 * torch.rand(3000, 50, generator=generator)}
    everything = clipped_sum(gradients, 1.0)
    for leave in range(0, 3000, 100):
        without = clipped_sum({"w": torch.cat([gradients["w"][:leave], gradients["w"][leave + 1 :]])}, 1.0)
        assert distance(everything, without) <= 1.0


def _fixed(name: str, names: set[str]) -> bool:
    """`B` is the basis, and fixed, where the matrix between the factors is trained."""
    return name.endswith(".B") and f"{name[:-2]}.R" in names


@given(
    family=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 10**6),
    clip_norm=st.sampled_from([0.01, 0.3, 5.0]),
    poison=st.sampled_from([None, "nan", "inf", "huge"]),
    data=st.data(),
)
def test_no_example_of_a_model_moves_the_sum_by_more_than_c(
    family: str, seed: int, clip_norm: float, poison: str | None, data: st.DataObject
) -> None:
    """Random models, masks of trained tensors (ranks, matrices between fixed factors), and examples with NaN or inf."""
    model = MODELS[family]
    generator = torch.Generator().manual_seed(seed)
    model.write({name: torch.randn(value.shape, generator=generator) for name, value in model.read().items()})
    names = data.draw(st.sets(st.sampled_from([*model.tensors, *(site.r for site in model.sites)]), min_size=1))
    rank, tensors = data.draw(st.sampled_from([None, 1])), model.read()
    trained = {name: model.trained(name, rank, tensors) for name in names if not _fixed(name, names)}
    examples = batch(family, 4, seed)
    leave = data.draw(st.integers(0, 3))

    def losses(chosen: Batch, poisoned: list[bool]) -> Tensor:
        values = model.losses(model.peft_model, chosen)
        factor = {None: 1.0, "nan": math.nan, "inf": math.inf, "huge": 1e30}[poison]
        return torch.where(torch.tensor(poisoned), values * factor, values)

    def total(indices: list[int]) -> dict[str, Tensor]:
        chosen = Batch({key: value[indices] for key, value in examples.inputs.items()}, examples.labels[indices])
        marks = [index == leave for index in indices]
        return clipped_sum(per_example_gradients(lambda: losses(chosen, marks), trained, len(indices)), clip_norm)

    moved = distance(total([0, 1, 2, 3]), total([index for index in range(4) if index != leave]))
    assert moved <= clip_norm * (1 + 1e-4)


@given(
    family=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    clip_norm=st.sampled_from([0.01, 0.3, 5.0]),
    poison=st.sampled_from([None, "nan", "inf", "huge"]),
    data=st.data(),
)
def test_no_example_of_several_rows_moves_the_sum_by_more_than_c(
    family: str, seed: int, sizes: list[int], clip_norm: float, poison: str | None, data: st.DataObject
) -> None:
    """However many rows an example has, and whatever is in them, all of them together move the sum by at most C."""
    model = MODELS[family]
    generator = torch.Generator().manual_seed(seed)
    model.write({name: torch.randn(value.shape, generator=generator) for name, value in model.read().items()})
    rows = batch(family, sum(sizes), seed)
    example_of_row = torch.repeat_interleave(torch.tensor(sizes))
    leave = data.draw(st.integers(0, len(sizes) - 1))
    bad = data.draw(st.integers(0, sum(sizes) - 1))
    weights = torch.rand(sum(sizes), generator=generator) * 3
    weights[bad] *= {None: 1.0, "nan": math.nan, "inf": math.inf, "huge": 1e30}[poison]

    def total(keep: torch.Tensor) -> dict[str, Tensor]:
        _, renumbered = torch.unique(example_of_row[keep], return_inverse=True)
        inputs = {key: value[keep] for key, value in rows.inputs.items()}
        chosen = Batch(inputs, rows.labels[keep], renumbered, weights[keep])
        gradients = per_example_gradients(
            lambda: model.losses(model.peft_model, chosen), model.tensors, len(chosen), chosen.example_of_row
        )
        return clipped_sum(gradients, clip_norm)

    everything = total(torch.ones_like(example_of_row, dtype=torch.bool))
    assert all(torch.isfinite(value).all() for value in everything.values())
    assert distance(everything, total(example_of_row != leave)) <= clip_norm * (1 + 1e-4)


def test_small_gradients_pass_and_large_ones_are_scaled_to_c() -> None:
    gradients = {"a": torch.tensor([[0.3, 0.0], [30.0, 0.0]]), "b": torch.tensor([[0.4], [40.0]])}
    summed = clipped_sum(gradients, 1.0)
    torch.testing.assert_close(summed["a"], torch.tensor([0.3 + 0.6, 0.0]).double(), rtol=2e-5, atol=0)
    torch.testing.assert_close(summed["b"], torch.tensor([0.4 + 0.8]).double(), rtol=2e-5, atol=0)


def test_non_finite_examples_contribute_zero() -> None:
    gradients = {
        "a": torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.0, math.inf]]),
        "b": torch.tensor([[0.0], [7.0], [7.0]]),
    }
    summed = clipped_sum(gradients, 100.0)
    torch.testing.assert_close(summed["a"], torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(summed["b"], torch.tensor([0.0]).double())


def test_without_a_bound_the_sum_is_plain() -> None:
    gradients = {"a": torch.randn(5, 3, 2) * 100}
    torch.testing.assert_close(clipped_sum(gradients, math.inf)["a"], gradients["a"].double().sum(0))


def test_equal_clipping_one_at_a_time() -> None:
    model, examples = adapted("bert"), batch("bert", 6)
    gradients = per_example_gradients(lambda: model.losses(model.peft_model, examples), model.tensors, 6)
    found = clipped_sum(gradients, clip_norm=0.2)
    for name, value in clipped_one_at_a_time(model, examples, 0.2).items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-4, atol=1e-6)


def test_equal_clipping_one_at_a_time_with_several_rows_each() -> None:
    model, rows = adapted("bert"), batch("bert", 7)
    examples = Batch(rows.inputs, rows.labels, torch.tensor([0, 1, 1, 1, 2, 2, 3]))
    gradients = per_example_gradients(
        lambda: model.losses(model.peft_model, examples), model.tensors, 4, examples.example_of_row
    )
    found = clipped_sum(gradients, clip_norm=0.2)
    for name, value in clipped_one_at_a_time(model, examples, 0.2).items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-4, atol=1e-6)
