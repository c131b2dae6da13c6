"""Clients of a simulation that sit rounds out hold nothing, and go on as if they had kept everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorica.engines.local import LocalEngine
from lorica.testing.federation import RecordingEngine, run_rounds, tiny_federation
from tests.tiers import integration

CLIENTS, PARTICIPANTS, ROUNDS = 5, 2, 6


def federation(method: str, folder: Path, ranks: dict[int, int]) -> tuple[RecordingEngine, dict[str, torch.Tensor]]:
    some = tiny_federation(
        method, folder, clients=CLIENTS, participants=PARTICIPANTS, rounds=ROUNDS, steps=1, ranks=ranks
    )
    run_rounds(some)
    assert isinstance(some.engine, RecordingEngine)
    return some.engine, some.server.model.tensors


@pytest.mark.parametrize(
    ("method", "ranks"),
    [("flora", {}), ("fedask", {}), *integration(("ffa-lora", {}), ("het-lora", {0: 2, 1: 1, 2: 2, 3: 1, 4: 1}))],
)
def test_what_a_client_forgets_it_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, ranks: dict[int, int]
) -> None:
    engine, tensors = federation(method, tmp_path / "forgetful", ranks)
    holding = {number for number, client in engine.clients.items() if client.held or client.merged}
    assert holding == set(engine.requests[-1])
    # Requests build on each other all the same: only the first to a client has everything.
    sequences = [request.sequence for requests in engine.requests for request in requests.values()]
    assert sequences.count(0) == CLIENTS
    monkeypatch.setattr(LocalEngine, "_remind", lambda self, requests: None)
    keeping, expected = federation(method, tmp_path / "keeping", ranks)
    assert sum(bool(client.held) for client in keeping.clients.values()) == CLIENTS
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    for found, known in zip(engine.ends, keeping.ends, strict=True):
        for number, end in known.items():
            assert all(torch.equal(found[number].held.tensors[name], value) for name, value in end.held.tensors.items())
            assert found[number].held.merged.keys() == end.held.merged.keys()
    # The digests too, by which an owner recognises a request.
    rows = [engine.clients[0].ledger.releases(), keeping.clients[0].ledger.releases()]
    assert [row.request for row in rows[0]] == [row.request for row in rows[1]]
