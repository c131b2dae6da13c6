"""The command as a user runs it, in this process; in its own where processes differ."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lorica import cli
from lorica.benchmark.results import RESULTS, add_result
from lorica.config import load
from lorica.reporting.methods import method_rows
from tests.benchmark.suites import finished, small_suite, write_suite

COMMAND = Path(sys.executable).parent / "lorica"
SMALL = [
    "federation.clients=2",
    "federation.partition=iid",
    "federation.rounds=3",
    "federation.local_steps=1",
    "federation.batch_size=16",
    "privacy.noise=reproducible",
]
CHOSEN_NOISE = ["privacy.epsilon=null", "privacy.noise_multiplier=1.0"]
HEAVY = {"transformers", "peft", "scipy", "sklearn", "matplotlib", "flwr", "dp_accounting"}


@pytest.fixture
def lorica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command in this process and in a folder of its own; gives back what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0, columns: int = 150) -> str:
        monkeypatch.setattr(cli, "console", Console(width=columns))
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == code, done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        assert "Traceback" not in done.stderr
        return done.stdout

    return run


def in_a_process(*command: str | Path, folder: Path) -> str:
    environment = os.environ | {"COLUMNS": "150"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.usefixtures("checked_once")
@pytest.mark.integration
@pytest.mark.parametrize("apart", [False, True])
def test_run_shows_progress_and_ends_with_what_was_reached(
    lorica: Callable[..., str], tmp_path: Path, some_digits: list[str], apart: bool
) -> None:
    run = ["run", *SMALL, *some_digits]
    output = in_a_process(COMMAND, *run, folder=tmp_path) if apart else lorica(*run)
    for number in range(4):
        assert re.search(rf"round +{number} +accuracy +\d+\.\d %", output)
    assert "ε 3.00" in output
    assert "LoRA of rank 4 on 8 linear maps (q_proj, v_proj) in 4 layers" in output
    assert "runs/digits-as-lora/adapter" in output
    assert "runs/digits-as-lora/report.html" in output
    assert (tmp_path / "runs/digits-as-lora/report.html").is_file()
    again = lorica(*run)
    assert "already finished" in again
    assert "name=digits-as-lora-2" in again
    (tmp_path / "runs/digits-as-lora/report.html").unlink()
    assert "report.html" in lorica("report", "runs/digits-as-lora")
    assert (tmp_path / "runs/digits-as-lora/report.html").is_file()


def test_an_error_may_quote_what_looks_like_markup(lorica: Callable[..., str]) -> None:
    assert "'[/bold] [query].yaml': no such file" in lorica("run", "[/bold] [query].yaml", code=2)


@pytest.mark.integration
@pytest.mark.usefixtures("checked_once", "without_report")
def test_compare_is_resumable_and_writes_its_plots(
    lorica: Callable[..., str], tmp_path: Path, some_digits: list[str]
) -> None:
    sweep = [
        "compare",
        *SMALL,
        *some_digits,
        *CHOSEN_NOISE,
        "federation.rounds=1",
        "--methods",
        "ro-lora,as-lora:score=energy+gauge=none+server.denoise=kalman",
        "--seeds",
        "0,1",
    ]
    output = lorica(*sweep)
    assert "ro-lora" in output
    assert "as-lora:score=energy" in output
    configs = {path.parent.name: load(path) for path in (tmp_path / "runs").glob("*/*/config.yaml")}
    assert {name: config.server.denoise for name, config in configs.items() if "seed0" in name} == {
        "ro-lora-seed0": "none",
        "as-lora-score-energy-gauge-none-server.denoise-kalman-seed0": "kalman",
    }
    folder = tmp_path / "runs/digits-as-lora-comparison"
    for name in ("comparison.html", "comparison.png", "final.png", "comparison.json", "comparison.md"):
        assert (folder / name).is_file(), name
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    assert len(before) == 4
    assert "round" not in lorica(*sweep).split("ro-lora, seed 0")[1].split("as-lora")[0].lower()
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}


def test_account_prints_both_accountants(lorica: Callable[..., str]) -> None:
    counts = ["--records", "4000", "--batch-size", "64", "--steps", "500", "--delta", "1e-5"]
    output = lorica("account", *counts, "--noise-multiplier", "0.8")
    assert "3.74" in output
    assert "PLD" in output
    assert "RDP" in output
    assert "0.872" in lorica("account", *counts, "--epsilon", "3")
    assert "exactly one of --epsilon and --noise-multiplier" in lorica("account", *counts, code=2)


def test_account_of_clients_says_what_is_protected_and_sampled(
    lorica: Callable[..., str], for_scripts: Callable[..., tuple[Any, str]]
) -> None:
    counts = ["--records", "1000", "--batch-size", "300", "--steps", "100", "--noise-multiplier", "2"]
    output = lorica("account", "--unit", "client", *counts)
    assert "everything of one client" in output
    assert "server is trusted" in " ".join(output.replace("│", " ").split())
    assert "300 of 1,000 clients in a round, on average" in output
    assert re.search(r"rounds +│ 100", output)
    assert "steps" not in output
    by_records = lorica("account", *counts)
    assert "one record of the client" in by_records
    assert "300 of 1,000 records in a step, on average" in by_records
    # The same subsampled mechanism, whatever is sampled.
    found, _ = for_scripts("account", "--unit", "client", *counts)
    assert (found["unit"], found["sampling_rate"]) == ("client", 0.3)
    assert found["epsilon"] == for_scripts("account", *counts)[0]["epsilon"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--records", "60", "--epsilon", "3", "--unit", "client"], "--batch-size = 64: there are 60 clients"),
        (["--delta", "1e-3", "--epsilon", "3", "--unit", "client"], "one over the number of clients"),
        (["--delta", "0.5", "--epsilon", "3"], "less than 0.5"),
        (["--delta", "0.1", "--epsilon", "3"], "not below 1/4000"),
        (["--delta", "1e-3", "--epsilon", "3"], "not below 1/4000"),
        (["--epsilon", "1000"], "less than or equal to 100"),
        (["--epsilon", "nan"], "finite"),
        (["--noise-multiplier", "1e-9"], "greater than or equal to 0.001"),
    ],
)
def test_account_refuses_what_means_nothing_before_it_computes(
    lorica: Callable[..., str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    from lorica.privacy import accounting

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a loss distribution was computed")

    monkeypatch.setattr(accounting, "from_gaussian_mechanism", never)
    counts = ["--records", "4000", "--batch-size", "64", "--steps", "500"]
    assert message in lorica("account", *counts, *options, code=2)


@pytest.mark.parametrize("columns", [80, 120])
def test_methods_are_listed(lorica: Callable[..., str], columns: int) -> None:
    """Names and numbers stay whole, and of the cells that wrap no character is lost."""
    output = lorica("methods", columns=columns)
    assert max(len(line) for line in output.splitlines()) <= columns
    rows = method_rows()
    for name, *_, papers in rows:
        assert re.search(rf"^ {name} ", output, flags=re.M)
        assert all(number in output for number in papers.split(", "))
    cells = "".join(cell for row in rows for cell in row)
    assert not Counter(re.sub("[ ,]", "", cells)) - Counter(output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "privacy.epsilonn=1"], "Did you mean 'epsilon'?"),
        (["run", "absent.yaml"], "no such file"),
        (["report", "absent"], "no such folder"),
        (["compare", "--methods", "as-laura"], "no such method"),
        (["compare", "--methods", "ffa-lora,as-lora:scor=energy"], "Did you mean 'score'?"),
        (["compare", "--methods", "ffa-lora,as-lora:server.denoise=none+score=energi"], "method.score"),
        (["compare", "--methods", "ffa-lora,as-lora:server.denoize=kalman"], "Did you mean 'denoise'?"),
        (["compare", "--seeds", "a,b"], "--seeds"),
    ],
)
def test_mistakes_are_one_line(lorica: Callable[..., str], tmp_path: Path, arguments: list[str], message: str) -> None:
    output = lorica(*arguments, code=2)
    assert message in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_command_is_a_module_too(tmp_path: Path) -> None:
    for module in ("lorica", "lorica.cli"):
        output = in_a_process(sys.executable, "-m", module, "--version", folder=tmp_path)
        assert output == f"lorica {version('lorica')}\n"


def test_help_imports_little(tmp_path: Path) -> None:
    """Each of these packages costs up to a second, which a user would wait for nothing."""
    code = "import sys, lorica.cli; lorica.cli.app(['--help'], standalone_mode=False); print(*sys.modules)"
    output = in_a_process(sys.executable, "-c", code, folder=tmp_path)
    assert "new-method" in output
    imported = set(output.splitlines()[-1].split())
    assert "lorica.cli" in imported
    assert not imported & {"torch", "numpy", "pydantic", *HEAVY}


@pytest.mark.integration
def test_what_only_lists_or_refuses_imports_little_but_pytorch(tmp_path: Path) -> None:
    code = """
