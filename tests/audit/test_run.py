"""The audit of an experiment: canaries of the public test set, attacks on what leaves, and what is written of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lorica
from lorica import cli
from lorica.audit.run import audit_run, write_audit
from lorica.config import ExperimentConfig, load
from lorica.errors import UserError
from lorica.privacy import mechanism
from lorica.reporting.run_folder import read_run
from tests.tasks.test_whole_runs import sentences, tiny_bert, tiny_reader, tiny_writer, write_rows

pytestmark = pytest.mark.usefixtures("checked_once")
CANARIES = 128
SMALL = {"clients": 2, "rounds": 2, "local_steps": 1, "batch_size": 48, "partition": "iid"}
PRIVACY = {"epsilon": None, "noise_multiplier": 6.0, "delta": 1e-4, "clip_norm": 1.0}


def digits(**sections: Any) -> ExperimentConfig:
    """The embedded experiment, small, whose owners' data do not exist."""
    content = {
        "name": "digits",
        "model": {"base": "lorica:glyph-vit", "threads": 1},
        "lora": {"r": 4, "target_modules": ["query", "value"]},
        "task": {"type": "image-classification", "train": "/nowhere/private.parquet", "test": "lorica:digits/test"},
        "federation": SMALL,
        "optimizer": {"lr": 0.5},
        "method": {"name": "ffa-lora"},
        "privacy": PRIVACY,
    }
    return load(content | sections)


def test_a_correct_run_is_not_refuted_and_the_control_shows_why_that_means_something() -> None:
    """No file of an owner is read: there is none."""
    found = audit_run(digits(), CANARIES)
    white = found["attacks"]["white_box"]
    assert not found["refuted"]
    assert white["control"]["auc"] > 0.9
    assert white["control"]["has_power"]
    assert max(white["epsilon_one_run"], white["epsilon_fdp"]) <= found["claimed_epsilon"]
    assert (found["canaries"], found["owners"], found["steps"], found["sampling_rate"]) == (CANARIES, 2, 2, 0.75)
    json.dumps(found)


@pytest.mark.integration
def test_a_run_without_the_noise_that_it_claims_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    add_noise = mechanism.add_noise
    monkeypatch.setattr(mechanism, "add_noise", lambda value, std, draws: add_noise(value, std / 300, draws))
    found = audit_run(digits(), CANARIES)
    assert found["attacks"]["white_box"]["refuted"]
    assert found["refuted"]


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"method": {"name": "fedask"}}, id="sketches"),
        *(
            pytest.param(sections, id=name, marks=pytest.mark.integration)
            for name, sections in {
                "smoothed": {
                    "method": {"name": "la-lora"},
                    "federation": SMALL | {"local_steps": 2},
                    "optimizer": {"lr": 0.5, "weight_decay": 0.1},
                },
                "ranks": {
                    "method": {"name": "lora-a2"},
                    "local": {"scaled_gd": True},
                    "federation": SMALL | {"rounds": 4},
                },
                "personal": {"method": {"name": "fedsa-lora"}, "federation": SMALL | {"rounds": 3}},
                "adamw": {"optimizer": {"name": "adamw", "lr": 0.01}},
                "scaffold": {
                    "local": {"scaffold": True},
                    "method": {"name": "fed-avg"},
                    "federation": SMALL | {"rounds": 3},
                },
                "shared-noise": {
                    "federation": SMALL | {"clients": 3, "secure_sum": True, "min_clients": 3, "batch_size": 32},
                    "privacy": PRIVACY | {"noise_against": "sums"},
                },
            }.items()
        ),
    ],
)
def test_every_kind_of_reply_can_be_attacked(sections: dict[str, Any]) -> None:
    found = audit_run(digits(**sections), CANARIES)
    assert not found["refuted"]
    # By guessing, 0.5 ± 0.05.
    assert found["attacks"]["white_box"]["control"]["auc"] > 0.7
    assert found["noise"] == ("shared" if "privacy" in sections else "own")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text-regression", "language-modelling", "question-answering"])
def test_texts_are_audited_too(kind: str, tmp_path: Path) -> None:
    """Numbers, conversations, and questions on texts of several windows, without labels to get wrong."""
    texts = [" ".join([text] * (1 + place % 4)) for place, text in enumerate(sentences(140, 0))]
    if kind == "text-regression":
        rows = [{"text": text, "label": float(len(text))} for text in texts]
        model: dict[str, Any] = {"base": tiny_bert(tmp_path / "base"), "pooling": "mean"}
    elif kind == "language-modelling":
        rows = [{"text": text} for text in texts]
        model = {"base": tiny_writer(tmp_path / "base"), "head": "freeze"}
    else:
        answers = [{"text": [text.split()[0]], "answer_start": [0]} for text in texts]
        rows = [
            {"question": text.split()[0], "context": text, "answers": answer}
            for text, answer in zip(texts, answers, strict=True)
        ]
        model = {"base": tiny_reader(tmp_path / "base")}
    task = {"type": kind, "train": "/nowhere", "test": write_rows(tmp_path / "test.jsonl", rows), "max_length": 16}
    task |= {"stride": 4, "max_question": 4} if kind == "question-answering" else {}
    lora = {"r": 8, "target_modules": "all-linear"}
    config = digits(model=model | {"threads": 1}, lora=lora, task=task, federation=SMALL | {"rounds": 6})
    found = audit_run(config, CANARIES)
    assert not found["refuted"]
    assert found["attacks"]["white_box"]["control"]["auc"] > 0.6


