"""A dry run says what the run then costs, and leaves no trace."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.console import Console
from typer.testing import CliRunner

import lorica
from lorica import cli
from lorica.errors import UserError
from lorica.privacy.accounting import Steps, epsilon
from lorica.privacy.mechanism import noisy_gradient
from lorica.rehearsal import rehearse
from lorica.reporting.rehearsal import rehearsal_table
from lorica.tasks.records import Records
from tests.tiers import slow

pytestmark = pytest.mark.usefixtures("checked_once", "without_report")
SMALL = ["federation.clients=2", "federation.partition=iid", "federation.rounds=3", "federation.local_steps=1"]
SMALL += ["federation.batch_size=32", "privacy.epsilon=null", "privacy.noise_multiplier=1.5"]


@pytest.fixture
def experiment(tmp_path: Path, some_digits: list[str]) -> Callable[..., lorica.Experiment]:
    place = [f"output={tmp_path / 'runs'}", f"privacy.ledger={tmp_path / 'ledger.sqlite'}"]
    return lambda *overrides: lorica.Experiment.load(overrides=[*SMALL, *place, *some_digits, *overrides])


def everything(folder: Path) -> dict[str, str]:
    """All files but those of caches, with their content."""
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("method", ["fedask", *slow("as-lora", "fedsa-lora")])
def test_it_says_what_the_run_then_sends_and_charges(
    experiment: Callable[..., lorica.Experiment], tmp_path: Path, method: str
) -> None:
    planned = experiment(f"method.name={method}")
    before = everything(tmp_path)
    found = rehearse(planned.config)
    assert everything(tmp_path) == before
    assert not (tmp_path / "ledger.sqlite").exists()
    assert not (tmp_path / "runs").exists()
    result = planned.run()
    for way in ("up", "down"):
        sent = [sum(row[f"bytes_{way}"].values()) for row in result.metrics[1:]]
        assert found["bytes"][way]["first_round"] == sent[0]
        assert found["bytes"][way]["later_round"] == pytest.approx(sent[1], rel=0.5)
        assert found["bytes"][way]["all"] == sent[0] + 2 * found["bytes"][way]["later_round"]
    for client, charged in zip(found["clients"], result.privacy["clients"], strict=True):
        for key in ("client", "records", "sampling_rate", "noise_multiplier", "steps", "epsilon"):
            assert client[key] == pytest.approx(charged[key]), key
        assert client["lifetime_epsilon_before"] == 0
        assert client["lifetime_epsilon_after"] == pytest.approx(charged["lifetime_epsilon"])
    seconds = found["seconds"]
    assert seconds["all"] == pytest.approx(
        3 * (2 * seconds["step"] + seconds["server_round"]) + 4 * seconds["evaluation"], rel=1e-6
    )
    assert 50e6 < found["memory"] < 50e9


@pytest.mark.integration
def test_what_earlier_runs_charged_counts_and_a_limit_refuses(
    experiment: Callable[..., lorica.Experiment], tmp_path: Path
) -> None:
    experiment().run()
    before = everything(tmp_path)
    limit = "privacy.max_lifetime_epsilon=100"
    found = rehearse(experiment("name=second", limit).config)
    for client in found["clients"]:
        rate, sigma = client["sampling_rate"], client["noise_multiplier"]
        assert client["lifetime_epsilon_before"] == pytest.approx(epsilon([Steps(rate, sigma, 3)], client["delta"]))
        assert client["lifetime_epsilon_after"] == pytest.approx(epsilon([Steps(rate, sigma, 6)], client["delta"]))
        assert client["left"] == pytest.approx(100 - client["lifetime_epsilon_after"])
    assert found["refused"] is None
    spent = found["clients"][0]["lifetime_epsilon_before"]
    tight = f"privacy.max_lifetime_epsilon={1.1 * spent}"
    refused = rehearse(experiment("name=second", tight).config)
    with pytest.raises(UserError) as raised:
        experiment("name=second", tight).run()
    assert refused["refused"] == str(raised.value)
    assert {client["left"] for client in refused["clients"]} == {0.0}
    page = Console(width=150, record=True, file=io.StringIO())
    page.print(rehearsal_table(refused))
    assert "The run would be refused: privacy.max_lifetime_epsilon" in page.export_text()
    # The refused run has claimed its folder's name, and nothing else.
    assert {path for path in everything(tmp_path) if "second" not in path} == set(before)


@pytest.mark.integration
def test_a_resumed_run_is_charged_for_what_remains(
    experiment: Callable[..., lorica.Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment().run(on_round=stop)
    [client, _] = rehearse(experiment().config)["clients"]
    rate, sigma = client["sampling_rate"], client["noise_multiplier"]
    assert client["lifetime_epsilon_before"] == pytest.approx(epsilon([Steps(rate, sigma, 2)], client["delta"]))
    assert client["lifetime_epsilon_after"] == pytest.approx(epsilon([Steps(rate, sigma, 3)], client["delta"]))


def test_shared_noise_has_two_adversaries(experiment: Callable[..., lorica.Experiment]) -> None:
    shared = ["federation.clients=3", "federation.min_clients=3", "federation.secure_sum=true", "method.name=ffa-lora"]
    found = rehearse(experiment(*shared, "privacy.noise_against=sums", "federation.rounds=1").config)
    for client in found["clients"]:
        # Three members, one of whom colludes: two summands make up the noise.
        assert client["own_noise_multiplier"] == pytest.approx(client["noise_multiplier"] / 2**0.5)
        assert client["epsilon_own_noise"] > client["epsilon"]
    page = Console(width=150, record=True, file=io.StringIO())
    page.print(rehearsal_table(found))
    assert "ε alone" in page.export_text()


def test_a_group_is_timed_with_all_records_that_it_may_have(
    experiment: Callable[..., lorica.Experiment],
    tmp_path: Path,
    some_digits: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = parquet.read_table(some_digits[0].partition("=")[2])
    patients = pa.array([str(index // 3) for index in range(len(table))])
    parquet.write_table(table.append_column("patient", patients), tmp_path / "grouped.parquet")
    timed: list[list[int]] = []

    def watched(model: Any, losses: Any, trained: Any, records: Records, *rest: Any) -> Any:
        timed.append(sorted(set(records.row_counts.tolist())))
        return noisy_gradient(model, losses, trained, records, *rest)

    monkeypatch.setattr("lorica.owner.client.noisy_gradient", watched)
    groups = ["privacy.unit=group", "privacy.group=patient", "privacy.group_records=5", "federation.rounds=1"]
    found = rehearse(experiment(f"task.train={tmp_path / 'grouped.parquet'}", *groups).config)
    assert [client["records"] for client in found["clients"]] == [100, 100]
    assert timed == [[5], [5]]


def test_a_wrong_run_is_refused_as_it_would_be(experiment: Callable[..., lorica.Experiment]) -> None:
    with pytest.raises(UserError, match="has only 300 records"):
        rehearse(experiment("federation.batch_size=400").config)
    with pytest.raises(UserError, match="on other machines"):
        rehearse(experiment("engine=flower", "flower.superlink=hub").config)


@pytest.mark.integration
def test_the_command_prints_one_document_or_a_table(
    experiment: Callable[..., lorica.Experiment], tmp_path: Path, some_digits: list[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "console", Console(width=150))
    command = ["run", "--dry-run", *SMALL, *some_digits, "federation.rounds=1"]
    done = CliRunner().invoke(cli.app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [client["records"] for client in found["clients"]] == [300, 300]
    page = CliRunner().invoke(cli.app, command).stdout
    assert "digits-as-lora: clients" in page
    assert "Nothing was charged" in page
    assert not (tmp_path / "runs").exists()