import sys
from typer.testing import CliRunner
from lorica.cli import app

print(CliRunner().invoke(app, ["methods"]).output)
print(CliRunner().invoke(app, ["compare", "--methods", "as-lora:scor=energy"]).output)
print(*sys.modules)
"""
    output = in_a_process(sys.executable, "-c", code, folder=tmp_path)
    assert "random-lora" in output
    assert "Did you mean 'score'?" in output
    imported = set(output.splitlines()[-1].split())
    assert "torch" in imported
    assert not imported & HEAVY


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_drops_still_ends_the_run() -> None:
    """An interrupt that falls into an object's deletion is reported and forgotten; the round's end remembers it."""
    # Where tests run in the background, SIGINT is ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with cli._Rounds() as rounds:

        class Deleted:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGINT)

        deleted = Deleted()
        rounds._task = rounds._progress.add_task("rounds", total=2)
        rounds.round({"round": 1})
        del deleted
        with pytest.raises(KeyboardInterrupt):
            rounds.round({"round": 2})
    assert signal.signal(signal.SIGINT, inherited) is signal.default_int_handler


@pytest.mark.integration
def test_ctrl_c_keeps_finished_rounds(tmp_path: Path, some_digits: list[str]) -> None:
    long = ["federation.rounds=500", "federation.evaluate_every=100"]
    arguments = [COMMAND, "run", *SMALL, *some_digits, *CHOSEN_NOISE, *long]
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        # Where tests run in the background, children would ignore SIGINT too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoints = tmp_path / "runs/digits-as-lora/checkpoint"
    for _ in range(600):
        if list(checkpoints.glob("round-*")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes the run" in output
    assert list(checkpoints.glob("round-*"))


def test_a_benchmark_is_reported_from_its_results(lorica: Callable[..., str], tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    suite.folder.mkdir()
    for run in finished(suite, lambda planned: 0.5 + planned.rate / 10, most=10).values():
        add_result(suite.folder, run)
    before = (suite.folder / RESULTS).read_bytes()
    output = lorica("benchmark", "suite.yaml", "--report-only", columns=300)
    assert f"{suite.folder}/benchmark.html" in output
    assert "10 of 32 runs are finished" in (suite.folder / "results.md").read_text()
    assert "rank 1" in lorica("benchmark", "suite.yaml", "--report-only", "--settings", "rank 3", code=2)
    assert (suite.folder / RESULTS).read_bytes() == before
    overridden = lorica("benchmark", "suite.yaml", f"output={tmp_path}/other", "--report-only", columns=300)
    assert f"{tmp_path}/other/small/benchmark.html" in overridden


@pytest.mark.integration
def test_a_benchmark_shows_its_runs_and_its_best_method(tmp_path: Path, some_digits: list[str]) -> None:
    """In its own process, since it starts others."""
    sweep = {"settings": {"axis": {"one": [], "two": ["lora.r=2"]}}, "methods": {"as-lora": "as-lora"}}
    overrides = [*SMALL, *CHOSEN_NOISE, *some_digits, "federation.rounds=1"]
    write_suite(tmp_path, overrides=overrides, sweeps=[sweep])
    output = in_a_process(COMMAND, "benchmark", "suite.yaml", "--settings", "two", folder=tmp_path)
    assert len(re.findall(r"^two; as-lora, rate \S+, seed \d+ \((tuning|result)\): \d+\.\d %", output, re.M)) == 4
    assert "best so far: as-lora" in output
    assert "4/4" in output
    assert "4 of 8 runs are finished" in (tmp_path / "small/results.md").read_text()


@pytest.fixture
def for_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str]]:
    """Runs the command with --json; gives back the one document on stdout, and what people see on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(cli, "console", Console(width=150))
        done = CliRunner().invoke(cli.app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), done.stderr

    return run


