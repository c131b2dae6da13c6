"""`lorica budget` says what the ledger holds, and agrees with the runs that wrote it."""

from __future__ import annotations

import io
import json
import multiprocessing
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from opacus.accountants import PRVAccountant
from rich.console import Console
from typer.testing import CliRunner

from lorica.adapters.base_files import hash_of_base
from lorica.cli import app
from lorica.config import load
from lorica.experiment import Experiment
from lorica.privacy.accounting import Steps, epsilon
from lorica.privacy.exposures import Exposure
from lorica.privacy.ledger import Ledger, Release
from lorica.privacy.plan import Refused, plan_client
from lorica.privacy.policy import Policy
from lorica.privacy.unit import RECORD
from lorica.reporting.budget import budget_table, read_budget
from lorica.run.result import Result
from tests.ledgers import write
from tests.reports import draw_nothing

POLICY: dict[str, Any] = {
    "max_epsilon": 8.0,
    "delta": 1e-4,
    "base_models": None,
    "tasks": [{"type": "image-classification"}],
}


def release(**changes: Any) -> Release:
    content = {"dataset": "d" * 64, "records": "o" * 64, "run": "r" * 32, "client": 0, "round": 1, "request": "digest"}
    terms = {"sampling_rate": 0.1, "noise_multiplier": 1.0, "clip_norm": 2.0, "steps": 5, "noise": "secure"}
    return Release(**content | terms | changes)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, some_digits: list[str], checked_once: None
) -> tuple[Result, Path]:
    """Two runs on one partition of the digits, with held-out records; the second one's result, and the ledger."""
    folder = tmp_path_factory.mktemp("budget")
    ledger = folder / "ledger.sqlite"
    for name, rounds in (("first", 3), ("second", 2)):
        small = [
            "federation.clients=2",
            "federation.partition=iid",
            "federation.local_steps=2",
            "federation.private_test=0.1",
            "federation.batch_size=32",
            "privacy.epsilon=null",
            "privacy.noise_multiplier=1.0",
            *some_digits,
        ]
        own = [f"output={folder}", f"name={name}", f"federation.rounds={rounds}", f"privacy.ledger={ledger}"]
        with pytest.MonkeyPatch.context() as patched:
            draw_nothing(patched)
            result = Experiment.load(None, [*small, *own]).run()
    return result, ledger


@pytest.mark.integration
def test_it_agrees_with_what_the_runs_stated(finished: tuple[Result, Path]) -> None:
    result, ledger = finished
    found = read_budget(ledger, 1e-4)
    assert len(found["runs"]) == 4
    stated = result.privacy["clients"]
    for row, client in zip(found["runs"][2:], stated, strict=True):
        assert row["client"] == client["client"]
        assert row["rounds"] == row["releases"] == client["releases"] == 2
        assert row["steps"] == client["steps"] == 4
        assert row["sampling_rates"] == [client["sampling_rate"]]
        assert row["noise_multipliers"] == [client["noise_multiplier"]]
        assert row["clip_norms"] == [1.0]
        assert row["epsilon"] == pytest.approx(client["epsilon"], rel=1e-12)
        assert row["first"] <= row["last"]
    lives = [row["lifetime_epsilon"] for row in found["owners"]]
    assert lives == pytest.approx([client["lifetime_epsilon"] for client in stated], rel=1e-12)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_a_policy_counts_all_clients_as_one_owner(finished: tuple[Result, Path]) -> None:
    _, ledger = finished
    rows = Ledger(ledger).releases()
    accountant = PRVAccountant()
    accountant.history = [(row.noise_multiplier, row.sampling_rate, row.steps) for row in rows]
    found = read_budget(ledger, 0.5, Policy(**POLICY))
    assert found["delta"] == 1e-4
    spent = found["policy"]["spent"]
    assert spent == pytest.approx(accountant.get_epsilon(1e-4, eps_error=0.01), rel=0.01)
    assert found["policy"]["left"] == 8.0 - spent


