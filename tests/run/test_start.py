"""Runs that start from a public adapter (`lora.start`): exactly there, on every machine, or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertModel

import lorica
from lorica.config import ExperimentConfig
from lorica.engines.flower.server import for_nodes, serve
from lorica.engines.local import prepare_local
from lorica.errors import UserError
from lorica.methods.base import registry
from lorica.owner.node import agreed
from lorica.run.result import Result
from lorica.run.setup import Prepared
from lorica.tasks.loading import load_tests
from lorica.testing.federation import dense
from tests.engines.in_process import InProcessGrid
from tests.engines.organisations import Organisations
from tests.reports import draw_nothing
from tests.tasks.test_whole_runs import write_tokenizer
from tests.tiers import integration, slow

METHODS = sorted(registry())
MERGING = [name for name in METHODS if registry()[name].merges]
SPECIAL = [("fed-sb", ["method.warm_up=0"]), ("ffa-lora", ["method.orthonormal_a=true"])]
NOISE = ["privacy.noise=reproducible", "privacy.noise_multiplier=1"]
LOCAL = ["privacy=none", "engine=local", "flower.superlink=null"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed.cache_clear()
    # Drawing takes longer than these runs.
    draw_nothing(monkeypatch)
    monkeypatch.setattr("lorica.engines.flower.engine.POLL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def organisations(tmp_path_factory: pytest.TempPathFactory) -> Organisations:
    return Organisations(tmp_path_factory.mktemp("organisations"), noise=["none", "reproducible"])


def finished(organisations: Organisations, name: str, method: str) -> Result:
    config = organisations.experiment(name, f"method.name={method}", "optimizer.lr=2", *LOCAL, *NOISE)
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return lorica.Experiment(config).run()


@pytest.fixture(scope="module")
def earlier(organisations: Organisations) -> Result:
    """A finished run with a trained head, whose factors are all non-zero."""
    return finished(organisations, "earlier", "fed-avg")


@pytest.fixture(scope="module")
def stacked(organisations: Organisations) -> Result:
    """A finished run of a method that merges: its export has the ranks of all rounds."""
    return finished(organisations, "stacked", "fed-rac-lora")


@pytest.fixture
def config(organisations: Organisations, earlier: Result, tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """A run from the earlier one's adapter, below this test's folder."""

    def make(*overrides: str) -> ExperimentConfig:
        # Without noise there is no ε to compute, which takes longer than these runs.
        own = [f"output={tmp_path}", f"privacy.ledger={tmp_path}/ledger"]
        own.append(f"lora.start={earlier.adapter}")
        return organisations.experiment("continued", *own, *LOCAL, *overrides)

    return make


def saved(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def products(prepared: Prepared) -> dict[str, Tensor]:
    return {site.name: dense(prepared.state, site) for site in prepared.state.sites}


def products_in(folder: Path) -> dict[str, Tensor]:
    tensors = saved(folder)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    found = {
        name: tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double() for name in names
    }
    assert found
    assert all(value.abs().max() > 0 for value in found.values())
    return {name.removeprefix("base_model.model."): value for name, value in found.items()}


def assert_same_products(prepared: Prepared, folder: Path) -> None:
    found, expected = products(prepared), products_in(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * float(value.abs().max()))


def test_a_run_starts_where_the_earlier_one_ended_and_says_so(
    config: Callable[..., ExperimentConfig], earlier: Result
) -> None:
    result = lorica.Experiment(config("method.name=as-lora", *NOISE)).run()
    first, last = ({key: row[key] for key in ("loss", "accuracy")} for row in (result.metrics[0], earlier.metrics[-1]))
    assert first == last
    digest = hashlib.sha256((earlier.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert result.privacy["start"] == {"name": "earlier/adapter", "sha256": digest}
    (covered,) = [line for line in result.privacy["not_covered"] if digest in line]
    assert "only what this run released" in covered
    card = (result.adapter / "README.md").read_text()
    assert f"Started from: adapter `earlier/adapter`, SHA-256 `{digest}`" in card
    assert json.loads((result.folder / "environment.json").read_text())["start"]["sha256"] == digest


@pytest.mark.parametrize(("name", "options"), [*((name, []) for name in METHODS), *SPECIAL])
def test_every_method_starts_with_the_product_and_the_head(
    name: str, options: list[str], config: Callable[..., ExperimentConfig], earlier: Result
) -> None:
    prepared = prepare_local(config(f"method.name={name}", *options))[0]
    assert_same_products(prepared, earlier.adapter)
    tensors, own = saved(earlier.adapter), prepared.state.tensors
    for part in ("weight", "bias"):
        assert torch.equal(own[f"head.{part}"], tensors[f"base_model.model.classifier.{part}"])
    if name not in MERGING and not options:
        for site in prepared.state.sites:
            for factor, value in (("A", own[site.a]), ("B", own[site.b])):
                assert torch.equal(value, tensors[f"base_model.model.{site.name}.lora_{factor}.weight"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, []) for name in ("fed-rac-lora", "fedask", "fedsa-lora")),
        ("fed-sb", ["method.warm_up=0"]),
        *slow(*((name, []) for name in METHODS)),
    ],
)
def test_methods_train_on_from_it(
    name: str, options: list[str], config: Callable[..., ExperimentConfig], earlier: Result
) -> None:
    """Round 0 has the earlier run's loss, the last round another one, and its export is that model."""
    result = lorica.Experiment(config(f"method.name={name}", *options)).run()
    assert result.metrics[0]["loss"] == pytest.approx(earlier.metrics[-1]["loss"], rel=1e-5)
    assert np.isfinite(result.metrics[-1]["loss"])
    assert result.metrics[-1]["loss"] != result.metrics[0]["loss"]


