"""The audit of the mechanism finds planted faults, and refutes nothing that is right."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from lorica.audit.linear_model import Gradients, linear_model
from lorica.audit.mechanism import Auditor, audit_mechanism, judged
from lorica.errors import UserError
from lorica.methods.base import Method, Round, Server, Train, registry
from lorica.owner import client, cohort
from lorica.privacy import mechanism, passes
from lorica.privacy.mechanism import Terms
from lorica.privacy.randomness import SecureRandomness
from lorica.privacy.released import post_process
from lorica.reporting.audit import mechanism_table
from lorica.run.workers import worker_processes
from tests.models import one_at_a_time
from tests.tiers import integration

CANARIES = 256
Fault = Callable[[pytest.MonkeyPatch], None]
add_noise, clipped_sum, poisson_sample = mechanism.add_noise, passes.clipped_sum, mechanism.poisson_sample


def refuted(row: dict[str, Any] | None) -> list[str]:
    assert row is not None
    return list(judged([row])["rows"][0]["refuted"])


def less_noise(factor: float) -> Fault:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(mechanism, "add_noise", lambda value, std, draws: add_noise(value, std / factor, draws))

    return plant


def twice_the_clip_norm(patch: pytest.MonkeyPatch) -> None:
    """Of records' gradients, and of clients' updates."""
    for place in (passes, mechanism):
        patch.setattr(place, "clipped_sum", lambda gradients, norm: clipped_sum(gradients, 2 * norm))


def all_records(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mechanism, "poisson_sample", lambda records, rate, draws: np.arange(records))


def the_first_records(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mechanism, "poisson_sample", lambda records, rate, draws: np.arange(round(rate * records)))


def fixed_size(patch: pytest.MonkeyPatch) -> None:
    def sample(records: int, rate: float, draws: SecureRandomness) -> np.ndarray:
        return np.argsort(draws.uniform(records).numpy())[: round(rate * records)]

    patch.setattr(mechanism, "poisson_sample", sample)


def twice_the_rate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mechanism, "poisson_sample", lambda records, rate, draws: poisson_sample(records, 2 * rate, draws))


def the_same_noise_in_each_release(patch: pytest.MonkeyPatch) -> None:
    for place in (client, cohort):
        patch.setattr(place, "SecureRandomness", lambda seed: SecureRandomness(bytes(32)))


def the_same_noise_in_each_tensor(patch: pytest.MonkeyPatch) -> None:
    class Repeated(SecureRandomness):
        def normal(self, counts: Sequence[int]) -> list[Tensor]:
            (draws,) = super().normal([max(counts)])
            return [draws[:count] for count in counts]

    patch.setattr(client, "SecureRandomness", Repeated)


def an_unclipped_head(patch: pytest.MonkeyPatch) -> None:
    def clip(gradients: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
        head = {name: value for name, value in gradients.items() if name.startswith("head.")}
        factors = {name: value for name, value in gradients.items() if name not in head}
        return clipped_sum(factors, norm) | {name: value.double().sum(0) for name, value in head.items()}

    patch.setattr(passes, "clipped_sum", clip)


def a_clip_for_each_tensor(patch: pytest.MonkeyPatch) -> None:
    def clip(gradients: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
        return {name: clipped_sum({name: value}, norm)[name] for name, value in gradients.items()}

    patch.setattr(passes, "clipped_sum", clip)


def a_tensor_without_noise(patch: pytest.MonkeyPatch) -> None:
    def add(value: Tensor, std: float, draws: SecureRandomness) -> Tensor:
        return value if value.dim() == 2 and value.shape[0] == 2 else add_noise(value, std, draws)

    patch.setattr(mechanism, "add_noise", add)


def a_coordinate_without_noise(patch: pytest.MonkeyPatch) -> None:
    def add(value: Tensor, std: float, draws: SecureRandomness) -> Tensor:
        noisy = add_noise(value, std, draws)
        noisy.view(-1)[0] = value.view(-1)[0]
        return noisy

    patch.setattr(mechanism, "add_noise", add)


def division_by_the_true_size(place: Any, name: str) -> Fault:
    """Of what a function with `Terms` releases from a sample of several."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        releases, sizes = getattr(place, name), []

        def sample(records: int, rate: float, draws: SecureRandomness) -> np.ndarray:
            found = poisson_sample(records, rate, draws)
            # The only record of a client is in its batch anyway.
            sizes.extend([len(found)] if records > 1 else [])
            return found

        def divided(*arguments: Any) -> Any:
            found = releases(*arguments)
            (terms,) = (one for one in arguments if isinstance(one, Terms))
            return {name: post_process(lambda g: g * terms.batch_size / sizes[-1], g) for name, g in found.items()}

        patch.setattr(mechanism, "poisson_sample", sample)
        patch.setattr(place, name, divided)

    return plant