def test_the_policy_knows_what_a_private_test_computes(finished: tuple[Result, Path]) -> None:
    result, ledger = finished
    line = json.loads((ledger.parent / "ledger.private-metrics.jsonl").read_text().splitlines()[0])
    computed = [name for name in line if name not in ("run", "client", "round")]
    config = load(result.folder / "config.yaml")
    plan = plan_client(0, 800, config.federation.batch_size, 4, config.privacy)
    limits = POLICY | {"max_epsilon": 100.0, "min_noise_multiplier": 0.01}
    Policy(**limits, metrics=computed).review(config, plan, hash_of_base("lorica:glyph-vit"))
    for name in computed:
        policy = Policy(**limits, metrics=[other for other in computed if other != name])
        with pytest.raises(Refused, match=rf"policy\.metrics: .*\['{name}'\]"):
            policy.review(config, plan, hash_of_base("lorica:glyph-vit"))


def lines(budget: dict[str, Any]) -> tuple[str, str]:
    """As plain text, and with the terminal's colours."""
    console = Console(width=160, file=io.StringIO(), force_terminal=True, color_system="standard", record=True)
    console.print(budget_table(budget))
    return console.export_text(clear=False), console.export_text(styles=True)


def test_what_no_noise_protects_is_red_and_infinite(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    write(ledger, release(), b"reply")
    write(ledger, release(run="bare" * 8, noise="none", noise_multiplier=0.0, clip_norm=float("inf")), b"reply")
    found = read_budget(ledger.path, 1e-5, Policy(**POLICY))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [row["epsilon"] is None for row in found["runs"]] == [False, True]
    assert found["owners"][0]["unprotected"] == 1
    assert found["owners"][0]["lifetime_epsilon"] is None
    assert found["policy"] == {"max_epsilon": 8.0, "delta": 1e-4, "spent": None, "left": 0.0}
    text, coloured = lines(found)
    assert "nothing is left" in text
    red = [line for line in coloured.splitlines() if "\x1b[31m" in line]
    assert len(red) == 3
    assert "barebare: " in red[0]
    assert "no noise" in red[0]
    assert all("∞" in line for line in red[1:])


def test_at_80_columns_runs_go_by_name_and_no_word_is_broken(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    for number, name in (("a" * 32, "digits-as-lora"), ("b" * 32, "x" * 40)):
        ledger.introduce_run(number, name)
        for client in (0, 17):
            terms = {"run": number, "client": client, "noise_multiplier": 12.3456, "noise": "reproducible"}
            write(ledger, release(**terms, sampling_rate=0.123456), b"reply")
            write(ledger, release(**terms, round=2, clip_norm=0.123), b"reply")
    found = read_budget(ledger.path, 1e-5)
    assert {row["name"] for row in found["runs"]} == {"digits-as-lora", "x" * 40}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(budget_table(found))
    words = set(console.export_text().replace(",", " ").replace(":", " ").split())
    assert {"digits-as-lora", "x" * 40, "(aaaaaaaa)", "reproducible", "Unprotected"} <= words
    assert {"17", "0.1235", "12.35", "0.123", "oooooooo", "Records", "Client", "Rounds", "Steps"} <= words


def test_a_reservation_is_released_by_the_name_of_its_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    terms = {"unit": RECORD, "noise": "secure", "sampling_rate": 0.1, "noise_multiplier": 1.0}
    for number in ("r" * 32, "s" * 32):
        ledger.introduce_run(number, "mine")
        held = Exposure(
            ledger.identity, number, 0, "o" * 64, steps=0, planned=12, releases=0, own_noise_multiplier=1.0, **terms
        )
        ledger.reserve([held])
    assert "several runs have this name" in run("budget", str(ledger.path), "--release", "mine", code=2)
    run("budget", str(ledger.path), "--release", "ssss")
    run("budget", str(ledger.path), "--release", "mine")
    assert read_budget(ledger.path, 1e-5)["reserved"] == []


def test_another_partition_without_noise_leaves_no_owner_protected(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    write(ledger, release(), b"reply")
    write(ledger, release(run="other", records="p" * 64, noise="reproducible"), b"reply")
    assert [row["lifetime_epsilon"] for row in read_budget(ledger.path, 1e-5)["owners"]] == [None, None]


def test_what_is_left_is_never_rounded_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    write(ledger, release(), b"reply")
    found = read_budget(ledger.path, 1e-5, Policy(**POLICY))
    found["policy"] |= {"spent": 2.9912, "left": 5.0088}
    assert "ε = 3.00 of 8 is spent, 5.00 is left" in lines(found)[0]


def killed_while_writing(path: Path, started: Any) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    # What does not fit in the cache goes to the file before the commit.
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE releases SET steps = 0, reply = randomblob(9000)")
    started.set()
    signal.pause()


def test_a_ledger_whose_writer_was_killed_can_be_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    for number in range(1, 30):
        write(ledger, release(round=number), b"reply" * 999)
    before = read_budget(ledger.path, 1e-5)
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=killed_while_writing, args=(ledger.path, started))
    process.start()
    assert started.wait(60)
    process.kill()
    process.join()
    assert (tmp_path / "l.sqlite-journal").stat().st_size > 0
    assert read_budget(ledger.path, 1e-5) == before


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_finds_the_ledger_beside_the_data(tmp_path: Path) -> None:
    data = tmp_path / "private.csv"
    data.touch()
    write(Ledger(tmp_path / "private.csv.ledger.sqlite"), release(), b"reply")
    found = json.loads(run("budget", str(data), "--json", "--delta", "1e-6"))
    assert found == json.loads(run("budget", f"{data}.ledger.sqlite", "--json", "--delta", "1e-6"))
    assert found == read_budget(data, 1e-6)
    (tmp_path / "policy.yaml").write_text(
        "{max_epsilon: 8, delta: 1e-5, base_models: null, tasks: [{type: text-regression}]}"
    )
    assert "is left" in run("budget", str(data), "--policy", str(tmp_path / "policy.yaml"))


def test_a_ledger_that_lost_rows_is_shown_so_and_can_be_accepted(tmp_path: Path) -> None:
    data, path = tmp_path / "private.csv", tmp_path / "private.csv.ledger.sqlite"
    data.touch()
    write(Ledger(path), release())
    before = path.read_bytes()
    write(Ledger(path), release(round=2))
    path.write_bytes(before)
    assert "it has 1 rows, but had 2" in lines(read_budget(data, 1e-5))[0]
    assert path.read_bytes() == before
    assert json.loads(run("budget", str(data), "--accept", "--json"))["problem"] is None
    path.unlink()
    assert "new ledger" in run("budget", str(data), "--accept")
    Ledger(path)


def test_what_runs_have_reserved_is_shown_and_can_be_released(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    terms = {"unit": RECORD, "noise": "secure", "sampling_rate": 0.1, "noise_multiplier": 1.0}
    terms["own_noise_multiplier"] = 1.0
    held = Exposure(ledger.identity, "r" * 32, 0, "o" * 64, steps=0, planned=12, releases=0, **terms)
    ledger.reserve([held])
    write(ledger, release())
    (row,) = read_budget(ledger.path, 1e-5)["reserved"]
    assert (row["run"], row["client"], row["steps"]) == ("r" * 32, 0, 7)
    assert row["epsilon"] == epsilon([Steps(0.1, 1.0, 7)], 1e-5)
    assert "Unused reservations" in lines(read_budget(ledger.path, 1e-5))[0]
    assert json.loads(run("budget", str(ledger.path), "--release", "rrrr", "--json"))["reserved"] == []
    assert "no such run has a reservation" in run("budget", str(ledger.path), "--release", "rrrr", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv"], "no such file"),
        (["data.csv"], "there is no ledger next to it"),
        (["data.csv", "--delta", "2"], "--delta"),
        (["data.csv", "--delta", "0.1", "--policy", "policy.yaml"], "--delta"),
        (["data.csv", "--policy", "absent.yaml"], "no such file"),
    ],
)
def test_mistakes_are_one_line_and_make_no_file(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").touch()
    before = sorted(tmp_path.iterdir())
    output = run("budget", *arguments, code=2)
    assert message in output
    assert len(output.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_hash_is_printed_whole() -> None:
    assert run("hash", "lorica:glyph-vit").strip() == hash_of_base("lorica:glyph-vit")
    assert "no such folder" in run("hash", "./absent", code=2)
