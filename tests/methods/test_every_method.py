"""What must hold for every registered method, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorica.config import PrivacyConfig
from lorica.messages import Training
from lorica.methods.base import Method
from lorica.privacy.ledger import Ledger
from lorica.testing.checks import CHECKS, CLIENTS, centralised_updates, moved_sites, record, untrained
from lorica.testing.federation import DATASET, RUN, run_rounds, tiny_federation
from tests.methods.conftest import METHODS, REGISTRY, Recordings

TRAIN_BOTH = {
    *("fed-avg", "fedex-lora", "fedrot-lora", "fedsa-lora", "flex-lora", "flora", "het-lora", "la-lora", "lora-fair")
}


# The checks of one method follow one another, so that one process makes its recording.
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", METHODS)
def test_what_check_method_checks(name: str, check: str, recordings: Recordings) -> None:
    CHECKS[check](recordings(name))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("participants", [2, CLIENTS])
@pytest.mark.parametrize("name", METHODS)
def test_it_holds_with_all_clients_and_with_half_of_them(
    name: str, check: str, participants: int, recordings: Recordings
) -> None:
    """No secure sum takes two."""
    if check != "sums" or participants > 2:
        CHECKS[check](recordings(name, participants))


@pytest.mark.parametrize("name", METHODS)
def test_all_sites_move_and_all_planned_steps_are_taken(name: str, recordings: Recordings) -> None:
    recording = recordings(name)
    some = recording.federation
    sites = set() if name == "head-only" else {site.name for site in some.server.model.sites}
    assert moved_sites(recording) == sites or recording.kind.personal
    ledger = Ledger(recording.folder / "ledger.sqlite")
    assert {number: ledger.steps(RUN, number) for number in some.plans} == {
        number: plan.max_steps for number, plan in some.plans.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_who_trains_both_factors_leaves_nothing_alone(name: str, recordings: Recordings) -> None:
    """So for all others the check that what is not trained stays put looks at some tensor."""
    engine = recordings(name).engine
    resting = [
        untrained(request, ends[client])
        for requests, ends in zip(engine.requests, engine.ends, strict=True)
        for client, request in requests.items()
        if isinstance(request.work, Training)
    ]
    assert any(resting) != (name in TRAIN_BOTH)


@pytest.mark.parametrize("name", METHODS)
def test_replies_are_compared_with_gradient_descent(name: str, recordings: Recordings) -> None:
    """But for LA-LoRA's, whose filter is no plain step."""
    assert bool(centralised_updates(recordings(name))) != (name == "la-lora")


def test_la_lora_without_its_filter_is_compared_too(tmp_path: Path) -> None:
    recording = record("la-lora", tmp_path, {"smoothing": "none"})
    assert centralised_updates(recording)
    CHECKS["centralised"](recording)


def test_a_calibrated_run_stays_within_its_epsilon(tmp_path: Path) -> None:
    privacy = PrivacyConfig(epsilon=5.0, delta=1e-3, clip_norm=1.0, noise="reproducible")
    some = run_rounds(tiny_federation("ffa-lora", tmp_path, clients=1, privacy=privacy))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert len(ledger.releases(DATASET)) == 4
    for number, plan in some.plans.items():
        assert 4.9 < plan.epsilon(ledger.steps(RUN, number)) <= 5.0


def test_averaging_both_factors_has_the_known_error(recordings: Recordings) -> None:
    """`Σ w_k B_k A_k - B̄ Ā = Σ w_k (B_k - B̄)(A_k - Ā)`, and it is not zero."""
    recording = recordings("fed-avg")
    before, after = (recording.adapters[number].tensors for number in (2, 3))
    site = recording.federation.server.model.sites[0]
    (exchange,) = recording.exchanges[2]
    records = {client: recording.federation.plans[client].records for client in recording.engine.replies[exchange]}
    weights = {client: count / sum(records.values()) for client, count in records.items()}
    factors = {
        client: (before[site.a] + reply[site.a], before[site.b] + reply[site.b])
        for client, reply in recording.engine.replies[exchange].items()
    }

    def mean(of: dict[int, Tensor]) -> Tensor:
        return torch.stack([weights[client] * value for client, value in of.items()]).sum(0)

    mean_a, mean_b = (mean({client: pair[index] for client, pair in factors.items()}) for index in (0, 1))
    torch.testing.assert_close(after[site.a], mean_a)
    error = mean({client: b @ a for client, (a, b) in factors.items()}) - mean_b @ mean_a
    known = mean({client: (b - mean_b) @ (a - mean_a) for client, (a, b) in factors.items()})
    torch.testing.assert_close(error, known, rtol=1e-3, atol=1e-6)
    assert error.norm() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_described(name: str) -> None:
    method = REGISTRY[name]
    assert issubclass(method, Method)
    assert method.name == name
    assert "arXiv" in (method.__doc__ or "") or "ablation" in method.about.paper
    assert "DP:" in (method.__doc__ or "")
    assert all((method.about.paper, method.about.arxiv, method.about.trains, method.about.sends, method.about.privacy))
