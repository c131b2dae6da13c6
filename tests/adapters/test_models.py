"""Base models, heads, sites and export, on tiny checkpoints in a folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from lorica.adapters.adapted import adapt
from lorica.adapters.base_files import resolve_base
from lorica.adapters.base_model import BaseModel, load_base
from lorica.adapters.export import Export, export_adapter, load_adapter
from lorica.adapters.sites import layer_of
from lorica.adapters.targets import match_targets
from lorica.config import LoraSection, ModelConfig, TaskConfig
from lorica.errors import UserError
from tests.models import DECODER, FAMILIES, HEADS, IMAGES, VISION, batch
from tests.pairs import pairwise
from tests.tasks.conftest import write_tokenizer
from tests.tiers import slow

NAMES = ["bad", "fair", "good"]
TASKS = dict.fromkeys(IMAGES, "image-classification")
CPU = torch.device("cpu")


def checkpoint(folder: Path, family: str, without_head: bool = False) -> str:
    """A tiny checkpoint as a hub would serve it: with a head for other labels, or without any."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    (model.base_model if without_head else model).save_pretrained(folder)
    if family in IMAGES:
        size = {"height": IMAGES[family], "width": IMAGES[family]}
        transformers.ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    else:
        write_tokenizer(folder)
    return str(folder)


def export_of(config: ModelConfig, task: str = "text-classification", seed: int = 0) -> Export:
    return Export(config, TaskConfig(type=task, train="", test=""), NAMES, seed)


# Five shapes of head and attention in all combinations, the others in those that differ most, by turns.
SHAPES = ("bert", "roberta", "vit", "gpt2", "llama")
POLICIES = (["train", "freeze"], [True, False], [0, 3, 20])
PAIRS = pairwise(SHAPES, *POLICIES)
REST = [row for row in itertools.product(SHAPES, *POLICIES) if row not in PAIRS]
EXTREMES = [
    pytest.param(family, *which, marks=pytest.mark.slow if (index + turn) % 2 else [])
    for index, family in enumerate(family for family in FAMILIES if family not in SHAPES)
    for turn, which in enumerate([("train", True, 0), ("freeze", False, 20)])
]


def test_every_two_of_the_settings_meet_in_the_pairs() -> None:
    for (first, one), (second, other) in itertools.combinations(enumerate((SHAPES, *POLICIES)), 2):
        assert {(row[first], row[second]) for row in PAIRS} == set(itertools.product(one, other))
    assert len(PAIRS) < len(PAIRS + REST) / 3


@pytest.mark.parametrize(
    ("family", "head", "without_head", "merged_rank"),
    [*PAIRS, *EXTREMES, *slow(*REST)],
)
def test_an_export_loads_with_peft_and_gives_the_same_logits(
    tmp_path: Path, family: str, head: str, without_head: bool, merged_rank: int
) -> None:
    """Also with increments merged into the frozen weights, of a rank below and above that of the whole matrix (16)."""
    config = ModelConfig(base=checkpoint(tmp_path / "base", family, without_head), head=head)
    task = TASKS.get(family, "text-classification")
    base = load_base(config, task, NAMES, seed=3)
    model = adapt(base, LoraSection(r=2), config, 3, CPU)
    assert ("head.weight" in model.tensors) == (head == "train")
    draws = torch.Generator().manual_seed(1)
    model.write({name: torch.randn(value.shape, generator=draws) for name, value in model.read().items()})
    merged = {
        site.name: (
            torch.randn(site.d_out, merged_rank, generator=draws),
            torch.randn(merged_rank, site.d_in, generator=draws) / 10,
        )
        for site in model.sites
        if merged_rank
    }
    model.merge(merged)
    export_adapter(model, merged, tmp_path / "adapter", export_of(config, task, 3), "card")
    examples = batch(family, 4).inputs
    with torch.inference_mode():
        expected = model.peft_model(**examples).logits
        assert expected.std() > 0
        # The base multiplies frozen weight and factors apart, so rounding differs.
        torch.testing.assert_close(
            load_adapter(tmp_path / "adapter")(**examples).logits, expected, rtol=1e-4, atol=1e-4
        )
        automatic = getattr(
            transformers,
            "AutoModelForImageClassification" if family in IMAGES else "AutoModelForSequenceClassification",
        )
        fresh = automatic.from_pretrained(config.base, num_labels=3, attn_implementation="eager")
        fresh.config.pad_token_id = getattr(base.model.config, "pad_token_id", None)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**examples).logits, expected, rtol=1e-4, atol=1e-4)


