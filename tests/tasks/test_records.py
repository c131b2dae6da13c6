"""Micro-batches and fingerprints, on text records and on image records made of arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.tasks.images import ImageRecords
from lorica.tasks.records import Batch, Records, digest, stack_digests
from lorica.tasks.text import TextRecords

PAD, PAD_TYPE = -7, 9


def text_records(lengths, token_types: bool = True) -> TextRecords:
    """Record i has label i and repeats the token i."""
    sizes = np.array(lengths, dtype=np.int64)
    count = len(sizes)
    tokens = np.repeat(np.arange(count, dtype=np.int32), sizes)
    return TextRecords(
        labels=np.arange(count),
        digests=stack_digests([digest([bytes([i])]) for i in range(count)]),
        tokens=tokens,
        token_types=np.ones(len(tokens), dtype=np.int8) if token_types else None,
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        pad=PAD,
        pad_type=PAD_TYPE,
    )


def image_records(count: int, patches: int = 4) -> ImageRecords:
    """Record i has label i and one pixel of value i."""
    return ImageRecords(
        labels=np.arange(count),
        digests=stack_digests([digest([bytes([i])]) for i in range(count)]),
        pixels=np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1),
        rows=np.arange(count),
        patches=patches,
    )


@st.composite
def records_and_indices(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=40))
    indices = draw(st.lists(st.integers(0, len(lengths) - 1), max_size=60))
    return lengths, np.array(indices, dtype=np.int64)


@given(case=records_and_indices(), tokens=st.integers(1, 60))
def test_micro_batches_hold_each_asked_record_once_within_the_budget(case, tokens):
    lengths, indices = case
    batches = list(text_records(lengths).micro_batches(indices, tokens))
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == sorted(indices.tolist())
    for batch in batches:
        assert batch.inputs["input_ids"].numel() <= tokens or len(batch) == 1


@given(case=records_and_indices(), tokens=st.integers(1, 60))
def test_micro_batches_are_sorted_by_length(case, tokens):
    lengths, indices = case
    batches = list(text_records(lengths).micro_batches(indices, tokens))
    sizes = [lengths[label] for batch in batches for label in batch.labels.tolist()]
    assert sizes == sorted(sizes)


@given(case=records_and_indices(), tokens=st.integers(1, 60))
def test_padding_is_masked_and_reaches_only_to_the_longest_record_of_its_batch(case, tokens):
    lengths, indices = case
    for batch in text_records(lengths).micro_batches(indices, tokens):
        sizes = torch.tensor([lengths[label] for label in batch.labels])
        real = torch.arange(int(sizes.max())) < sizes[:, None]
        expected = batch.labels[:, None].expand_as(real)
        assert torch.equal(batch.inputs["attention_mask"], real.long())
        assert torch.equal(batch.inputs["input_ids"], torch.where(real, expected, PAD))
        assert torch.equal(batch.inputs["token_type_ids"], torch.where(real, 1, PAD_TYPE))


def test_text_inputs_are_int64_and_token_types_are_absent_where_the_tokenizer_makes_none():
    batch = text_records([2, 3], token_types=False).batch(np.array([1, 0]))
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert all(tensor.dtype == torch.int64 for tensor in [*batch.inputs.values(), batch.labels])
    assert batch.labels.tolist() == [1, 0]


def test_images_are_cut_by_their_patches():
    records = image_records(7, patches=4)
    batches = list(records.micro_batches(np.array([6, 0, 3, 2, 5]), tokens=11))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    pixels = torch.cat([batch.inputs["pixel_values"] for batch in batches])
    assert pixels.flatten().tolist() == [6, 0, 3, 2, 5]


@pytest.mark.parametrize("records", [text_records([3, 1, 2]), image_records(3)], ids=["text", "images"])
class TestAnyRecords:
    def test_no_index_gives_no_batch(self, records: Records):
        assert list(records.micro_batches(np.array([], dtype=np.int64), 10)) == []

    def test_subset_of_a_subset_is_the_records_asked_for(self, records: Records):
        inner = records.subset(np.array([2, 0])).subset(np.array([1, 0]))
        assert inner.labels.tolist() == [0, 2]
        alone, direct = inner.batch(np.array([1])), records.batch(np.array([2]))
        assert all(torch.equal(alone.inputs[name], direct.inputs[name]) for name in direct.inputs)

    def test_fingerprint_belongs_to_the_records_and_their_order(self, records: Records):
        whole = records.fingerprint()
        assert len(whole) == 64
        assert whole == records.fingerprint() == records.subset(np.arange(3)).fingerprint()
        orders = ([0, 1], [1, 0], [0, 2], [0, 1, 1])
        others = {records.subset(np.array(order)).fingerprint() for order in orders}
        assert len(others | {whole}) == 5


def test_digest_tells_apart_the_same_bytes_divided_otherwise():
    assert len({digest([b"ab", b"c"]), digest([b"a", b"bc"]), digest([b"abc"]), digest([b"abc", b""])}) == 4


def test_batch_moves_all_its_tensors():
    batch = Batch({"input_ids": torch.ones(2, 3)}, torch.zeros(2)).to("meta")
    assert batch.labels.is_meta
    assert batch.inputs["input_ids"].is_meta
    assert len(batch) == 2


def test_rows_of_several_examples_travel_and_part_together():
    batch = Batch(
        {"x": torch.arange(4)}, torch.arange(4), torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.5, 0.25, 3.0])
    )
    assert len(batch) == 3
    moved = batch.to("meta")
    assert {
        tensor.device.type for tensor in (*moved.inputs.values(), moved.labels, moved.example_of_row, moved.weights)
    } == {"meta"}
    one = batch.example(1)
    assert len(one) == 1
    assert one.inputs["x"].tolist() == one.labels.tolist() == [1, 2]
    assert one.example_of_row.tolist() == [0, 0]
    assert one.weights.tolist() == [0.5, 0.25]
    assert batch.by_example(torch.tensor([1.0, 2.0, 4.0, 5.0])).tolist() == [1.0, 2.0, 15.0]
    assert one.by_example(torch.tensor([2.0, 4.0])).tolist() == [2.0]


def test_a_loss_that_is_no_number_spoils_its_own_example_only():
    batch = Batch({}, torch.arange(4), torch.tensor([0, 1, 1, 2]))
    found = batch.by_example(torch.tensor([1.0, float("nan"), 4.0, float("inf")]))
    assert found.isnan().tolist() == [False, True, False]
    assert found[0] == 1
    assert found[2].isinf()


def test_without_owners_each_row_is_an_example():
    batch = Batch({"x": torch.arange(3)}, torch.arange(3))
    losses = torch.rand(3)
    assert len(batch) == 3
    assert batch.by_example(losses) is losses
    assert batch.example(2).inputs["x"].tolist() == [2]
    assert batch.example(2).example_of_row is None
    assert batch.row_weights().tolist() == [1, 1, 1]