@pytest.mark.integration
def test_an_export_of_stacked_ranks_is_continued_by_methods_that_merge(
    config: Callable[..., ExperimentConfig], stacked: Result
) -> None:
    for name in MERGING:
        assert_same_products(
            prepare_local(config(f"method.name={name}", f"lora.start={stacked.adapter}"))[0], stacked.adapter
        )
    with pytest.raises(
        UserError,
        match=r"^lora\.start = .*its rank at .* is 6, but lora\.r is 2\. Set lora\.r=6 and lora\.lora_alpha=24",
    ):
        prepare_local(config(f"lora.start={stacked.adapter}"))
    # With that rank and the same scale, any method continues it.
    prepared = prepare_local(config(f"lora.start={stacked.adapter}", "lora.r=6", "lora.lora_alpha=24"))[0]
    assert_same_products(prepared, stacked.adapter)


def test_a_client_of_a_personalised_run_is_an_adapter(config: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    whole = lorica.Experiment(config("method.name=fedsa-lora", f"output={tmp_path / 'personal'}")).run()
    with pytest.raises(
        UserError, match=r"^lora\.start = .*one adapter per client\. Give one of them, such as .*client-0"
    ):
        prepare_local(config(f"lora.start={whole.adapter}"))
    own = whole.adapter / "client-1"
    assert_same_products(prepare_local(config(f"lora.start={own}"))[0], own)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("as-lora", "freeze"),
        *integration(("fed-rac-lora", "train")),
        *slow(("as-lora", "train"), ("fed-rac-lora", "freeze")),
    ],
)
def test_nodes_get_the_tensors_and_not_the_folder(
    name: str, head: str, organisations: Organisations, config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    """The head was drawn from another seed at the nodes, so a frozen one has to reach them too."""
    changes = [f"method.name={name}", f"model.head={head}", "seed=7", *NOISE]
    here = lorica.Experiment(config(*changes)).run()
    away = [f"output={tmp_path / 'away'}", "engine=flower", "flower.superlink=loopback"]
    there = config(*changes, *away, f"privacy.ledger={tmp_path / 'away.sqlite'}")
    nodes = InProcessGrid([organisations.node_config(client) for client in range(2)])
    result = serve(there, nodes)
    one, other = saved(here.adapter), saved(result.adapter)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert [row["loss"] for row in here.metrics] == [row["loss"] for row in result.metrics]
    sent = for_nodes(there, load_tests(there.task, there.model.base), here.privacy["start"])
    assert sent.lora.start == f"sha256:{here.privacy['start']['sha256']}"
    for place in organisations.places:
        for found in (place / "data.jsonl.lorica").glob("run-*/invitation.json"):
            assert str(tmp_path) not in found.read_text()
            assert str(there.lora.start) not in found.read_text()


def test_a_frozen_head_comes_from_the_adapter_and_stays(
    config: Callable[..., ExperimentConfig], earlier: Result
) -> None:
    result = lorica.Experiment(config("model.head=freeze", "seed=7")).run()
    assert result.metrics[0]["loss"] == earlier.metrics[-1]["loss"]
    before, after = saved(earlier.adapter), saved(result.adapter)
    for part in ("weight", "bias"):
        key = f"base_model.model.classifier.{part}"
        assert torch.equal(before[key], after[key])


@pytest.mark.integration
def test_other_modules_that_the_base_lacks_come_from_the_adapter_too(
    config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    """DistilBERT's classifier has a layer of its own below the head, drawn from the seed and never trained."""
    write_tokenizer(tmp_path / "encoder")
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40}
    torch.manual_seed(0)
    DistilBertModel(DistilBertConfig(**sizes)).save_pretrained(tmp_path / "encoder")
    base = [f"model.base={tmp_path / 'encoder'}", "model.pooling=auto"]
    first = lorica.Experiment(config(*base, "lora.start=null", "seed=1", "name=first")).run()
    second = lorica.Experiment(config(*base, f"lora.start={first.adapter}", "seed=2")).run()
    assert second.metrics[0]["loss"] == first.metrics[-1]["loss"]
    key = "base_model.model.pre_classifier.weight"
    assert torch.equal(saved(first.adapter)[key], saved(second.adapter)[key])
    other = lorica.Experiment(config(*base, "lora.start=null", "seed=2", "name=other")).run()
    assert not torch.equal(saved(first.adapter)[key], saved(other.adapter)[key])


def test_a_head_for_other_labels_is_left_out(
    config: Callable[..., ExperimentConfig], earlier: Result, caplog: pytest.LogCaptureFixture
) -> None:
    for labels in ("[bad, good, unsure]", "[good, bad]"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lorica.adapters.start"):
            prepared = prepare_local(config(f"task.labels={labels}"))[0]
        assert "this run starts with a new head" in caplog.text
        assert not prepared.state.tensors["head.weight"].any()
        assert_same_products(prepared, earlier.adapter)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("name", ["fed-rac-lora", *slow("as-lora")])
def test_a_resumed_run_needs_no_folder_but_refuses_a_changed_one(
    name: str, config: Callable[..., ExperimentConfig], earlier: Result, tmp_path: Path
) -> None:
    copy = shutil.copytree(earlier.adapter, tmp_path / "copy")
    where = [f"method.name={name}", f"lora.start={copy}", *NOISE]
    whole = lorica.Experiment(config(*where, f"output={tmp_path / name / 'whole'}")).run()
    stopped = config(*where, f"output={tmp_path / name / 'stopped'}", f"privacy.ledger={tmp_path / name}.sqlite")

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] == 1:
            raise Stopped

    with pytest.raises(Stopped):
        lorica.Experiment(stopped).run(on_round=stop)
    tensors = saved(copy)
    safetensors.torch.save_file({key: 2 * value for key, value in tensors.items()}, copy / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"^lora\.start = .*its files have changed since run continued"):
        lorica.Experiment(stopped).run()
    shutil.rmtree(copy)
    resumed = lorica.Experiment(stopped).run()
    one, other = saved(whole.adapter), saved(resumed.adapter)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert resumed.privacy["start"] == whole.privacy["start"]
    with pytest.raises(UserError, match=r"^lora\.start = .*no such folder"):
        prepare_local(config(*where, f"output={tmp_path / 'new'}"))
    # Killed while the first checkpoint was written: the run has to start again, and needs the folder.
    shutil.rmtree(stopped.folder / "adapter")
    for checkpoint in (stopped.folder / "checkpoint").iterdir():
        checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.incomplete"))
    with pytest.raises(UserError, match=r"^lora\.start = .*no such folder"):
        lorica.Experiment(stopped).run()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_folder_of_peft_itself_is_continued(
    use_rslora: bool, organisations: Organisations, config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    """In half precision, with a trained classifier: the same logits as PEFT computes."""
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(organisations.base, num_labels=2)
    settings = LoraConfig(
        r=2,
        lora_alpha=8,
        use_rslora=use_rslora,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.3)
    folder = tmp_path / "peft"
    model.half().save_pretrained(folder)
    changes = [f"lora.start={folder}", "model.pooling=auto", "lora.lora_alpha=8", f"lora.use_rslora={use_rslora}"]
    prepared = prepare_local(config(*changes))[0]
    prepared.model.write(prepared.state.tensors)
    batch = prepared.task.test.batch(np.arange(8))
    again = AutoModelForSequenceClassification.from_pretrained(organisations.base, num_labels=2)
    plain = PeftModel.from_pretrained(again, folder).float().eval()
    with torch.inference_mode():
        expected = plain(**batch.inputs).logits
        torch.testing.assert_close(prepared.model.peft_model(**batch.inputs).logits, expected)
        assert not torch.allclose(expected, again(**batch.inputs).logits * 0)


def edited(**changes: Any) -> Callable[[Path], None]:
    """Change keys of adapter_config.json."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def undescribed(**changes: Any) -> Callable[[Path], None]:
    """As `edited`, in a folder that Lorica did not write."""

    def edit(folder: Path) -> None:
        (folder / "lorica.json").unlink()
        edited(**changes)(folder)

    return edit


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        safetensors.torch.save_file(change(saved(folder)), folder / "adapter_model.safetensors")

    return edit


def each(change: Callable[[Tensor], Tensor], part: str) -> Callable[[Path], None]:
    return weights(
        lambda tensors: {
            name: (change(value) if part in name else value).contiguous() for name, value in tensors.items()
        }
    )


def described(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "lorica.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def pickled(folder: Path) -> None:
    torch.save(saved(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def truncated(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-10]) and None


REFUSED: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no folder": (shutil.rmtree, [], "no such folder"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), [], "it has no adapter_model.safet"),
    "pickle": (pickled, [], "it has no adapter_model.safetensors. Save it again as safetensors"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), [], "it has no adapter_config.json"),
    "damaged weights": (truncated("adapter_model.safetensors"), [], "adapter_model.safetensors is damaged"),
    "damaged config": (truncated("adapter_config.json"), [], "adapter_config.json is damaged"),
    "damaged description": (truncated("lorica.json"), [], "lorica.json is damaged"),
    "not finite": (each(lambda value: value / 0, "lora_A"), [], "lora_A.weight' is not finite"),
    "integers": (each(lambda value: value.long(), "lora_A"), [], "is torch.int64"),
    "another kind": (edited(peft_type="IA3"), [], "it is an adapter of type 'IA3'"),
    "dora": (edited(use_dora=True), [], "it uses 'use_dora', which Lorica does not train"),
    "bias": (edited(bias="lora_only"), [], "it uses 'bias'"),
    "unknown": (edited(from_the_future={"x": 1}), [], "it uses 'from_the_future'"),
    "pissa": (edited(init_lora_weights="pissa"), [], "its initialisation 'pissa' may have changed the base"),
    "scale": (edited(lora_alpha=16), [], "its scale at .* is 8, but lora_alpha and r give 4. Set lora.lora_alpha=16"),
    "scale of one": (edited(alpha_pattern={"query": 1}), [], "its scale at .*query is 0.5"),
    "no number": (edited(lora_alpha="much"), [], "the scales in adapter_config.json cannot be read"),
    "rslora": (edited(use_rslora=True), [], "its scale at"),
    "another hash": (
        described(base="sha256:" + "0" * 64),
        [],
        "trained on the base model sha256:000.* but model.base is",
    ),
    "another name": (undescribed(base_model_name_or_path="bert"), [], "its base model is 'bert', but model.base is"),
    "no name": (undescribed(base_model_name_or_path=None), [], "its base model is None, but model.base is"),
    "rank": (
        lambda folder: None,
        ["lora.r=1", "lora.lora_alpha=4"],
        "its rank at .* is 2, but lora.r is 1. Set lora.r=2 and lora.lora_alpha=8",
    ),
    "other sites": (
        lambda folder: None,
        ["lora.target_modules=[query]"],
        r"adapt different linear maps.*value.*Set lora.target_modules to the modules that it adapts \(query, value\)",
    ),
    "shapes": (
        each(lambda value: value[:, 1:], "lora_A"),
        [],
        r"its factors of .* have shapes .* linear map is 16 x 16",
    ),
    "more than factors": (
        weights(lambda found: found | {"base_model.model.encoder.pooler.dense.weight": torch.ones(2, 2)}),
        [],
        "it contains 'encoder.pooler.dense.weight', which is part of the base model here",
    ),
    "magnitudes": (
        weights(lambda found: found | {f"{min(found)}.lora_magnitude_vector": torch.ones(2)}),
        [],
        "adapt different linear maps, or in a different way",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    case: str, config: Callable[..., ExperimentConfig], earlier: Result, tmp_path: Path
) -> None:
    spoil, changes, message = REFUSED[case]
    copy = shutil.copytree(earlier.adapter, tmp_path / "copy")
    spoil(copy)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        lorica.Experiment(config(f"lora.start={copy}", *changes)).run()
    assert caught.value.key == "lora.start"
    assert set(tmp_path.iterdir()) == before
