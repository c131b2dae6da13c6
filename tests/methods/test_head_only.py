"""The baseline without an adapter: the head learns as with any method, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import torch

from lorica.testing.federation import UNCLIPPED, run_rounds, tiny_federation
from lorica.testing.models import mean_gradient, tiny_bert
from lorica.testing.records import TinyRecords


def test_a_round_is_gradient_descent_on_the_head_alone(tmp_path: Path) -> None:
    """One client, one step on all of its records, without noise or clip: a plain step by autograd."""
    some = tiny_federation("head-only", tmp_path, privacy=UNCLIPPED, clients=1, batch_size=20, steps=1, rounds=1)
    before = dict(some.server.model.tensors)
    run_rounds(some)
    records = TinyRecords.texts(20, 0)
    expected = mean_gradient(tiny_bert(), records.batch(range(20)))
    for name, value in some.server.model.tensors.items():
        step = 0.5 * expected[name] if name.startswith("head.") else torch.zeros_like(value)
        torch.testing.assert_close(value, before[name] - step)
    assert {name for request in some.engine.requests for name in request[0].work.trained} == {
        name for name in before if name.startswith("head.")
    }