@pytest.mark.parametrize(
    ("sections", "canaries", "message"),
    [
        ({"privacy": {"noise": "none"}}, 128, "there is no claim to audit"),
        ({"privacy": {"unit": "client"}}, 128, "records, not clients"),
        ({"method": {"name": "fed-power"}}, 128, "a sketch does not determine"),
        ({}, 64, r"fewer than federation\.batch_size = 48. Choose at least 96"),
        ({}, 10_000, "the first test set gives 3240"),
    ],
)
def test_what_cannot_be_audited_is_refused(sections: dict[str, Any], canaries: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        audit_run(digits(**sections), canaries)


@pytest.fixture(scope="module")
def audit() -> dict[str, Any]:
    control = {"epsilon_one_run": 5.0, "auc": 1.0, "tpr_at_1_percent_fpr": 1.0, "has_power": True}
    bounds = {"epsilon_one_run": 0.5, "epsilon_fdp": 0.7, "auc": 0.6, "tpr_at_1_percent_fpr": 0.02, "refuted": False}
    weak = control | {"epsilon_one_run": 0.1, "auc": 0.55, "has_power": False}
    return {
        "method": "ffa-lora",
        "noise": "own",
        "claimed_epsilon": 2.0,
        "delta": 1e-4,
        "confidence": 0.95,
        "false_alarm": 0.05,
        "canaries": 128,
        "owners": 2,
        "sampling_rate": 0.5,
        "noise_multiplier": 3.0,
        "steps": 2,
        "attacks": {"white_box": bounds | {"control": control}, "black_box": bounds | {"control": weak}},
        "refuted": False,
    }


@pytest.mark.integration
@pytest.mark.parametrize("first", ["audit", "run"])
def test_report_and_card_show_the_audit_of_their_own_experiment(
    first: str, audit: dict[str, Any], tmp_path: Path, some_digits: list[str]
) -> None:
    content = {
        "output": str(tmp_path / "runs"),
        "federation": SMALL | {"rounds": 1, "batch_size": 16},
        "privacy": PRIVACY | {"noise": "reproducible", "ledger": str(tmp_path / "ledger.sqlite")},
    }
    config = load(digits(**content).model_dump(), some_digits)
    if first == "audit":
        write_audit(config, audit)
    result = lorica.Experiment(config).run()
    if first == "run":
        assert "Audit" not in (result.folder / "report.html").read_text(encoding="utf-8")
        write_audit(config, audit)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    card = (result.adapter / "README.md").read_text(encoding="utf-8")
    assert "<h2>Audit</h2>" in page
    assert "not refuted" in page
    assert "no power" in page
    assert "Audit with 128 canaries: not refuted." in card
    assert 'lorica.load_adapter("adapter")' in card
    assert read_run(result.folder).audit is not None
    # A finished run is still one, and the audit of another experiment is not shown as its own.
    assert lorica.Experiment(config).run().metrics == result.metrics
    other = json.loads((result.folder / "audit.json").read_text()) | {"experiment": "another"}
    (result.folder / "audit.json").write_text(json.dumps(other))
    assert read_run(result.folder).audit is None
    with pytest.raises(UserError, match="contains another experiment, which differs in: seed"):
        write_audit(load(config.model_dump(), ["seed=7"]), audit)


def test_the_command_prints_json_and_says_with_its_exit_code_what_was_refuted(
    audit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorica.audit.run.audit_run", lambda config, canaries, shown: audit | {"refuted": True})
    done = CliRunner().invoke(cli.app, ["audit", "run", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["refuted"]
    assert (tmp_path / "runs/digits-as-lora/audit.json").is_file()


@pytest.mark.integration
def test_the_command_audits_the_mechanism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mechanism_audit = ["audit", "mechanism", "--methods", "fedask", "--canaries", "64", "--epsilon", "1"]
    done = CliRunner().invoke(cli.app, mechanism_audit)
    assert done.exit_code == 0, done.output
    assert "fedask" in done.stdout
    assert "not refuted" in done.stdout
    assert "private" not in done.stdout.lower()
    again = CliRunner().invoke(cli.app, [*mechanism_audit, "--json"])
    assert json.loads(again.stdout)["rows"][0]["method"] == "fedask"
    # Lorica's home of this test.
    assert [path.name for path in tmp_path.iterdir()] == ["lorica-home"]
