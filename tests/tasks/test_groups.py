"""A group of records is one unit of privacy: sampled once, clipped once, bounded in what it brings."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lorica.privacy.clipping import clipped_sum
from lorica.privacy.gradients import per_example_gradients
from lorica.privacy.mechanism import Terms, noisy_gradient
from lorica.privacy.randomness import ReproducibleRandomness
from lorica.tasks.groups import GroupedRecords, grouped
from lorica.tasks.records import Batch
from lorica.testing.records import TinyRecords
from tests.models import adapted, one_at_a_time
from tests.tasks.test_records import text_records

MODEL = adapted("bert")
KEYS = np.array(["c", "a", "c", "b", "a", "c", "c"])


def members(groups: GroupedRecords) -> list[list[int]]:
    """Positions of each group's kept records."""
    pairs = zip(groups.starts, groups.sizes, strict=True)
    return [groups.members[start : start + size].tolist() for start, size in pairs]


def test_groups_come_in_order_of_appearance_with_their_records_in_order() -> None:
    groups = grouped(text_records([3, 4, 5, 6, 7, 8, 9]), KEYS, 10, 0)
    assert members(groups) == [[0, 2, 5, 6], [1, 4], [3]]
    assert len(groups) == 3
    assert groups.lengths.tolist() == [9, 7, 6]
    assert groups.row_counts.tolist() == [4, 2, 1]


def test_a_batch_holds_all_rows_of_the_asked_groups() -> None:
    groups = grouped(text_records([3, 4, 5, 6, 7, 8, 9]), KEYS, 10, 0)
    batch = groups.batch(np.array([2, 0]))
    assert len(batch) == 2
    assert batch.inputs["input_ids"][:, 0].tolist() == [3, 0, 2, 5, 6]
    assert batch.labels.tolist() == [3, 0, 2, 5, 6]
    assert batch.example_of_row.tolist() == [0, 1, 1, 1, 1]
    assert batch.weights.tolist() == [1.0, 0.25, 0.25, 0.25, 0.25]


def test_a_subset_has_its_own_groups_only() -> None:
    groups = grouped(text_records([3, 4, 5, 6, 7, 8, 9]), KEYS, 10, 0).subset(np.array([2, 1]))
    assert members(groups) == [[3], [1, 4]]
    assert groups.lengths.tolist() == [6, 7]
    assert groups.row_counts.tolist() == [1, 2]
    assert groups.batch(np.array([1])).labels.tolist() == [1, 4]
    nothing = groups.subset(np.array([], dtype=np.int64))
    assert len(nothing) == len(nothing.lengths) == len(list(nothing.micro_batches(np.arange(0), 10))) == 0


def test_the_loss_of_a_group_is_the_mean_over_its_records() -> None:
    records = TinyRecords.texts(7)
    groups = grouped(records, KEYS, 10, 0)
    batch = groups.batch(np.arange(3))
    found = per_example_gradients(lambda: MODEL.losses(MODEL.peft_model, batch), MODEL.tensors, 3, batch.example_of_row)
    for name, gradient in one_at_a_time(MODEL, records.batch(np.arange(7))).items():
        expected = torch.stack([gradient[rows].mean(0) for rows in ([0, 2, 5, 6], [1, 4], [3])])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_label_of_a_group_is_its_most_frequent() -> None:
    records = replace(text_records([1] * 7), labels=np.array([2, 1, 0, 1, 0, 2, 0]))
    # Group c has labels 2, 0, 2, 0; group a 1, 0.
    assert grouped(records, KEYS, 10, 0).labels.tolist() == [0, 0, 1]
    assert grouped(replace(records, labels=np.array([2, 1, 0, 1, 0, 2, 2])), KEYS, 10, 0).labels.tolist() == [2, 0, 1]


def test_at_most_so_many_records_are_kept_and_the_seed_chooses_which() -> None:
    records, keys = text_records([2] * 200), np.repeat(np.arange(40), 5)
    drawn = [members(grouped(records, keys, 2, seed)) for seed in range(60)]
    assert drawn[0] == members(grouped(records, keys, 2, 0)) != drawn[1]
    counts = np.zeros(200)
    for groups in drawn:
        for number, rows in enumerate(groups):
            assert len(rows) == 2
            assert sorted(rows) == rows
            assert all(row // 5 == number for row in rows)
            counts[rows] += 1
    # Each record is kept with probability 2/5: 60 seeds, binomial with standard deviation 3.8.
    assert counts.min() > 24 - 5 * 3.8
    assert counts.max() < 24 + 5 * 3.8
    assert abs(counts.mean() - 24) < 1e-9


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(1, 4), st.data())
def test_the_other_groups_do_not_notice_one_that_leaves(keys: list[int], most: int, data: st.DataObject) -> None:
    leave = data.draw(st.sampled_from(keys))
    stay = np.array([index for index, key in enumerate(keys) if key != leave], dtype=np.int64)
    if not len(stay):
        return
    records = text_records([2] * len(keys))
    everything = grouped(records, np.array(keys), most, 7)
    without = grouped(records.subset(stay), np.array(keys)[stay], most, 7)
    translated = [[int(stay[row]) for row in rows] for rows in members(without)]
    assert translated == [rows for rows in members(everything) if keys[rows[0]] != leave]
    kept = [index for index, rows in enumerate(members(everything)) if keys[rows[0]] != leave]
    assert np.array_equal(everything.digests[kept], without.digests)


