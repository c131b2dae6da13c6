"""The loss and the evaluation of classifiers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lorica.tasks.classification import evaluate, losses
from tests.tasks.test_records import image_records, text_records


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
    measured = evaluate(PixelIsLogit(), records, tokens, "cpu")
    # Right are record 1 (pixel below 2, label 1), record 2 (a tie goes to label 0) and record 4.
    assert measured == {"accuracy": pytest.approx(3 / 6), "loss": pytest.approx(expected.item())}


def test_evaluation_runs_in_evaluation_mode_and_restores_every_modules_own_mode():
    model = PixelIsLogit()
    model.train()
    model.frozen.eval()
    evaluate(model, two_labels(4), 8, "cpu")
    assert model.called_in == {(False, False, True)}
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


def test_modes_are_restored_after_an_error():
    model = PixelIsLogit()
    with pytest.raises(TypeError):
        evaluate(model, text_records([1, 2]), 8, "cpu")
    assert model.dropout.training


def test_evaluation_covers_a_subset_only():
    records = two_labels(6).subset(np.array([4, 1, 2]))
    assert evaluate(PixelIsLogit(), records, 8, "cpu")["accuracy"] == 1.0
