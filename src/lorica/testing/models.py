"""A tiny random text model with LoRA in place, and its gradients by plain autograd."""

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
"""Settings of a BERT of two layers, and of most other text models."""


def tiny_bert(seed: int = 0, rank: int = 2) -> AdaptedModel:
    """A BERT of two layers with 16 units, random from the seed; A is random and B zero, as PEFT makes them."""
    torch.manual_seed(seed)
    return adapted_model(transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)), seed, rank)


def adapted_model(
    model: nn.Module,
    seed: int,
    rank: int,
    head: str = "classifier",
    gradient_checkpointing: bool = False,
    **lora: Any,
) -> AdaptedModel:
    """A model with LoRA of scale 4 / rank in place, on the CPU, its head trained.

    Args:
        head: name of the module that is the head.
        lora: further keys of the section `lora`.
    """
    base = BaseModel(model.eval().requires_grad_(False), head, True, [])
    config = ModelConfig(base="tiny", gradient_checkpointing=gradient_checkpointing)
    return adapt(base, LoraSection(r=rank, lora_alpha=4, **lora), config, seed, torch.device("cpu"))


def random_texts(examples: int, seed: int = 0, padding: int = 0) -> Batch:
    """Random tokens and labels; texts of 3 to 8 tokens, padded on the right to 8."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, LABELS, (examples,), generator=generator)
    lengths = torch.randint(3, 9, (examples,), generator=generator)
    lengths[0] = 8
    ids = torch.randint(4, VOCABULARY, (examples, 8), generator=generator)
    mask = (torch.arange(8) < lengths[:, None]).long()
    return Batch({"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}, labels)


def mean_gradient(model: AdaptedModel, examples: Batch) -> dict[str, Tensor]:
    """Gradient of the mean loss over a batch with respect to every trainable tensor, by plain autograd."""
    parameters = {name: getattr(module, kind) for name, (module, kind, _) in model.tensors.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss = model.losses(model.peft_model, examples).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return dict(zip(parameters, gradients, strict=True))
