"""Whole runs: resumption, kill -9, export, and what is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import lorica
from lorica.adapters.base_files import resolve_base
from lorica.config import PrivacyConfig, TaskConfig, load
from lorica.engines.local import LocalEngine, prepare_local
from lorica.errors import UserError
from lorica.methods.base import registry
from lorica.owner.setup import ledger_path
from lorica.privacy.accounting import Steps, epsilon
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import plan_run
from lorica.reporting.html import write_report
from lorica.run.result import Result
from lorica.tasks import digits
from lorica.tasks.classification import Classification
from tests.killed import kill_run, run_until, start_command
from tests.reports import draw_nothing
from tests.small import SMALLEST
from tests.tiers import integration, slow

Load = Callable[..., lorica.Experiment]
SMALL = [*SMALLEST, "federation.rounds=4", "privacy.noise=reproducible"]
pytestmark = pytest.mark.usefixtures("checked_once")


@pytest.fixture(scope="session")
def small(some_digits: list[str]) -> list[str]:
    return [*SMALL, *some_digits]


def placed(folder: Path, *overrides: str) -> list[str]:
    return [f"output={folder}", f"privacy.ledger={folder}/ledger", *overrides]


@pytest.fixture(scope="session")
def experiment(small: list[str]) -> Load:
    """A small run below a folder."""

    def load(folder: Path, *overrides: str) -> lorica.Experiment:
        return lorica.Experiment.load(overrides=[*small, *placed(folder), *overrides])

    return load


no_report = pytest.mark.usefixtures("without_report")


def adapter_of(result: Result) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, experiment: Load) -> Result:
    """One whole run that several tests look at."""
    return experiment(tmp_path_factory.mktemp("finished")).run()


def test_a_run_writes_everything(finished: Result) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    wanted = {"config.yaml", "environment.json", "metrics.jsonl", "decisions.jsonl", "privacy.json", "checkpoint"}
    assert wanted | {"adapter", "partition.json"} <= names
    assert {"report.html", "accuracy.png", "factors.png", "choices.png", "partition.png"} <= names
    rounds = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rounds] == list(range(5))
    assert all(0 <= row["accuracy"] <= 1 for row in rounds)
    epsilons = [row["epsilon"] for row in rounds[1:]]
    assert epsilons == sorted(epsilons)
    decisions = [json.loads(line) for line in (finished.folder / "decisions.jsonl").read_text().splitlines()]
    assert [set(row["factors"].values()) for row in decisions[:2]] == [{"B"}, {"A"}]
    assert all(set(row["factors"].values()) <= {"A", "B"} for row in decisions)
    card = (finished.adapter / "README.md").read_text()
    assert "zero-out: one record contributes zero" in card
    assert "Poisson" in card


def test_the_statement_is_what_the_ledger_says(finished: Result) -> None:
    for row in finished.privacy["clients"]:
        releases = [r for r in _releases(finished) if r.client == row["client"]]
        assert row["releases"] == len(releases) == 4
        assert row["steps"] == sum(release.steps for release in releases) == 4
        steps = Steps(row["sampling_rate"], row["noise_multiplier"], row["steps"])
        assert row["epsilon"] == pytest.approx(epsilon([steps], row["delta"]))
        assert row["sampling_rate"] == 16 / row["records"]
        assert row["epsilon"] <= row["epsilon_rdp"]
    assert finished.privacy["private_release"] is False
    assert "seed" in finished.privacy["not_covered"][0]


def _releases(result: Result) -> list[Any]:
    task = prepare_local(lorica.Experiment.load(result.folder / "config.yaml").config)[0].task
    return Ledger(Path(result.privacy["ledger"])).releases(task.train.fingerprint())


def test_bytes_are_those_of_the_tensors_that_travelled(finished: Result) -> None:
    """4 layers × 2 sites of 96 × 96 at rank 4, one factor each, and the head: 10 × 96 + 10; fp32.

    Down, a site that trains another factor than before has a new basis, so both of its factors travel.
    """
    factor, head = 96 * 4, 96 * 10 + 10
    for row in finished.metrics[1:]:
        assert set(row["bytes_up"].values()) == {4 * (8 * factor + head)}
    assert set(finished.metrics[1]["bytes_down"].values()) == {4 * (16 * factor + head)}
    decisions = (finished.folder / "decisions.jsonl").read_text().splitlines()
    trained = [json.loads(line)["factors"] for line in decisions]
    for row, before, now in zip(finished.metrics[2:], trained, trained[1:], strict=False):
        turned = sum(before[site] != now[site] for site in now)
        assert set(row["bytes_down"].values()) == {4 * ((8 + turned) * factor + head)}


def test_the_adapter_loads_with_peft_and_gives_the_same_logits(finished: Result) -> None:
    prepared = prepare_local(lorica.Experiment.load(finished.folder / "config.yaml").config)[0]
    batch = prepared.task.test.batch(np.arange(32))
    base = AutoModelForImageClassification.from_pretrained(resolve_base("lorica:glyph-vit"))
    untouched = base(**batch.inputs).logits
    plain = PeftModel.from_pretrained(base, finished.adapter).eval()
    ours = lorica.load_adapter(finished.adapter)
    with torch.inference_mode():
        torch.testing.assert_close(plain(**batch.inputs).logits, ours(**batch.inputs).logits)
    assert not torch.allclose(plain(**batch.inputs).logits, untouched)
    metrics = Classification().evaluate(plain, prepared.task.test, 4096, "cpu")
    assert metrics["accuracy"] == pytest.approx(finished.score)
    assert metrics["loss"] == pytest.approx(finished.metrics[-1]["loss"], rel=1e-4)


def test_running_again_reads_the_finished_run(finished: Result) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*") if path.is_file()}
    config = lorica.Experiment.load(finished.folder / "config.yaml")
    again = config.run(lambda *_: pytest.fail("a finished run started again"))
    assert again.metrics == finished.metrics
    assert before == {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*") if path.is_file()}


@no_report
@pytest.mark.parametrize(
    "moments",
    [
        # Of the charge, and of any file. One test, since they share the process that the killed ones are forked from.
        [(4, "before", "charge"), (4, "after", "attach"), (90, "before", "event")],
        pytest.param([(3, "after", "charge"), (2, "before", "checkpoint")], marks=pytest.mark.integration),
    ],
)
def test_kill_9_in_a_round_then_resume_equals_an_uninterrupted_run(
    tmp_path: Path, small: list[str], finished: Result, moments: list[tuple[int, str, str]]
) -> None:
    whole = adapter_of(finished)
    for call, moment, where in moments:
        root = tmp_path / f"{moment}-{where}-{call}"
        overrides = [*small, *placed(root)]
        if where == "event":
            assert run_until(overrides, root, call).killed
        else:
            kill_run(overrides, call, moment, where)
        resumed = lorica.Experiment.load(overrides=overrides).run()
        for name, value in adapter_of(resumed).items():
            assert torch.equal(value, whole[name]), name
        assert [row["accuracy"] for row in resumed.metrics] == [row["accuracy"] for row in finished.metrics]
        for mine, theirs in zip(resumed.privacy["clients"], finished.privacy["clients"], strict=True):
            # Never smaller; and, since stored replies answer repeated requests, not larger either.
            assert mine["steps"] == theirs["steps"]


def test_ctrl_c_ends_the_command_after_a_round(tmp_path: Path, small: list[str]) -> None:
    """Here, since it is forked from the process that the killed runs are forked from."""
    process = start_command(["run", *small, "federation.rounds=500", "federation.evaluate_every=100"], tmp_path)
    checkpoints = tmp_path / "runs/digits-as-lora/checkpoint"
    for _ in range(600):
        if list(checkpoints.glob("round-*")):
            break
        time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert "the same command resumes the run" in (tmp_path / "output").read_text()
    assert list(checkpoints.glob("round-*"))


@no_report
@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "call"),
    # Clients charge twice a round in FedASK: the 6th charge is in the middle of the second exchange of round 2.
    [("flora", 4), ("fedask", 6), ("fedask", 8), ("fedsa-lora", 4), ("galore-avg", 5), ("fed-sb", 7)],
)
def test_methods_with_more_state_resume_from_kill_9_too(
    tmp_path: Path, small: list[str], experiment: Load, method: str, call: int
) -> None:
    overrides = [*small, *placed(tmp_path / "killed"), f"method.name={method}"]
    kill_run(overrides, call, "after", "attach")
    resumed = lorica.Experiment.load(overrides=overrides).run()
    whole = experiment(tmp_path / "whole", f"method.name={method}").run()
    files = sorted(path.relative_to(whole.adapter) for path in whole.adapter.rglob("adapter_model.safetensors"))
    assert files
    for file in files:
        mine, theirs = load_file(resumed.adapter / file), load_file(whole.adapter / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert [row["accuracy"] for row in resumed.metrics] == [row["accuracy"] for row in whole.metrics]
    assert [row["steps"] for row in resumed.privacy["clients"]] == [4, 4]


# One for each shape of adapter: plain factors, increments stacked with them, R between A and B, a model of its own for
# each client, a higher rank.
SHAPES = {"as-lora", "flora", "fed-sb", "fedsa-lora", "fedex-lora"}


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory, experiment: Load) -> Callable[[str], Result]:
    """Method -> its run of two rounds of two steps, without a report."""

    @cache
    def run(method: str) -> Result:
        steps = ["federation.local_steps=2", "federation.rounds=2"]
        with pytest.MonkeyPatch.context() as patched:
            draw_nothing(patched)
            return experiment(tmp_path_factory.mktemp(method), f"method.name={method}", *steps).run()

    return run


@pytest.mark.parametrize(
    "method",
    [
        "as-lora",
        "fedsa-lora",
        *integration("flora", "fed-sb", "fedex-lora"),
        *slow(*sorted(registry().keys() - SHAPES)),
    ],
)
def test_every_method_exports_what_it_was_evaluated_with(run_of: Callable[[str], Result], method: str) -> None:
    """The PEFT folder (of each client, where models are personal) gives the last round's metrics on the test set."""
    result = run_of(method)
    records = prepare_local(lorica.Experiment.load(result.folder / "config.yaml").config)[0].task.test
    folders = sorted(path.parent for path in result.adapter.rglob("adapter_config.json"))
    assert len(folders) == (2 if registry()[method].personal else 1)
    base = AutoModelForImageClassification.from_pretrained
    models = [PeftModel.from_pretrained(base(resolve_base("lorica:glyph-vit")), folder).eval() for folder in folders]
    found = [Classification().evaluate(model, records, 4096, "cpu") for model in models]
    assert np.mean([metrics["loss"] for metrics in found]) == pytest.approx(result.metrics[-1]["loss"], rel=1e-4)
    assert np.mean([metrics["accuracy"] for metrics in found]) == pytest.approx(result.score, abs=2e-3)
    assert Classification().evaluate(lorica.load_adapter(folders[0]), records, 4096, "cpu")["loss"] == pytest.approx(
        found[0]["loss"]
    )
    if registry()[method].personal:
        assert len(set(result.metrics[-1]["client_scores"].values())) > 1
        with pytest.raises(UserError, match="it contains one adapter per client"):
            lorica.load_adapter(result.adapter)