FAULTS: dict[str, tuple[Fault, str]] = {
    "σ/1.1": (less_noise(1.1), "noise variance"),
    "σ/1.5": (less_noise(1.5), "noise variance"),
    "σ/2": (less_noise(2.0), "noise variance"),
    "clip 2C": (twice_the_clip_norm, "clip"),
    "all records in each batch": (all_records, "sampling rate"),
    "the first records in each batch": (the_first_records, "batch sizes"),
    "batches of fixed size": (fixed_size, "batch sizes"),
    "2q": (twice_the_rate, "sampling rate"),
    "noise of another release": (the_same_noise_in_each_release, "noise independent between releases"),
    "noise of another tensor": (the_same_noise_in_each_tensor, "noise independent between tensors"),
    "an unclipped head": (an_unclipped_head, "nothing but clipped gradients and noise"),
    "a clip for each tensor": (a_clip_for_each_tensor, "nothing but clipped gradients and noise"),
    "a tensor without noise": (a_tensor_without_noise, "noise variance"),
    "a coordinate without noise": (a_coordinate_without_noise, "noise of each coordinate"),
    "the true batch size": (
        division_by_the_true_size(client, "noisy_gradient"),
        "division by the expected batch size, in Poisson batches",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, promise = FAULTS[fault]
    plant(monkeypatch)
    assert promise in refuted(Auditor(3.0, CANARIES).own_noise(registry()["fed-avg"]))


@pytest.mark.parametrize("fault", ["σ/1.1", *integration("the same noise for all owners", "clip 2C")])
def test_a_planted_fault_is_found_in_shared_noise(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, promise = FAULTS.get(fault, (the_same_noise_in_each_release, "noise independent between releases"))
    plant(monkeypatch)
    found = refuted(Auditor(3.0, CANARIES).shared_noise(registry()["ffa-lora"]))
    assert any(one.startswith(promise) for one in found)


def twice_the_clip_norm_of_changes(patch: pytest.MonkeyPatch) -> None:
    changes = cohort.Cohort._changes

    def found(self: cohort.Cohort, update: Mapping[str, Tensor]) -> Any:
        scale, pairs = changes(self, update)
        return 2 * scale, pairs

    patch.setattr(cohort.Cohort, "_changes", found)
    patch.setattr(mechanism, "clipped_sum", lambda updates, norm: clipped_sum(updates, 10 * norm))


@pytest.mark.parametrize(
    ("method", "plant", "promise"),
    [
        ("ffa-lora", twice_the_clip_norm, "clip"),
        *integration(
            ("ffa-lora", the_first_records, "batch sizes"),
            ("fed-avg", less_noise(1.1), "noise variance"),
            ("fed-avg", all_records, "sampling rate"),
            ("fed-avg", the_same_noise_in_each_release, "noise independent between releases"),
            (
                "fed-avg",
                division_by_the_true_size(cohort, "noisy_mean_update"),
                "division by the expected batch size, in Poisson batches",
            ),
            ("fed-power", less_noise(1.1), "noise variance"),
            ("fed-power", twice_the_clip_norm_of_changes, "clip"),
        ),
    ],
)
def test_a_planted_fault_is_found_in_means_of_clients(
    method: str, plant: Fault, promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    # 10 % less noise shows over thousands of coordinates only.
    clients = 192 if promise == "noise variance" else 64
    assert promise in refuted(Auditor(3.0, 8 * clients).client_level(registry()[method]))


def larger_sketches(patch: pytest.MonkeyPatch) -> None:
    sketch = client.sketch

    def larger(*args: Any) -> Any:
        return {name: post_process(lambda value: 1.01 * value, value) for name, value in sketch(*args).items()}

    patch.setattr(client, "sketch", larger)


def single_ranks_without_noise(patch: pytest.MonkeyPatch) -> None:
    def add(value: Tensor, std: float, draws: SecureRandomness) -> Tensor:
        return value if 1 in value.shape else add_noise(value, std, draws)

    patch.setattr(mechanism, "add_noise", add)


@pytest.mark.parametrize(
    ("method", "plant", "promise"),
    [
        ("lora-a2", single_ranks_without_noise, "noise variance"),
        *integration(
            ("fed-power", larger_sketches, "sketches are functions of noisy factors"),
            ("lora-a2", less_noise(1.1), "noise variance"),
            ("lora-a2", twice_the_clip_norm, "clip"),
            ("fed-power", less_noise(1.1), "noise variance"),
            ("fed-power", twice_the_clip_norm, "clip"),
            ("fedask", larger_sketches, "sketches are functions of noisy factors"),
        ),
    ],
)
def test_a_planted_fault_is_found_in_chosen_ranks_and_behind_sketches(
    method: str, plant: Fault, promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    # With 256 canaries, lora-a2 trains so few coordinates that one run in forty misses 10 % less noise.
    assert promise in refuted(Auditor(3.0, 2 * CANARIES).own_noise(registry()[method]))


@pytest.mark.parametrize(
    "method", ["fedask", *integration("deer", "as-lora", "fed-power", "fedsa-lora", "la-lora", "lora-a2")]
)
def test_what_is_right_is_not_refuted(method: str) -> None:
    """Half-rounds, sketches, chosen ranks, tensors that stay with the owner, smoothed steps, shared noise, clients."""
    found = audit_mechanism([method], epsilon=2.0, canaries=CANARIES)
    assert not found["refuted"]
    json.dumps(found)
    for row in found["rows"]:
        assert row["control"]["has_power"]
        assert row["control"]["auc"] > 0.99
        assert max(row["epsilon_one_run"], row["epsilon_fdp"]) <= row["claimed_epsilon"] <= 2.0
    shared = ["shared"] if method in {"as-lora", "lora-a2"} else []
    of_clients = ["client-level"] if method in {"as-lora", "fed-power"} else []
    assert [row["noise"] for row in found["rows"]] == ["own", *shared, *of_clients]


class Proximal(Method):
    """A method of another package whose steps cannot be undone."""

    name = "proximal"
    refuses: ClassVar[Mapping[str, str]] = {"shared_noise": "its steps are not linear"}

    def round(self, server: Server) -> Round:
        server.step((yield Train("B", local=replace(server.local, proximal=0.1))))


def test_a_method_that_cannot_be_read_is_not_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry()
    monkeypatch.setattr("lorica.methods.base.registry", lambda: known | {"proximal": Proximal})
    auditor = Auditor(3.0, 64)
    rows = [auditor.own_noise(Proximal)]
    assert auditor.shared_noise(Proximal) is None
    assert "do more to the noisy gradient than this audit can undo" in rows[0]["not_audited"]
    assert "not audited, because" in shown(judged(rows))


def test_the_table_names_what_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    less_noise(2.0)(monkeypatch)
    text = shown(judged([Auditor(3.0, 64).own_noise(registry()["ffa-lora"])]))
    assert re.search(r"ffa-lora +own .* refuted", text)
    assert "ffa-lora, own noise: noise variance (0.2" in text
    assert "Refuted, by" in text
    assert "Not refuted" not in text


def shown(audit: dict[str, Any]) -> str:
    """As a terminal of 80 columns shows it, on long lines."""
    console = Console(width=80, file=io.StringIO())
    console.print(mechanism_table(audit | {"epsilon": 3.0, "delta": 1e-5, "confidence": 0.95}))
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"(?<=\S)\n(?=\S)", " ", console.file.getvalue().replace(" \n", "\n"))


@pytest.mark.slow
def test_no_method_is_refuted() -> None:
    found = audit_mechanism()
    assert not found["refuted"]
    assert {row["method"] for row in found["rows"]} == set(registry())
    assert all("tests" in row and row["control"]["has_power"] for row in found["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("claimed", [1.0, 3.0, 8.0])
def test_bounds_lie_between_what_chance_gives_and_the_claim(claimed: float) -> None:
    row = Auditor(claimed, 4000).own_noise(registry()["ffa-lora"])
    assert 0.1 * claimed <= row["epsilon_one_run"] <= claimed
    assert 0.1 * claimed <= row["epsilon_fdp"] <= claimed


def test_gradients_in_closed_form_are_those_of_autograd() -> None:
    model = linear_model(12, seed=1)
    draws = torch.Generator().manual_seed(0)
    values = {name: torch.randn(value.shape, generator=draws) for name, value in model.read().items()}
    model.write(values)
    gradients = Gradients(model.sites, np.array([3, 8, 1]), 12)
    found = gradients.at(values, list(values))
    for name, expected in one_at_a_time(model, gradients.records(0).batch(np.arange(3))).items():
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.integration
def test_processes_audit_the_methods_in_order() -> None:
    with worker_processes(2) as executor:
        found = audit_mechanism(["ro-lora", "fed-sb", "head-only"], canaries=64, executor=executor)
    rows = [("ro-lora", 3), ("fed-sb", 2), ("head-only", 2)]
    assert [row["method"] for row in found["rows"]] == [name for name, count in rows for _ in range(count)]


def test_the_account_s_own_ledgers_stay_as_they_are(own_home: Any) -> None:
    audit_mechanism(["head-only"], canaries=64)
    assert not (own_home / "ledgers").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["ffa-lra"]}, "Did you mean 'ffa-lora'"),
        ({"canaries": 10}, "not between 64"),
        ({"epsilon": 50.0}, "not between 0.1 and 10"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        audit_mechanism(**arguments)