def test_mean_pooling_is_the_masked_mean_and_exports(tmp_path: Path) -> None:
    config = ModelConfig(base=checkpoint(tmp_path / "base", "bert", True), pooling="mean")
    base = load_base(config, "text-classification", NAMES, 0)
    model = adapt(base, LoraSection(r=2), config, 0, CPU)
    draws = torch.Generator().manual_seed(1)
    model.write({name: torch.randn(value.shape, generator=draws) for name, value in model.read().items()})
    examples = batch("bert", 4).inputs
    with torch.inference_mode():
        logits = model.peft_model(**examples).logits
        wrapped = model.peft_model.base_model.model
        hidden = wrapped.encoder(**examples).last_hidden_state
        head = model.tensors["head.weight"].module
        for index in range(4):
            length = int(examples["attention_mask"][index].sum())
            torch.testing.assert_close(logits[index], head(hidden[index, :length].mean(0)))
        export_adapter(
            model,
            {},
            tmp_path / "adapter",
            export_of(config),
            "card",
        )
        torch.testing.assert_close(load_adapter(tmp_path / "adapter")(**examples).logits, logits)


def test_a_new_head_starts_at_zero_where_it_is_trained_and_is_drawn_where_it_is_frozen(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "bert", without_head=True)

    def head(policy: Any, seed: int) -> nn.Module:
        base = load_base(ModelConfig(base=folder, head=policy), "text-classification", NAMES, seed)
        return base.model.get_submodule(base.head)

    assert not head("train", 0).weight.any()
    assert head("freeze", 0).weight.any()
    assert torch.equal(head("freeze", 0).weight, head("freeze", 0).weight)
    assert not torch.equal(head("freeze", 0).weight, head("freeze", 1).weight)


def test_a_head_for_these_very_labels_is_kept_and_one_for_others_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES["bert"]()
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: index for index, name in enumerate(NAMES)}
    model.save_pretrained(tmp_path)
    config = ModelConfig(base=str(tmp_path))
    kept = load_base(config, "text-classification", NAMES, 0)
    assert torch.equal(kept.model.classifier.weight, model.classifier.weight)
    assert not kept.head_is_new
    other = load_base(config, "text-classification", ["x", "y", "z"], 0)
    assert other.head_is_new
    assert not other.model.classifier.weight.any()
    more = load_base(config, "text-classification", ["a", "b", "c", "d"], 0)
    assert more.model.classifier.weight.shape[0] == 4


def test_every_parameter_is_frozen_and_factors_start_as_peft_makes_them(tmp_path: Path) -> None:
    config = ModelConfig(base=checkpoint(tmp_path, "roberta"))
    model = adapt(load_base(config, "text-classification", NAMES, 0), LoraSection(r=4), config, 0, CPU)
    model.assert_frozen()
    for site in model.sites:
        a, b = model.read()[site.a], model.read()[site.b]
        assert a.shape == (4, site.d_in)
        assert b.shape == (site.d_out, 4)
        assert not b.any()
        assert a.abs().max() <= site.d_in**-0.5
        assert site.scale == 2.0
    again = adapt(load_base(config, "text-classification", NAMES, 0), LoraSection(r=4), config, 0, CPU)
    assert all(torch.equal(value, again.read()[name]) for name, value in model.read().items())