@pytest.mark.usefixtures("checked_once", "without_report")
def test_runs_and_comparisons_are_one_json_document(
    for_scripts: Callable[..., tuple[Any, str]], tmp_path: Path, some_digits: list[str]
) -> None:
    settings = [*SMALL, *some_digits, *CHOSEN_NOISE, "federation.rounds=1"]
    found, shown = for_scripts("run", *settings)
    assert re.search(r"round +1 +accuracy", shown)
    lines = (tmp_path / "runs/digits-as-lora/metrics.jsonl").read_text().splitlines()
    assert found["metrics"] == [json.loads(line) for line in lines]
    assert found["privacy"] == json.loads((tmp_path / "runs/digits-as-lora/privacy.json").read_text())
    assert found["score"] == found["metrics"][-1]["accuracy"]
    assert found["metric"] == "accuracy"
    assert found["epsilon"] == max(client["epsilon"] for client in found["privacy"]["clients"])
    assert (tmp_path / found["adapter"] / "adapter_model.safetensors").is_file()
    again, shown = for_scripts("run", *settings)
    assert again == found
    assert "already finished" in shown
    compared, shown = for_scripts("compare", *settings, "--methods", "ro-lora", "--seeds", "0")
    assert "ro-lora, seed 0 (1 of 1)" in shown
    assert [row["method"] for row in compared["methods"]] == ["ro-lora"]
    written = json.loads(Path(compared.pop("page")).with_suffix(".json").read_text())
    assert compared == written


def test_tables_are_json_for_scripts(for_scripts: Callable[..., tuple[Any, str]]) -> None:
    counts = ["--records", "4000", "--batch-size", "64", "--steps", "500", "--delta", "1e-5"]
    found, _ = for_scripts("account", *counts, "--noise-multiplier", "0.8")
    assert found["sampling_rate"] == 0.016
    assert 3.7 < found["epsilon"] < found["epsilon_rdp"] < 4.5
    found, _ = for_scripts("methods")
    assert [row["method"] for row in found] == [row[0] for row in method_rows()]
    assert set(found[0]) == {"method", "trains", "sends", "aggregation", "client_ranks", "under_DP", "paper"}


@pytest.mark.parametrize(
    "command",
    [["run", "missing.yaml"], ["account", "--records", "4", "--batch-size", "8", "--steps", "1"], ["budget", "x"]],
)
def test_with_json_an_error_leaves_stdout_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "console", Console(width=150))
    done = CliRunner().invoke(cli.app, [*command, "--json"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error")
