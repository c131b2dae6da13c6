"""Load the frozen base model with its head, offline if its files are local."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from lorica.adapters.base_files import resolve_base
from lorica.adapters.mean_pooled import MeanPooledClassifier, MeanPooledConfig
from lorica.config import ModelConfig
from lorica.errors import UserError
from lorica.pretrained import from_pretrained
from lorica.streams import stream_seed
from lorica.tasks.kind import TaskKind, kind_named

# Names of the modules after the encoder in all supported families. They are not quantised.
HEADS = ["classifier", "score", "qa_outputs", "pre_classifier", "head", "pooler"]


@dataclass(frozen=True)
class BaseModel:
    """A base model whose parameters are all frozen.

    Attributes:
        model: takes the task's inputs by name; its output has `logits (n, labels)`, or `(n, t, vocabulary)` for a
            language model.
        head: path of the head's last linear map. For a language model it is the map to the vocabulary, which is part of
            the base, often shares its weight with the input embedding, and is never trained or adapted.
        head_is_new: the checkpoint has no head for these labels.
        new_modules: paths of other modules that are not in the checkpoint; an exported adapter includes them.
    """

    model: nn.Module
    head: str
    head_is_new: bool
    new_modules: list[str]


def load_base(config: ModelConfig, task_type: str, label_names: list[str], seed: int) -> BaseModel:
    """The base model with a head for `label_names`, frozen, in evaluation mode, on the CPU in fp32.

    A head in the checkpoint is kept if it has exactly these labels. Otherwise a trained head starts at zero (the same
    for all clients, and without random weights to unlearn), and a frozen head is drawn from the seed. A language model
    keeps its own head and ignores `label_names`.

    A quantised `config.precision` is applied here, any other in `adapt`.

    Raises:
        UserError: the model cannot be loaded, has no linear head for the labels, or mixes examples (batch
            normalisation); the precision needs bitsandbytes, which is missing; for language modelling, the model is not
            a causal language model, or `model.head` is not `freeze`.
    """
    kind = kind_named(task_type)
    base = resolve_base(config.base)
    outputs = kind.outputs(label_names)
    attention = "eager" if config.attention == "auto" and _device_type(config) == "cpu" else config.attention
    options: dict[str, Any] = {
        "weights_only": True,
        "attn_implementation": "sdpa" if attention == "auto" else attention,
        "dtype": torch.float32,
        "output_loading_info": True,
    } | _quantisation(config, kind.heads)
    if not config.dropout:
        options |= dict.fromkeys(_dropout_rates(base), 0.0)
    names = dict(enumerate(label_names))
    naming = {"id2label": names, "label2id": {name: index for index, name in names.items()}} if names else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "initialisation"))
        if config.pooling == "mean":
            if not kind.pooled:
                raise UserError("model.pooling", "mean", f"does not fit {task_type}", "set model.pooling=auto")
            encoder, info = _quietly(transformers.AutoModel.from_pretrained, base, options)
            model: Any = MeanPooledClassifier(MeanPooledConfig(encoder.config, num_labels=outputs, **naming), encoder)
            new_modules = ["classifier"]
            kept = False
        elif kind.own_head:
            model = _load_with_own_head(kind, config, base, options)
            new_modules = []
            kept = True
        else:
            own_names = _checkpoint_labels(base)
            automatic = getattr(transformers, kind.model_class)
            model, info = _quietly(
                automatic.from_pretrained, base, options | naming | {"ignore_mismatched_sizes": True}
            )
            fresh = {*info["missing_keys"], *(_key(entry) for entry in info["mismatched_keys"])}
            new_modules = sorted({name.rsplit(".", 1)[0] for name in fresh})
            same_labels = not label_names or own_names == label_names
            kept = same_labels and _head_path(model, kind.heads, outputs) not in new_modules
    kind.prepare_model(model, config.base)
    head = _vocabulary_path(model) if kind.own_head else _head_path(model, kind.heads, outputs)
    if config.head == "train" and not kept:
        linear = model.get_submodule(head)
        assert isinstance(linear, nn.Linear)
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                "model.base",
                config.base,
                f"batch normalisation ({name}) mixes examples, so records cannot be clipped separately",
                "use a model with layer or group normalisation",
            )
    model.requires_grad_(False)
    return BaseModel(model.eval(), head, not kept, [name for name in new_modules if name != head])


def _dropout_rates(base: str) -> list[str]:
    """The keys of a model's configuration that hold a dropout rate, such as `hidden_dropout_prob` or `resid_pdrop`."""
    settings = _quietly(transformers.AutoConfig.from_pretrained, base, {}).to_dict()
    return [name for name, value in settings.items() if "drop" in name and isinstance(value, float)]


def _quantisation(config: ModelConfig, heads: tuple[str, ...]) -> dict[str, Any]:
    if config.precision not in ("int8", "nf4"):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.precision",
            config.precision,
            "needs bitsandbytes, which is not installed",
            "run pip install 'lorica[quantised]', or set model.precision=bf16",
        )
    # It warns in every pass that it rounds activations, as intended.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    settings = transformers.BitsAndBytesConfig(
        load_in_8bit=config.precision == "int8",
        load_in_4bit=config.precision == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        # Above 0, a large value in one example would change the precision of a column for the whole batch.
        llm_int8_threshold=0.0,
        llm_int8_skip_modules=sorted({*HEADS, *heads}),
    )
    return {
        "quantization_config": settings,
        "dtype": torch.bfloat16,
        "device_map": {"": resolve_device(config.device)},
    }


def _quietly(function: Callable[..., Any], base: str, options: dict[str, Any]) -> Any:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return from_pretrained(
            function, base, "the model", "give a local model folder, or check the hub id and the network", **options
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def _load_with_own_head(kind: type[TaskKind], config: ModelConfig, base: str, options: dict[str, Any]) -> Any:
    if config.head != "freeze":
        raise UserError(
            "model.head", config.head, "the head of a language model is part of its base", "set model.head=freeze"
        )
    model, info = _quietly(getattr(transformers, kind.model_class).from_pretrained, base, options)
    if info["missing_keys"]:
        problem = f"the checkpoint is not a complete language model ({min(info['missing_keys'])} is missing)"
        raise UserError("model.base", config.base, problem, "give a causal language model")
    return model


def _checkpoint_labels(base: str) -> list[str]:
    names = _quietly(transformers.AutoConfig.from_pretrained, base, {}).id2label
    return [str(names[index]) for index in sorted(names)]


def _key(entry: Any) -> str:
    # transformers lists a mismatched key with its two shapes.
    return entry if isinstance(entry, str) else str(entry[0])


def _head_path(model: nn.Module, heads: tuple[str, ...], outputs: int) -> str:
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and name.split(".")[0] in heads
    ]
    if not found:
        raise UserError(
            "model.base",
            type(model).__name__,
            f"it has no linear map named {' or '.join(heads)} with the number of outputs that the task needs",
            "set model.pooling=mean for a text task, or use a model with such a head",
        )
    return found[-1]


def _vocabulary_path(model: Any) -> str:
    output = model.get_output_embeddings()
    names: list[str] = [name for name, module in model.named_modules() if module is output]
    return names[0]


def _device_type(config: ModelConfig) -> str:
    return resolve_device(config.device).type


def resolve_device(name: str) -> torch.device:
    """The device of this name; `auto` selects a GPU if there is one.

    Raises:
        UserError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError("model.device", name, f"not available ({error})", "set model.device=auto") from None