@pytest.mark.parametrize("method", ["fedsa-lora", *slow(*sorted(registry().keys() - {"fedsa-lora"}))])
def test_every_method_has_a_report(run_of: Callable[[str], Result], method: str) -> None:
    write_report(run_of(method).folder)
    page = (run_of(method).folder / "report.html").read_text(encoding="utf-8")
    assert method in page


@pytest.mark.integration
@no_report
def test_the_average_over_rounds_is_what_is_exported(tmp_path: Path, experiment: Load) -> None:
    overrides = ["method.name=ffa-lora", "federation.rounds=3"]
    plain = experiment(tmp_path / "plain", *overrides).run()
    averaged = experiment(tmp_path / "averaged", *overrides, "server.average=0.5").run()
    mine, theirs = adapter_of(averaged), adapter_of(plain)
    assert any(not torch.equal(value, theirs[name]) for name, value in mine.items())
    averaged_config = lorica.Experiment.load(averaged.folder / "config.yaml").config
    records = prepare_local(averaged_config)[0].task.test
    assert averaged_config.server.average == 0.5
    found = Classification().evaluate(lorica.load_adapter(averaged.adapter), records, 4096, "cpu")
    assert found["loss"] == pytest.approx(averaged.metrics[-1]["loss"], rel=1e-4)


