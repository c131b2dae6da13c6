"""Tiny random models of several families, with inputs for them, and gradients one example at a time."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorica.adapters.adapted import AdaptedModel
from lorica.tasks.records import Batch
from lorica.testing.models import LABELS, TEXT, VOCABULARY, adapted_model, random_texts

# What language models with grouped-query attention have beside that.
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": LABELS,
}


def _deberta() -> nn.Module:
    # Version 3's settings: the projections of the content also project the relative positions.
    config = transformers.DebertaV2Config(
        **TEXT,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=4,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def _modernbert() -> nn.Module:
    # One layer attends to everything, the other to two tokens on each side.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
    config = transformers.ModernBertConfig(**TEXT, **tokens, global_attn_every_n_layers=2, local_attention=4)
    return transformers.ModernBertForSequenceClassification(config)


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        n_layers=2,
        n_heads=2,
        dim=16,
        hidden_dim=32,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=LABELS,
    )
    return transformers.DistilBertForSequenceClassification(config)


def _albert() -> nn.Module:
    # All layers are one and the same module.
    config = transformers.AlbertConfig(**TEXT, embedding_size=8, classifier_dropout_prob=0.0)
    return transformers.AlbertForSequenceClassification(config)


def _swin() -> nn.Module:
    # 8 x 8 patches in 16 windows, shifted by one in each second block; then 4 x 4 patches in 4 windows.
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        num_channels=1,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=2,
        drop_path_rate=0.0,
        num_labels=LABELS,
    )
    return transformers.SwinForImageClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        num_labels=LABELS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2ForSequenceClassification(config)


FAMILIES = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**(TEXT | {"pad_token_id": 1}))
    ),
    "deberta-v3": _deberta,
    "modernbert": _modernbert,
    "distilbert": _distilbert,
    "albert": _albert,
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**VISION)),
    "swin": _swin,
    "gpt2": _gpt2,
    "llama": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER)),
    "qwen2": lambda: transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**DECODER)),
    "qwen3": lambda: transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(**DECODER)),
    "gemma2": lambda: transformers.Gemma2ForSequenceClassification(transformers.Gemma2Config(**DECODER)),
    "gemma3": lambda: transformers.Gemma3TextForSequenceClassification(transformers.Gemma3TextConfig(**DECODER)),
    "mistral": lambda: transformers.MistralForSequenceClassification(transformers.MistralConfig(**DECODER)),
}
IMAGES = {"vit": 8, "deit": 8, "swin": 16}
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral")
HEADS = dict.fromkeys(FAMILIES, "classifier") | {"roberta": "classifier.out_proj"} | dict.fromkeys(DECODERS, "score")


def adapted(
    family: str,
    seed: int = 0,
    rank: int = 2,
    randomise: bool = True,
    gradient_checkpointing: bool = False,
    **settings: Any,
) -> AdaptedModel:
    """A tiny model with LoRA in place; `randomise` fills every factor, since `B = 0` leaves `A` without a gradient."""
    torch.manual_seed(seed)
    result = adapted_model(FAMILIES[family](), seed, rank, HEADS[family], gradient_checkpointing, **settings)
    if randomise:
        generator = torch.Generator().manual_seed(seed)
        result.write(
            {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in result.read().items()}
        )
    return result


def batch(family: str, examples: int, seed: int = 0) -> Batch:
    """Random examples; texts have different lengths and are padded on the right."""
    if family not in IMAGES:
        return random_texts(examples, seed, padding=1 if family == "roberta" else 0)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, LABELS, (examples,), generator=generator)
    size = IMAGES[family]
    return Batch({"pixel_values": torch.randn(examples, 1, size, size, generator=generator)}, labels)


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
