"""Tiny random models of several families, with inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import BaseModel
from lorica.config import LoraSection, ModelConfig
from lorica.tasks.records import Batch

LABELS = 3
VOCABULARY = 60
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "num_labels": LABELS,
    "pad_token_id": 0,
    # Equality with another way of computing needs the same masks, and none is the easiest.
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=LABELS,
    )
    return transformers.ViTForImageClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=16, n_layer=2, n_head=2, num_labels=LABELS, pad_token_id=0
    )
    return transformers.GPT2ForSequenceClassification(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1)
    return transformers.LlamaForSequenceClassification(config)


FAMILIES = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**(TEXT | {"pad_token_id": 1}))
    ),
    "vit": _vit,
    "gpt2": _gpt2,
    "llama": _llama,
}
HEADS = {"bert": "classifier", "roberta": "classifier.out_proj", "vit": "classifier", "gpt2": "score", "llama": "score"}
TARGETS = {"gpt2": ["c_attn"]}


def adapted(family: str, seed: int = 0, rank: int = 2, randomise: bool = True, **settings: Any) -> AdaptedModel:
    """A tiny model with LoRA in place; `randomise` fills every factor, since `B = 0` leaves `A` without a gradient."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval().requires_grad_(False)
    base = BaseModel(model, HEADS[family], True, [])
    targets = TARGETS.get(family, ["query", "value"])
    section = LoraSection(r=rank, lora_alpha=4, target_modules=targets, **settings)
    result = adapt(base, section, ModelConfig(base="tiny"), seed, torch.device("cpu"))
    if randomise:
        generator = torch.Generator().manual_seed(seed)
        result.write(
            {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in result.read().items()}
        )
    return result


def batch(family: str, examples: int, seed: int = 0) -> Batch:
    """Random examples; texts have different lengths and are padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, LABELS, (examples,), generator=generator)
    if family == "vit":
        return Batch({"pixel_values": torch.randn(examples, 1, 8, 8, generator=generator)}, labels)
    lengths = torch.randint(3, 9, (examples,), generator=generator)
    lengths[0] = 8
    ids = torch.randint(4, VOCABULARY, (examples, 8), generator=generator)
    mask = (torch.arange(8) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, 1 if family == "roberta" else 0)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels)


def one_at_a_time(model: AdaptedModel, examples: Batch) -> dict[str, Tensor]:
    """Gradient of each example by plain autograd on a batch of one: the oracle for per-example gradients."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in model.tensors}
    parameters = {name: getattr(module, kind) for name, (module, kind, _) in model.tensors.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for index in range(len(examples)):
        one = examples.example(index)
        found = torch.autograd.grad(model.losses(model.peft_model, one).sum(), list(parameters.values()))
        for name, gradient in zip(parameters, found, strict=True):
            gradients[name].append(gradient)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return {name: torch.stack(values) for name, values in gradients.items()}


def clipped_one_at_a_time(model: AdaptedModel, examples: Batch, clip_norm: float) -> dict[str, Tensor]:
    """Sum of gradients clipped with `torch.nn.utils.clip_grad_norm_`, one example at a time."""
    parameters = {name: getattr(module, kind).requires_grad_() for name, (module, kind, _) in model.tensors.items()}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index in range(len(examples)):
        one = examples.example(index)
        model.losses(model.peft_model, one).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
        for name, parameter in parameters.items():
            total[name] += parameter.grad
            parameter.grad = None
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return {name: value.detach() for name, value in total.items()}