def test_batch_normalisation_is_refused(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_channels=1, num_labels=3
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mixes examples"):
        load_base(ModelConfig(base=str(tmp_path)), "image-classification", NAMES, 0)


def test_wrong_bases_are_named(tmp_path: Path) -> None:
    for base, message in (
        (str(tmp_path), r"no config\.json"),
        ("./nowhere", "no such folder"),
        ("lorica:nothing", "no such embedded model"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_base(base)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(ModelConfig(base=str(tmp_path)), "text-classification", NAMES, 0)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(ModelConfig(base="no-such-org/no-such-model"), "text-classification", NAMES, 0)
    with pytest.raises(UserError, match=r"lorica\.json"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("family", "targets", "endings"),
    [
        ("bert", ["query", "value"], {"query", "value"}),
        ("bert", ["q_proj"], {"query"}),
        ("llama", ["query", "value"], {"q_proj", "v_proj"}),
        ("vit", ["key"], {"k_proj"}),
        ("vit", "query", {"q_proj"}),
        ("gpt2", ["c_attn"], {"c_attn"}),
        ("gpt2", ["value"], {"c_attn"}),
        ("modernbert", ["query", "Wo"], {"Wqkv", "Wo"}),
        ("bert", r".*layer\.0.*(query|key)", {"query", "key"}),
    ],
)
def test_targets_match_by_name_role_or_expression(family: str, targets: Any, endings: set[str]) -> None:
    found = match_targets(FAMILIES[family](), targets, HEADS[family])
    assert {name.rsplit(".", 1)[-1] for name in found} == endings


USUAL = {
    **dict.fromkeys(FAMILIES, ("q_proj", "v_proj")),
    **dict.fromkeys(["bert", "roberta", "albert"], ("query", "value")),
    "deberta-v3": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "modernbert": ("Wqkv",),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_usual_targets_are_query_and_value_of_every_layer(family: str) -> None:
    model = FAMILIES[family]()
    found = match_targets(model, "auto", HEADS[family])
    every = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in USUAL[family]]
    assert found == every
    assert LoraSection().target_modules == "auto"


TOWERS = {
    "text_config": {name: value for name, value in DECODER.items() if name != "num_labels"},
    "vision_config": {name: value for name, value in VISION.items() if name not in ("num_labels", "num_channels")},
}


@pytest.mark.parametrize("kind", ["Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification"])
def test_usual_targets_of_a_model_for_images_and_texts_are_those_that_texts_reach(kind: str) -> None:
    model = getattr(transformers, kind)(transformers.Gemma3Config(**TOWERS, mm_tokens_per_image=4))
    head = "lm_head" if kind.endswith("Generation") else "score"
    found = match_targets(model, "auto", head)
    named = [
        f"model.language_model.layers.{layer}.self_attn.{role}" for layer in (0, 1) for role in ("q_proj", "v_proj")
    ]
    assert found == named
    # Every map of this name where the user says so.
    assert any("vision_tower" in name for name in match_targets(model, ["query"], head))
    reached: set[str] = set()
    for name in match_targets(model, ["query", "value"], head):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: reached.add(name))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert reached == set(found)
    base = BaseModel(model, head, False, [])
    adapter = adapt(base, LoraSection(r=2), ModelConfig(base="tiny", head="freeze"), 0, CPU)
    assert [site.name for site in adapter.sites] == found


def test_usual_targets_of_an_image_model_are_in_its_tower() -> None:
    config = transformers.CLIPConfig(text_config={"hidden_size": 16}, vision_config=TOWERS["vision_config"])
    model = transformers.CLIPForImageClassification(config)
    found = match_targets(model, "auto", "classifier")
    assert len(found) == 4
    assert all(name.startswith("vision_model.") for name in found)


def test_usual_targets_without_query_and_value_are_pefts_or_refused() -> None:
    class Model(nn.Module):
        def __init__(self, family: str) -> None:
            super().__init__()
            self.config = transformers.PretrainedConfig()
            self.config.model_type = family
            self.in_proj, self.dense, self.classifier = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    # The first DeBERTa makes all three in `in_proj`, a name that means other things elsewhere.
    assert match_targets(Model("deberta"), "auto", "classifier") == ["in_proj"]
    with pytest.raises(UserError, match=r"lora\.target_modules = 'auto'.*dense, in_proj"):
        match_targets(Model("unheard-of"), "auto", "classifier")


def test_all_linear_takes_every_map_but_the_head() -> None:
    model = FAMILIES["roberta"]()
    found = match_targets(model, "all-linear", "classifier.out_proj")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(found) == {name for name in linear if not name.startswith("classifier.")}


@pytest.mark.parametrize("family", ["deberta-v3", "modernbert", "distilbert"])
def test_all_linear_leaves_out_what_the_checkpoint_lacks(tmp_path: Path, family: str) -> None:
    """Such a module has no weights to adapt but random ones, and travels whole."""
    config = ModelConfig(base=checkpoint(tmp_path, family, without_head=True))
    base = load_base(config, "text-classification", NAMES, 0)
    assert base.new_modules
    model = adapt(base, LoraSection(r=2, target_modules="all-linear"), config, 0, CPU)
    assert model.sites
    assert not {site.name for site in model.sites} & set(base.new_modules)


def test_layers_are_told_by_their_last_number() -> None:
    assert layer_of("bert.encoder.layer.3.attention.self.query") == "bert.encoder.layer.3"
    assert layer_of("swin.encoder.layers.0.blocks.1.attention.self.query") == "swin.encoder.layers.0.blocks.1"
    assert layer_of("pooler.dense") == "pooler.dense"