@no_report
def test_a_stopped_secure_run_resumes_without_exceeding_its_budget(tmp_path: Path, experiment: Load) -> None:
    class Stop(Exception):
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 2:
            raise Stop

    some = experiment(tmp_path, "privacy.noise=secure")
    with pytest.raises(Stop):
        some.run(on_round=stop)
    seen: list[int] = []
    result = some.run(
        lambda prepared, federation, finished: seen.append(finished), lambda metrics: seen.append(metrics["round"])
    )
    assert seen == [2, 3, 4]
    assert [row["round"] for row in result.metrics] == [0, 1, 2, 3, 4]
    assert [row["steps"] for row in result.privacy["clients"]] == [4, 4]
    assert result.privacy["private_release"] is True
    # A private release's folder holds no counts of private labels.
    assert not (result.folder / "partition.json").exists()


@pytest.mark.integration
@no_report
def test_a_run_goes_on_without_a_client_or_stops_and_resumes(
    tmp_path: Path, experiment: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1's reply of round 2 is lost, once; its ledger has it."""
    exchange = LocalEngine.exchange

    def lose(self: LocalEngine, requests: Any) -> Any:
        replies = exchange(self, requests)
        return {client: reply for client, reply in replies.items() if (requests[client].round, client) != (2, 1)}

    whole = experiment(tmp_path / "whole", "federation.rounds=3").run()
    with monkeypatch.context() as patched:
        patched.setattr(LocalEngine, "exchange", lose)
        result = experiment(tmp_path / "on", "federation.rounds=3", "federation.min_clients=1").run()
        assert [row.get("missing") for row in result.metrics] == [None, [], [1], []]
        assert [row.get("participants") for row in result.metrics] == [None, [0, 1], [0], [0, 1]]
        stopping = experiment(tmp_path / "stopped", "federation.rounds=3")
        with pytest.raises(UserError, match=r"round 2 needs 2 replies and has 1 \(client 1: no reply\)"):
            stopping.run()
    resumed = stopping.run()
    assert [row["round"] for row in resumed.metrics] == [0, 1, 2, 3]
    assert [row["steps"] for row in resumed.privacy["clients"]] == [3, 3]
    for name, value in adapter_of(whole).items():
        assert torch.equal(adapter_of(resumed)[name], value), name


@no_report
def test_a_damaged_checkpoint_is_named_and_the_one_before_resumes(
    tmp_path: Path, experiment: Load, finished: Result
) -> None:
    class Stop(Exception):
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 3:
            raise Stop

    some = experiment(tmp_path)
    with pytest.raises(Stop):
        some.run(on_round=stop)
    folder = some.config.folder / "checkpoint"
    latest = folder / "round-000003"
    content = bytearray((latest / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (latest / "state.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"Delete {latest}"):
        some.run()
    shutil.rmtree(latest)
    # Round 3 is asked for again, and the owners send what they had sent: nothing is charged twice.
    resumed = some.run()
    for name, value in adapter_of(resumed).items():
        assert torch.equal(value, adapter_of(finished)[name]), name
    assert [row["steps"] for row in resumed.privacy["clients"]] == [4, 4]


@pytest.mark.integration
@no_report
def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path: Path, experiment: Load, finished: Result) -> None:
    again = experiment(tmp_path, "name=again").run()
    for name, value in adapter_of(again).items():
        assert torch.equal(value, adapter_of(finished)[name]), name
    other = experiment(tmp_path, "name=other", "seed=1").run()
    assert any(not torch.equal(value, adapter_of(finished)[name]) for name, value in adapter_of(other).items())


def test_a_folder_of_another_experiment_is_left_alone(finished: Result) -> None:
    config = yaml.safe_load((finished.folder / "config.yaml").read_text())
    with pytest.raises(UserError, match="contains another experiment"):
        lorica.Experiment.load(config, ["optimizer.lr=0.1"]).run()
    with pytest.raises(UserError, match="is not a run folder"):
        lorica.Experiment.load(config, [f"output={finished.folder}", "name=checkpoint"]).run()


@no_report
def test_the_lifetime_limit_stops_a_run_before_it_starts(tmp_path: Path, experiment: Load) -> None:
    secure = ["privacy.noise=secure", "federation.rounds=2"]
    spent = experiment(tmp_path, *secure).run().epsilon
    limit = f"privacy.max_lifetime_epsilon={spent * 1.2}"
    with pytest.raises(UserError, match=r"privacy\.max_lifetime_epsilon"):
        experiment(tmp_path, *secure, "name=second", limit).run()
    assert not (tmp_path / "second").exists() or not (tmp_path / "second" / "metrics.jsonl").exists()
    second = experiment(tmp_path, *secure, "name=third").run()
    life = max(row["lifetime_epsilon"] for row in second.privacy["clients"])
    assert life > spent * 1.2


@no_report
def test_without_privacy_a_run_says_so(tmp_path: Path, some_digits: list[str]) -> None:
    overrides = ["privacy=none", "federation.rounds=1", "federation.clients=2"]
    result = lorica.Experiment.load(overrides=[*overrides, *some_digits, f"output={tmp_path}"]).run()
    assert result.epsilon == float("inf")
    assert result.privacy["private_release"] is False
    assert "without differential privacy" in result.privacy["not_covered"][0]
    assert "epsilon" not in result.metrics[-1]
    # The clip norm of the embedded default stays.
    assert {client["clip_norm"] for client in result.privacy["clients"]} == {1.0}
    assert not {"epsilon", "delta", "noise_multiplier"} & result.privacy["clients"][0].keys()
    assert "clipping" in result.privacy
    assert "Gradients were clipped to norm 1." in (result.adapter / "README.md").read_text()
    # A folder of a version in which `none` also removed the clip.
    config = yaml.safe_load((result.folder / "config.yaml").read_text())
    (result.folder / "config.yaml").write_text(yaml.safe_dump(config | {"privacy": "none"}))
    (result.folder / "checksums.json").unlink()
    with pytest.raises(UserError, match="contains another experiment, which differs in: privacy"):
        lorica.Experiment.load(overrides=[*overrides, *some_digits, f"output={tmp_path}"]).run()


@pytest.mark.integration
@no_report
def test_without_noise_the_clip_keeps_a_run_from_diverging(tmp_path: Path, some_digits: list[str]) -> None:
    """Without a clip, the accuracy after two rounds is about that of guessing."""
    overrides = ["privacy=none", "federation.rounds=2", "federation.clients=2"]
    overrides += ["federation.partition=iid", "federation.evaluate_every=2", *some_digits, f"output={tmp_path}"]
    result = lorica.Experiment.load(overrides=overrides).run()
    assert result.score > result.starting_score > 0.5


@no_report
@pytest.mark.slow
def test_the_whole_embedded_default_learns_without_noise(tmp_path: Path) -> None:
    overrides = ["privacy=none", "federation.evaluate_every=20", f"output={tmp_path}"]
    result = lorica.Experiment.load(overrides=overrides).run()
    assert result.score > result.starting_score + 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.target_modules=[queri]", r"lora\.target_modules = 'queri'.*q_proj"),
        ("lora.target_modules=nothing.*", r"lora\.target_modules"),
        ("lora.r=200", r"lora\.r = 200: larger than the linear map"),
        ("federation.batch_size=1000", r"federation\.batch_size = 1000: client 0 has only"),
        ("federation.clients=5000", r"federation\.clients = 5000"),
        ("model.base=/no/such/folder", r"model\.base"),
        ("model.pooling=mean", r"model\.pooling"),
        ("task.train=absent.csv", r"task\.train"),
        ("method.name=as-laura", r"Did you mean 'as-lora'"),
        ("model.device=cuda:7", r"model\.device"),
        ("lora.client_ranks=[1, 2, 3]", r"lora\.client_ranks = \[1, 2, 3\]: 3 ranks for 2 clients"),
        (
            "lora.client_ranks=[0, 2]",
            r"lora\.client_ranks = \[0, 2\]: a rank is out of range\. Choose ranks from 1 to lora\.r = 4",
        ),
        ("lora.client_ranks=halving", r"as-lora does not support ranks that differ"),
        ("local.scaffold=true", r"local\.scaffold = True: as-lora does not support control variates"),
        ("server.optimiser=fedadam", r"Did you mean 'optimizer'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, experiment: Load, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        experiment(tmp_path / "out", override).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_shards_are_dealt_counted_and_drawn(tmp_path: Path, experiment: Load) -> None:
    shards = ["task.train=lorica:digits/train", "federation.partition=shards", "federation.clients=5"]
    result = experiment(tmp_path, *shards, "federation.min_records=64", "federation.rounds=1").run()
    counts = json.loads((result.folder / "partition.json").read_text())
    assert counts["labels"] == [str(digit) for digit in range(10)]
    assert np.sum([client["counts"] for client in counts["clients"]]) == 1437
    # A shard of 143 or 144 records may reach over both ends of a digit's records, which are about as many.
    assert all(np.count_nonzero(client["counts"]) <= 6 for client in counts["clients"])
    records = [sum(client["counts"]) for client in counts["clients"]]
    assert records == [client["records"] for client in result.privacy["clients"]]
    assert (result.folder / "partition.png").is_file()
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "a real federation does not show them" in page


@no_report
def test_files_are_clients_and_the_ledger_lies_beside_their_folder(tmp_path: Path, experiment: Load) -> None:
    table = digits.table("train", "image", "label")
    for name, start, end in (("north", 0, 500), ("south", 500, 600)):
        (tmp_path / "hospitals").mkdir(exist_ok=True)
        parquet.write_table(table.slice(start, end - start), tmp_path / "hospitals" / f"{name}.parquet")
    keys = [f"task.train={tmp_path / 'hospitals'}", "federation.partition=files", "federation.rounds=1"]
    keys += ["privacy.ledger=null"]
    with pytest.raises(UserError, match=r"federation\.clients = 3: task\.train is 2 files"):
        experiment(tmp_path / "out", *keys, "federation.clients=3").run()
    result = experiment(tmp_path / "out", *keys).run()
    assert [client["records"] for client in result.privacy["clients"]] == [500, 100]
    named = json.loads((result.folder / "partition.json").read_text())["clients"]
    assert [client["name"] for client in named] == ["north.parquet", "south.parquet"]
    assert result.privacy["ledger"] == str(tmp_path / "hospitals.ledger.sqlite")


def test_the_ledger_lies_beside_the_data(tmp_path: Path) -> None:
    rows = [{"text": f"{'good' if index % 2 else 'bad'} {index}", "label": index % 2} for index in range(40)]
    data = tmp_path / "data" / "rows.jsonl"
    data.parent.mkdir()
    data.write_text("\n".join(json.dumps(row) for row in rows))
    embedded = lorica.Experiment.load(overrides=SMALL).config
    dataset = prepare_local(embedded)[0].task.train.fingerprint()
    own = TaskConfig(type="text-classification", train=str(data), test=str(data))
    config = embedded.model_copy(update={"task": own})
    assert ledger_path(config, dataset) == tmp_path / "data" / "rows.jsonl.ledger.sqlite"
    named = PrivacyConfig(ledger=str(tmp_path / "elsewhere"))
    assert ledger_path(config.model_copy(update={"privacy": named}), dataset) == tmp_path / "elsewhere"
    assert ledger_path(embedded, dataset).parent == Path(os.environ["LORICA_HOME"]) / "ledgers"


def test_a_large_delta_is_an_error() -> None:
    with pytest.raises(UserError, match=r"privacy\.delta = 0\.1: not below 1/"):
        plan_run(load(None, ["privacy.delta=0.1"]), 0, 200)


def test_query_and_value_are_found_under_their_new_names(tmp_path: Path, experiment: Load) -> None:
    prepared = prepare_local(experiment(tmp_path, "lora.target_modules=[query, value]").config)[0]
    assert {site.name.rsplit(".", 1)[-1] for site in prepared.model.sites} == {"q_proj", "v_proj"}
    everything = prepare_local(experiment(tmp_path, "lora.target_modules=all-linear").config)[0]
    assert len(everything.model.sites) == 4 * 6
    some = prepare_local(experiment(tmp_path, r"lora.target_modules=.*layers\.[01]\..*q_proj").config)[0]
    assert len(some.model.sites) == 2
