"""Passes that fit into memory: bounds in tokens and bytes, and what happens where memory runs out."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorica.errors import UserError
from lorica.privacy import passes
from lorica.privacy.mechanism import Terms, noisy_gradient
from lorica.privacy.passes import clipped_batch
from lorica.privacy.randomness import ReproducibleRandomness
from lorica.tasks.groups import grouped
from lorica.tasks.records import Batch, Records
from lorica.testing.records import TinyRecords
from tests.models import adapted, batch, clipped_one_at_a_time

MODEL = adapted("bert")
RECORDS = TinyRecords.texts(20)
EVERYTHING = np.arange(20)
C = 0.2


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def padded_tokens(examples: Batch) -> int:
    sizes = examples.inputs["attention_mask"].sum(1)
    return len(sizes) * int(sizes.max())


def small_device(most: int, seen: list[int]) -> Callable[[nn.Module, Batch], Tensor]:
    """Losses on a device whose memory takes so many padded tokens; `seen` gets those of each pass that fits."""

    def losses(model: nn.Module, examples: Batch) -> Tensor:
        found = MODEL.losses(model, examples)
        if padded_tokens(examples) > most:
            raise torch.OutOfMemoryError("made up")
        seen.append(padded_tokens(examples))
        return found

    return losses


def summed(tokens: int, most: int = 2**30) -> tuple[dict[str, Tensor], list[int]]:
    """The clipped sum of all records, and the padded tokens of each pass."""
    seen: list[int] = []
    losses = small_device(most, seen)
    return clipped_batch(MODEL.peft_model, losses, MODEL.tensors, RECORDS, EVERYTHING, C, tokens), seen


def test_out_of_memory_gives_the_sum_of_smaller_passes() -> None:
    found, seen = summed(160, most=40)
    smaller, _ = summed(40)
    assert max(summed(160)[1]) > 40 >= max(seen)
    for name, value in clipped_one_at_a_time(MODEL, RECORDS.batch(EVERYTHING), C).items():
        torch.testing.assert_close(found[name], smaller[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name].float(), value, rtol=1e-4, atol=1e-6)


def test_passes_before_the_one_that_fails_are_not_repeated() -> None:
    _, untroubled = summed(60)
    before = next(place for place, tokens in enumerate(untroubled) if tokens > 40)
    assert before > 0
    found, seen = summed(60, most=40)
    assert seen[:before] == untroubled[:before]
    assert len(seen) > len(untroubled)
    for name, value in clipped_one_at_a_time(MODEL, RECORDS.batch(EVERYTHING), C).items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-4, atol=1e-6)


def test_out_of_memory_draws_no_other_batch_and_no_other_noise() -> None:
    terms = Terms(0.5, 10, C, 0.8)

    def released(tokens: int, most: int) -> dict[str, Tensor]:
        randomness = ReproducibleRandomness(0, 1, 1, 0)
        losses = small_device(most, [])
        found = noisy_gradient(MODEL.peft_model, losses, MODEL.tensors, RECORDS, terms, randomness, tokens)
        return {name: value.tensor for name, value in found.items()}

    expected = released(16, 2**30)
    for name, value in released(2**20, 16).items():
        # Noise or a batch drawn anew would differ by about 0.8 · 0.2 / 10.
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_the_budget_stays_halved_within_a_step_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[int] = []

    def losses(model: nn.Module, examples: Batch) -> Tensor:
        attempts.append(padded_tokens(examples))
        if attempts[-1] > 40:
            raise torch.OutOfMemoryError("made up")
        return MODEL.losses(model, examples)

    clipped_batch(MODEL.peft_model, losses, MODEL.tensors, RECORDS, EVERYTHING, C, 160)
    failed = [tokens for tokens in attempts if tokens > 40]
    assert len(failed) <= 2
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory: a pass now has at most {tokens} tokens (federation.micro_batch_tokens)"
        for tokens in (80, 40)[: len(failed)]
    ]


def test_a_record_that_does_not_fit_alone_is_named_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"model.device = 'cpu': a single record .*gradient_checkpointing=true"):
        summed(160, most=2)


def test_hooks_of_a_pass_that_failed_are_gone() -> None:
    with pytest.raises(UserError):
        summed(160, most=2)
    assert not any(module._forward_hooks for module, *_ in MODEL.tensors.values())


def test_gradients_of_a_pass_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 4 * sum(value.numel() for value in MODEL.read().values())
    monkeypatch.setattr(passes, "GRADIENT_BYTES", 3 * one + 1)
    sizes: list[int] = []

    def losses(model: nn.Module, examples: Batch) -> Tensor:
        sizes.append(len(examples))
        return MODEL.losses(model, examples)

    found = clipped_batch(MODEL.peft_model, losses, MODEL.tensors, RECORDS, EVERYTHING, C, 2**20)
    assert max(sizes) == 3
    assert sum(sizes) == 20
    # A view trains a part; the whole gradient is formed before it is cut.
    sizes.clear()
    some = {name: MODEL.trained(name, [0], MODEL.read()) for name in MODEL.tensors}
    clipped_batch(MODEL.peft_model, losses, some, RECORDS, EVERYTHING, C, 2**20)
    assert max(sizes) == 3
    # Fewer trained tensors leave room for more records.
    sizes.clear()
    head = {name: MODEL.tensors[name] for name in ("head.weight", "head.bias")}
    clipped_batch(MODEL.peft_model, losses, head, RECORDS, EVERYTHING, C, 2**20)
    assert max(sizes) > 3
    for name, value in clipped_one_at_a_time(MODEL, RECORDS.batch(EVERYTHING), C).items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-4, atol=1e-6)


@given(
    seed=st.integers(0, 10**6),
    most=st.integers(8, 80),
    tokens=st.integers(1, 200),
    rows=st.integers(1, 9),
    poison=st.sampled_from([None, math.nan, math.inf, 1e30]),
    data=st.data(),
)
def test_no_record_moves_the_sum_by_more_than_c_whatever_fails(
    seed: int, most: int, tokens: int, rows: int, poison: float | None, data: st.DataObject
) -> None:
    """Records alone and in groups, with passes of any size, of which some fail, and an example with NaN or inf."""
    generator = torch.Generator().manual_seed(seed)
    MODEL.write({name: torch.randn(value.shape, generator=generator) for name, value in MODEL.read().items()})
    count = data.draw(st.integers(2, 8))
    records: Records = TinyRecords.texts(count, seed)
    if data.draw(st.booleans()):
        keys = data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
        records = grouped(records, np.array(keys), 2, 0)
    # A record that does not fit alone is an error, which is tested above.
    most = max(most, int((records.row_counts * records.lengths).max()))
    leave = data.draw(st.integers(0, len(records) - 1))
    marked = records.batch(np.array([leave])).inputs["input_ids"]

    def losses(model: nn.Module, examples: Batch) -> Tensor:
        found = MODEL.losses(model, examples)
        if padded_tokens(examples) > most:
            raise torch.OutOfMemoryError("made up")
        return found if poison is None else found * _factors(examples, marked, poison)

    one = 4 * sum(value.numel() for value in MODEL.read().values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "GRADIENT_BYTES", rows * one)
        everything = np.arange(len(records))
        whole = clipped_batch(MODEL.peft_model, losses, MODEL.tensors, records, everything, C, tokens)
        rest = np.delete(everything, leave)
        without = clipped_batch(MODEL.peft_model, losses, MODEL.tensors, records, rest, C, tokens)
    assert all(torch.isfinite(value).all() for value in whole.values())
    assert distance(whole, without) <= C * (1 + 1e-4)


def _factors(examples: Batch, marked: Tensor, poison: float) -> Tensor:
    """(n,): `poison` for the example with a row that is among the marked ones, 1 for the others."""
    rows = examples.inputs["input_ids"]
    bad = torch.tensor([any(torch.equal(row, one) for one in marked) for row in rows])
    by_example = torch.zeros(len(examples), dtype=torch.bool)
    by_example[bad if examples.example_of_row is None else examples.example_of_row[bad]] = True
    return torch.where(by_example, poison, 1.0)


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_a_pass_waits_for_no_number_of_the_device(family: str) -> None:
    """On the meta device, which has shapes and no values, `bool`, `item` and `cpu` raise an error."""
    model = adapted(family)
    # Elsewhere transformers itself asks whether a batch has padding.
    model.peft_model.base_model.model.set_attn_implementation("eager")
    model.peft_model.to("meta")
    records = TinyRecords.of(batch(family, 4))
    found = clipped_batch(model.peft_model, model.losses, model.tensors, records, np.arange(4), C, 10**6)
    assert {name: value.shape for name, value in found.items()} == {
        name: tensor.zeros(1).shape[1:] for name, tensor in model.tensors.items()
    }
