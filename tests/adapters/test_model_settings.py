"""Which layers are adapted, dropout of the base model, and bf16 on a CPU without instructions for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from lorica.adapters import loading
from lorica.adapters.adapted import adapt
from lorica.adapters.base_files import resolve_base
from lorica.adapters.base_model import load_base
from lorica.adapters.export import Export, export_adapter, load_adapter
from lorica.adapters.targets import match_targets
from lorica.config import LoraSection, ModelConfig, TaskConfig, load
from lorica.errors import UserError
from lorica.privacy.gradients import per_example_gradients
from lorica.tasks.loading import load_tests
from lorica.testing.models import TEXT
from tests.models import FAMILIES, HEADS, adapted, batch, one_at_a_time
from tests.tasks.conftest import write_tokenizer

NAMES = ["bad", "fair", "good"]
CPU = torch.device("cpu")
DROPPING = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}


def saved(folder: Path, family: str, **settings: Any) -> str:
    """A tiny checkpoint whose configuration asks for dropout."""
    torch.manual_seed(0)
    if family == "bert":
        model: Any = transformers.BertForSequenceClassification(transformers.BertConfig(**(TEXT | DROPPING)))
    else:
        model = FAMILIES[family]()
        for name, value in settings.items():
            setattr(model.config, name, value)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


# PEFT warns of GPT-2's transposed weights.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("targets", ["auto", ["query"], "all-linear", r".*(query|value|q_proj|v_proj|c_attn)"])
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_peft_selects_the_same_layers(family: str, targets: Any) -> None:
    model = FAMILIES[family]()
    everywhere = match_targets(model, targets, HEADS[family])
    upper = match_targets(model, targets, HEADS[family], layers=[1])
    endings = sorted({name.rsplit(".", 1)[-1] for name in everywhere})
    config = peft.LoraConfig(target_modules=endings, layers_to_transform=[1])
    theirs = peft.get_peft_model(FAMILIES[family](), config)
    adapted_by_peft = [
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert upper == [name for name in adapted_by_peft if name in everywhere]
    assert 0 < len(upper) < len(everywhere)
    assert match_targets(model, targets, HEADS[family], layers=[1, 0]) == [
        name for name in everywhere if ".0." in name or ".1." in name
    ]


@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "gpt2"])
def test_gradients_of_the_upper_layers_are_autograds(family: str) -> None:
    model, examples = adapted(family, layers_to_transform=[1]), batch(family, 4)
    assert {site.layer.rsplit(".", 1)[-1] for site in model.sites} == {"1"}
    # The backward pass ends at the lowest adapted layer: what lies below needs no gradient.
    below = next(
        module for name, module in model.peft_model.named_modules() if name.endswith(model.sites[0].layer[:-1] + "0")
    )
    needed: list[bool] = []
    handle = below.register_forward_hook(
        lambda module, inputs, output: needed.append((output[0] if isinstance(output, tuple) else output).requires_grad)
    )
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), model.tensors, 4)
    handle.remove()
    assert needed == [False]
    for name, gradient in one_at_a_time(model, examples).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("layers", "problem"), [([2], "in a layer 2"), ([1, -1], "in a layer -1")])
def test_a_layer_without_a_selected_map_is_named(layers: list[int], problem: str) -> None:
    with pytest.raises(UserError, match=rf"lora\.layers_to_transform.*{problem}\. Choose from these layers: 0, 1"):
        match_targets(FAMILIES["bert"](), "auto", "classifier", layers=layers)


def test_an_adapter_of_the_upper_layers_is_exported_and_loads(tmp_path: Path) -> None:
    config = ModelConfig(base=saved(tmp_path / "base", "bert"), head="freeze")
    base = load_base(config, "text-classification", NAMES, 0)
    model = adapt(base, LoraSection(r=2, layers_to_transform=[1]), config, 0, CPU)
    draws = torch.Generator().manual_seed(1)
    model.write({name: torch.randn(value.shape, generator=draws) for name, value in model.read().items()})
    export = Export(config, TaskConfig(type="text-classification", train="", test=""), NAMES, 0)
    export_adapter(model, {}, tmp_path / "adapter", export, "card")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(".layer.1." in name for name in described["target_modules"])
    examples = batch("bert", 4).inputs
    with torch.inference_mode():
        expected = model.peft_model(**examples).logits
        torch.testing.assert_close(
            load_adapter(tmp_path / "adapter")(**examples).logits, expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("pooling", ["auto", "mean"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {}),
        ("distilbert", {"dropout": 0.5, "attention_dropout": 0.5, "seq_classif_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    ],
)
def test_without_dropout_training_gives_what_evaluation_gives(
    tmp_path: Path, family: str, settings: dict[str, float], pooling: str
) -> None:
    path = saved(tmp_path / "base", family, **settings)
    examples = batch(family, 4)

    def logits(dropout: bool, training: bool) -> torch.Tensor:
        config = ModelConfig(base=path, head="freeze", pooling=pooling, dropout=dropout)
        base = load_base(config, "text-classification", NAMES, 0)
        model = adapt(base, LoraSection(r=2), config, 0, CPU)
        model.peft_model.train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            found: torch.Tensor = model.peft_model(**examples.inputs).logits
        return found

    expected = logits(dropout=True, training=False)
    assert torch.equal(logits(dropout=False, training=True), expected)
    assert torch.equal(logits(dropout=False, training=False), expected)
    assert not torch.allclose(logits(dropout=True, training=True), expected)


def test_loras_own_dropout_stays_and_an_exported_model_has_the_bases(tmp_path: Path) -> None:
    config = ModelConfig(base=saved(tmp_path / "base", "bert"), head="freeze", dropout=False)
    base = load_base(config, "text-classification", NAMES, 0)
    model = adapt(base, LoraSection(r=2, lora_dropout=0.5), config, 0, CPU)
    dropping = {module.p for module in model.peft_model.modules() if isinstance(module, nn.Dropout)}
    assert dropping == {0.0, 0.5}
    export = Export(config, TaskConfig(type="text-classification", train="", test=""), NAMES, 0)
    export_adapter(model, {}, tmp_path / "adapter", export, "card")
    assert load_adapter(tmp_path / "adapter").config.hidden_dropout_prob == 0.5


@pytest.mark.parametrize(
    ("capabilities", "precision", "warned"),
    [
        ({"avx2": True, "avx512_f": True}, "bf16", True),
        ({"avx512_bf16": True}, "bf16", False),
        ({"amx_bf16": True}, "bf16", False),
        ({"neon": True, "bf16": True}, "bf16", False),
        ({"avx512_bf16": False, "amx_bf16": False}, "bf16", True),
        ({}, "fp32", False),
    ],
)
def test_bf16_is_warned_of_on_a_cpu_without_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capabilities: dict[str, bool],
    precision: str,
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(capabilities))
    config = load(overrides=[f"model.precision={precision}", "model.device=cpu"])
    with caplog.at_level(logging.WARNING):
        loading.load_model(config, load_tests(config.task, resolve_base(config.model.base)))
    assert ("model.precision=bf16 is much slower than fp32 on this CPU" in caplog.text) == warned


def test_bf16_is_not_warned_of_where_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert loading.has_bf16()
