"""Causal base models: no head of their own, shared weights left alone, and what is none refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorica.adapters.base_model import load_base
from lorica.adapters.export import Export, export_adapter, load_adapter
from lorica.config import ModelConfig, TaskConfig
from lorica.errors import UserError
from tests.causal import FAMILIES, adapted, checkpoint, pairs
from tests.models import FAMILIES as CLASSIFIERS

TASK = "language-modelling"


def load(base: str, **settings: str) -> nn.Module:
    return load_base(ModelConfig(base=base, **({"head": "freeze"} | settings)), TASK, [], 0).model


@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_the_checkpoint_frozen_and_without_a_cache(tmp_path: Path, family: str) -> None:
    path = checkpoint(tmp_path, family)
    base = load_base(ModelConfig(base=path, head="freeze"), TASK, [], 0)
    assert (base.head, base.head_is_new, base.new_modules) == ("lm_head", False, [])
    tied = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert tied == ("tied" in family)
    inputs = pairs().batch(np.arange(4)).inputs
    expected = transformers.AutoModelForCausalLM.from_pretrained(path).eval()(**inputs).logits
    output = base.model(**inputs)
    torch.testing.assert_close(output.logits, expected)
    assert output.past_key_values is None
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_onto_the_vocabulary_is_neither_adapted_nor_trained(tmp_path: Path, family: str) -> None:
    model = adapted(tmp_path, family, "all-linear")
    plain = FAMILIES[family]().named_modules()
    maps = [name for name, module in plain if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"]
    assert [site.name for site in model.sites] == maps
    assert set(model.tensors) == {name for site in model.sites for name in (site.a, site.b)}
    with pytest.raises(UserError, match="no linear map"):
        adapted(tmp_path, family, ["lm_head"])


@pytest.mark.parametrize("family", FAMILIES)
def test_increments_leave_the_embeddings_alone_and_an_export_loads_with_peft(tmp_path: Path, family: str) -> None:
    targets = ["query", "value"] if "gpt2" not in family else ["c_attn"]
    model = adapted(tmp_path / "base", family, targets)
    base = model.peft_model.get_base_model()
    before = base.get_input_embeddings().weight.clone(), base.get_output_embeddings().weight.clone()
    merged = {site.name: (torch.randn(site.d_out, 2) / 5, torch.randn(2, site.d_in) / 5) for site in model.sites}
    model.merge(merged)
    assert torch.equal(base.get_input_embeddings().weight, before[0])
    assert torch.equal(base.get_output_embeddings().weight, before[1])
    config = ModelConfig(base=str(tmp_path / "base"), head="freeze")
    export_adapter(
        model, merged, tmp_path / "adapter", Export(config, TaskConfig(type=TASK, train="", test=""), [], 0), "card"
    )
    inputs = pairs().batch(np.arange(4)).inputs
    fresh = transformers.AutoModelForCausalLM.from_pretrained(config.base)
    with torch.inference_mode():
        expected = model.peft_model(**inputs).logits
        assert expected.std() > 0
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        for found in (loaded, load_adapter(tmp_path / "adapter")):
            torch.testing.assert_close(found(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2, tied", "llama"])
def test_half_precision_base_keeps_its_factors_in_fp32(tmp_path: Path, family: str) -> None:
    model = adapted(tmp_path, family, precision="bf16")
    assert {getattr(module, kind).dtype for module, kind, _ in model.tensors.values()} == {torch.float32}
    logits = model.peft_model(**pairs().batch(np.arange(4)).inputs).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_head_of_a_language_model_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Set model\.head=freeze") as error:
        load(checkpoint(tmp_path, "llama"), head="train")
    assert error.value.key == "model.head"


def test_pooling_does_not_fit_a_language_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit language-modelling") as error:
        load(checkpoint(tmp_path, "llama"), pooling="mean")
    assert error.value.key == "model.pooling"


def test_checkpoint_without_its_map_onto_the_vocabulary_is_refused(tmp_path: Path) -> None:
    FAMILIES["llama"]().model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head") as error:
        load(str(tmp_path))
    assert error.value.key == "model.base"


@pytest.mark.parametrize(("family", "problem"), [("bert", "sees the tokens"), ("roberta", "sees"), ("vit", "loaded")])
def test_what_is_no_causal_model_is_refused(tmp_path: Path, family: str, problem: str) -> None:
    whole = {"bert": transformers.BertLMHeadModel, "roberta": transformers.RobertaForCausalLM}
    model = CLASSIFIERS[family]()
    whole.get(family, type(model))(model.config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=problem) as error:
        load(str(tmp_path))
    assert error.value.key == "model.base"
