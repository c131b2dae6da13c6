"""Load the frozen base model with its head, offline if its files are local."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lorica.adapters.base_files import resolve_base
from lorica.config import ModelConfig
from lorica.errors import UserError
from lorica.streams import stream_seed

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


class MeanPooledClassifier(nn.Module):
    """An encoder with a linear head on the mean of its last hidden states, without padding.

    `logits = W · (Σ_t m_t h_t / Σ_t m_t) + c` with the attention mask `m (n, t)` and hidden states `h (n, t, d)`.
    """

    def __init__(self, encoder: transformers.PreTrainedModel, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean))


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
    base = resolve_base(config.base)
    labels = len(label_names)
    attention = "eager" if config.attention == "auto" and _device_type(config) == "cpu" else config.attention
    options: dict[str, Any] = {
        "local_files_only": Path(base).is_dir(),
        "attn_implementation": "sdpa" if attention == "auto" else attention,
        "dtype": torch.float32,
        "output_loading_info": True,
    } | _quantisation(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "initialisation"))
        if config.pooling == "mean":
            if not task_type.startswith("text-"):
                raise UserError("model.pooling", "mean", f"does not fit {task_type}", "set model.pooling=auto")
            encoder, info = _from_pretrained(transformers.AutoModel.from_pretrained, base, options)
            model: Any = MeanPooledClassifier(encoder, labels)
            new_modules = ["classifier"]
            kept = False
        elif task_type == "language-modelling":
            model = _load_causal(config, base, options)
            new_modules = []
            kept = True
        else:
            automatic = {
                "text-classification": transformers.AutoModelForSequenceClassification,
                "text-regression": transformers.AutoModelForSequenceClassification,
                "image-classification": transformers.AutoModelForImageClassification,
                "question-answering": transformers.AutoModelForQuestionAnswering,
            }[task_type]
            spans = task_type == "question-answering"
            # One score for an answer's first token and one for its last.
            labels = 2 if spans else labels
            names = {} if spans else dict(enumerate(label_names))
            naming = {"id2label": names, "label2id": {name: index for index, name in names.items()}} if names else {}
            own_names = _checkpoint_labels(base, options)
            model, info = _from_pretrained(
                automatic.from_pretrained, base, options | naming | {"ignore_mismatched_sizes": True}
            )
            fresh = {*info["missing_keys"], *(_key(entry) for entry in info["mismatched_keys"])}
            new_modules = sorted({name.rsplit(".", 1)[0] for name in fresh})
            kept = (spans or own_names == label_names) and _head_path(model, labels) not in new_modules
    if task_type == "text-classification":
        _pad_as_configured(model)
    head = _vocabulary_path(model) if task_type == "language-modelling" else _head_path(model, labels)
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


def _quantisation(config: ModelConfig) -> dict[str, Any]:
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
        llm_int8_skip_modules=HEADS,
    )
    return {
        "quantization_config": settings,
        "dtype": torch.bfloat16,
        "device_map": {"": resolve_device(config.device)},
    }


def _pad_as_configured(model: nn.Module) -> None:
    """Replace masked tokens by the model's own padding id, whatever the tokenizer pads with.

    Decoder models read the logits at the last token that is not the padding id. A checkpoint without a padding id uses
    its end-of-text token.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = (end[0] if isinstance(end, list) else end) or 0
    padding = config.pad_token_id

    def pad(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "input_ids" not in named or "attention_mask" not in named:
            return inputs, named
        return inputs, named | {"input_ids": named["input_ids"].masked_fill(named["attention_mask"] == 0, padding)}

    model.register_forward_pre_hook(pad, with_kwargs=True)


def _from_pretrained(function: Callable[..., Any], base: str, options: dict[str, Any]) -> Any:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return function(base, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            "model.base",
            base,
            f"cannot be loaded ({reason})",
            "give a local model folder, or check the hub id and the network",
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def _load_causal(config: ModelConfig, base: str, options: dict[str, Any]) -> Any:
    if config.head != "freeze":
        raise UserError(
            "model.head", config.head, "the head of a language model is part of its base", "set model.head=freeze"
        )
    model, info = _from_pretrained(transformers.AutoModelForCausalLM.from_pretrained, base, options)
    if info["missing_keys"]:
        problem = f"the checkpoint is not a complete language model ({min(info['missing_keys'])} is missing)"
        raise UserError("model.base", config.base, problem, "give a causal language model")
    # Training does not generate text, so a cache would only use memory.
    model.config.use_cache = False
    # Encoders silently load as language models too.
    same_beginning = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    with torch.inference_mode():
        logits = model.eval()(input_ids=same_beginning).logits[:, :-1]
    if not torch.allclose(logits[0], logits[1], atol=1e-3 * logits.std().item()):
        problem = f"{type(model).__name__} is not causal: it sees the tokens that it must predict"
        raise UserError("model.base", config.base, problem, "give a causal language model")
    return model


def _checkpoint_labels(base: str, options: dict[str, Any]) -> list[str]:
    def load(folder: str, **_: Any) -> Any:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=options["local_files_only"])

    names = _from_pretrained(load, base, {}).id2label
    return [str(names[index]) for index in sorted(names)]


def _key(entry: Any) -> str:
    # transformers lists a mismatched key with its two shapes.
    return entry if isinstance(entry, str) else str(entry[0])


def _head_path(model: nn.Module, labels: int) -> str:
    heads: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == labels
        and name.split(".")[0] in ("classifier", "score", "qa_outputs")
    ]
    if not heads:
        raise UserError(
            "model.base",
            type(model).__name__,
            "it has no linear map named classifier, score or qa_outputs with the number of outputs that the task needs",
            "set model.pooling=mean for a text task, or use a model with such a head",
        )
    return heads[-1]


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