@given(
    keys=st.lists(st.integers(0, 3), min_size=4, max_size=12).filter(lambda keys: len(set(keys)) > 1),
    most=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    clip_norm=st.sampled_from([0.01, 0.3, 5.0]),
    poison=st.booleans(),
    data=st.data(),
)
def test_adding_or_removing_a_group_moves_the_sum_by_at_most_c(
    keys: list[int], most: int, seed: int, clip_norm: float, poison: bool, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    MODEL.write({name: torch.randn(value.shape, generator=generator) for name, value in MODEL.read().items()})
    leave = data.draw(st.sampled_from(keys))
    stay = np.array([index for index, key in enumerate(keys) if key != leave])
    records = TinyRecords.texts(len(keys), seed)

    # No record has this token.
    mark = 3
    if poison:
        records.inputs["input_ids"][torch.from_numpy(np.array(keys) == leave), 0] = mark

    def losses(batch: Batch) -> torch.Tensor:
        values = F.cross_entropy(MODEL.peft_model(**batch.inputs).logits, batch.labels, reduction="none")
        marked = batch.inputs["input_ids"][:, 0] == mark
        return batch.by_example(torch.where(marked, values * math.nan, values))

    def total(some: TinyRecords, names: np.ndarray) -> dict[str, torch.Tensor]:
        groups = grouped(some, names, most, 3)
        summed: dict[str, torch.Tensor] = {}
        for batch in groups.micro_batches(np.arange(len(groups)), 40):
            found = per_example_gradients(lambda b=batch: losses(b), MODEL.tensors, len(batch), batch.example_of_row)
            for name, value in clipped_sum(found, clip_norm).items():
                summed[name] = summed.get(name, 0) + value
        return summed

    everything, without = total(records, np.array(keys)), total(records.subset(stay), np.array(keys)[stay])
    assert all(torch.isfinite(value).all() for value in everything.values())
    squares = [(everything[name].double() - without[name].double()).square().sum() for name in everything]
    assert math.sqrt(float(torch.stack(squares).sum())) <= clip_norm * (1 + 1e-4)


def test_a_step_samples_groups_and_not_records() -> None:
    """Without noise and with every group sampled: the sum of the groups' clipped mean gradients over b."""
    records = TinyRecords.texts(7)
    terms = Terms(sampling_rate=1.0, batch_size=3, clip_norm=0.05, noise_multiplier=0.0)
    for tokens in (1, 30, 10**6):
        groups = grouped(records, KEYS, 10, 0)
        found = noisy_gradient(
            MODEL.peft_model, MODEL.losses, MODEL.tensors, groups, terms, ReproducibleRandomness(0, 1, 1, 0), tokens
        )
        each = one_at_a_time(MODEL, records.batch(np.arange(7)))
        means = [{name: g[rows].mean(0) for name, g in each.items()} for rows in ([0, 2, 5, 6], [1, 4], [3])]
        norms = [math.sqrt(sum(float(g.square().sum()) for g in mean.values())) for mean in means]
        assert min(norms) > 0.05
        for name, value in found.items():
            expected = sum(0.05 * mean[name] / norm for mean, norm in zip(means, norms, strict=True)) / 3
            torch.testing.assert_close(value.tensor, expected, rtol=1e-3, atol=1e-6)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=40), st.integers(1, 80))
def test_micro_batches_stay_within_the_budget(content: list[tuple[int, int]], tokens: int) -> None:
    lengths, keys = zip(*content, strict=True)
    groups = grouped(text_records(lengths), np.array(keys), 3, 0)
    seen = 0
    for batch in groups.micro_batches(np.arange(len(groups)), tokens):
        assert batch.inputs["input_ids"].numel() <= tokens or len(batch) == 1
        seen += len(batch)
    assert seen == len(groups)


def test_the_fingerprint_is_of_the_records_and_their_grouping() -> None:
    records = text_records([2] * 7)
    print_ = grouped(records, KEYS, 10, 0).fingerprint()
    assert grouped(records, KEYS, 1, 0).fingerprint() == print_
    assert grouped(records, KEYS, 1, 5).fingerprint() == print_
    renamed = np.array([{"a": 9, "b": 1, "c": 4}[key] for key in KEYS])
    assert grouped(records, renamed, 10, 0).fingerprint() == print_
    assert grouped(records, KEYS[::-1], 10, 0).fingerprint() != print_
    assert grouped(records.subset(np.array([1, 0, 2, 3, 4, 5, 6])), KEYS, 10, 0).fingerprint() != print_


@pytest.mark.parametrize(("keys", "most"), [(np.arange(6), 1), (np.arange(7), 0)])
def test_keys_that_do_not_fit_are_refused(keys: np.ndarray, most: int) -> None:
    with pytest.raises(ValueError, match="keys for 7 records"):
        grouped(text_records([1] * 7), keys, most, 0)
