"""The loss and the evaluation of classifiers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lorica.tasks.classification import Classification, Regression
from lorica.tasks.metrics import OF_CLASSES, OF_NUMBERS
from lorica.tasks.records import Batch, Task
from tests.tasks.test_records import image_records, text_records

METRICS = OF_CLASSES | OF_NUMBERS


class PixelIsLogit(nn.Module):
    """Logits (pixel - 2, 0): label 0 where the pixel is above 2; notes the modes it was called in."""

    def __init__(self):
        super().__init__()
        self.frozen, self.dropout = nn.Linear(1, 1), nn.Dropout(0.5)
        self.called_in = set()

    def forward(self, pixel_values):
        self.called_in.add((self.training, self.dropout.training, torch.is_inference_mode_enabled()))
        score = pixel_values.flatten() - 2
        return SimpleNamespace(logits=torch.stack([score, torch.zeros_like(score)], 1))


def two_labels(count):
    records = image_records(count)
    records.labels[:] = records.labels % 2
    return records


def losses(logits, labels):
    return Classification().losses(SimpleNamespace(logits=logits), Batch({}, labels))


def task(records, **tests):
    return Task(records, {"": records, **tests}, ["a", "b"], Classification())


def test_losses_are_per_example_and_in_fp32_for_half_precision_logits():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    labels = torch.tensor([0, 2])
    expected = logits.logsumexp(1) - logits[torch.arange(2), labels]
    torch.testing.assert_close(losses(logits, labels), expected)
    from_half = losses(logits.bfloat16(), labels)
    assert from_half.dtype == torch.float32
    torch.testing.assert_close(from_half, expected)
    assert losses(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("tokens", [1, 8, 1000])
def test_evaluation_is_the_mean_over_records_whatever_the_micro_batches(tokens):
    records = two_labels(6)
    score = torch.arange(6.0) - 2
    expected = losses(torch.stack([score, torch.zeros(6)], 1), torch.from_numpy(records.labels)).mean()
    measured = Classification().evaluate(PixelIsLogit(), records, tokens, "cpu")
    # Right are record 1 (pixel below 2, label 1), record 2 (a tie goes to label 0) and record 4.
    assert measured == {"accuracy": pytest.approx(3 / 6), "loss": pytest.approx(expected.item())}


def test_evaluation_runs_in_evaluation_mode_and_restores_every_modules_own_mode():
    model = PixelIsLogit()
    model.train()
    model.frozen.eval()
    task(two_labels(4)).evaluate(model, 8, "cpu")
    assert model.called_in == {(False, False, True)}
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


def test_modes_are_restored_after_an_error():
    model = PixelIsLogit()
    with pytest.raises(TypeError):
        task(text_records([1, 2])).evaluate(model, 8, "cpu")
    assert model.dropout.training


def test_evaluation_covers_a_subset_only():
    records = two_labels(6).subset(np.array([4, 1, 2]))
    assert Classification().evaluate(PixelIsLogit(), records, 8, "cpu")["accuracy"] == 1.0


def test_further_test_sets_go_by_their_names():
    records = two_labels(6)
    one = records.subset(np.array([4, 1, 2]))
    found = task(records, mismatched=one).evaluate(PixelIsLogit(), 8, "cpu")
    assert found["accuracy"] == 0.5
    assert found["mismatched_accuracy"] == 1.0
    assert {"loss", "mismatched_loss"} < set(found)


def test_several_metrics_and_the_first_is_the_main_one():
    objective = Classification(("f1", "accuracy"))
    assert objective.metric == "f1"
    found = objective.evaluate(PixelIsLogit(), two_labels(6), 8, "cpu")
    # Predicted is label 1 for records 0 and 1 (pixel below 2), true is label 1 for 1, 3 and 5.
    assert found["f1"] == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))


def test_regression_is_squared_error_and_correlation():
    records = two_labels(6)
    targets = np.array([0.1, -3.0, 0.4, 1.0, 2.5, 2.0], dtype=np.float32)
    object.__setattr__(records, "labels", targets)
    objective = Regression()
    assert objective.metric == "pearson"
    score = np.arange(6.0) - 2
    found = objective.evaluate(PixelIsLogit(), records, 8, "cpu")
    assert found["loss"] == pytest.approx(np.mean((score - targets) ** 2), rel=1e-6)
    assert found["pearson"] == pytest.approx(np.corrcoef(score, targets)[0, 1])
    logits = torch.tensor([[1.0], [2.0]])
    values = objective.losses(SimpleNamespace(logits=logits), Batch({}, torch.tensor([0.5, 4.0])))
    torch.testing.assert_close(values, torch.tensor([0.25, 4.0]))


def test_metrics_are_glues_definitions():
    labels, predicted = np.array([1, 1, 0, 0, 1, 0, 1, 1]), np.array([1, 0, 0, 1, 1, 0, 1, 0])
    tp, fp, fn, tn = 3, 1, 2, 2
    assert METRICS["accuracy"](labels, predicted) == pytest.approx((tp + tn) / 8)
    assert METRICS["f1"](labels, predicted) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    other = 2 * tn / (2 * tn + fn + fp)
    assert METRICS["macro_f1"](labels, predicted) == pytest.approx((2 * tp / (2 * tp + fp + fn) + other) / 2)
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert METRICS["matthews"](labels, predicted) == pytest.approx(matthews)
    x, y = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert METRICS["spearman"](x, y) == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 3, 2, 4])[0, 1])
    assert METRICS["pearson"](x, np.ones(4)) == METRICS["spearman"](x, np.ones(4)) == 0.0
    assert METRICS["f1"](np.zeros(3), np.zeros(3)) == 0.0
