"""A tiny tokenizer and tiny random causal models of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers
from torch import nn

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import load_base
from lorica.config import LoraSection, ModelConfig
from lorica.tasks.causal.records import CausalRecords
from lorica.tasks.causal.tokenising import tokenise_causal
from lorica.tasks.readers import Source

END, USER, ASSISTANT, PAD, BEGIN = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|begin|>"
SPECIAL = [PAD, END, USER, ASSISTANT, BEGIN]
SENTENCES = ["what is it", "it is a fine film", "no secret at all", "the answer is #### 42", "Question: Answer:"]
VOCABULARY = 300

# As most chat models write: the words that ask for an answer are also how an answer begins.
CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}{{ '<|end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|end|>\n' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# The last answer looks different from those before it.
RESTLESS = CHAT.replace("{{ '<|end|>\n' }}", "{% if loop.last %}{{ '<|end|>' }}{% endif %}")

PAIRS = {
    "prompt": ["Question: what is it\nAnswer:", "what", "no secret at", "Question:"],
    "completion": [" a fine film", " is it", " all", " the answer is it is a fine film"],
}


def tokenizer(**options: Any) -> Any:
    """Byte-level BPE with GPT-2's trimmed offsets; it has an end-of-text and a padding token, and puts nothing before
    a text unless it has a beginning-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    if "bos_token" in options:
        begin = options["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, bpe.token_to_id(begin))]
        )
    usual = {"pad_token": PAD, "eos_token": END, "additional_special_tokens": [USER, ASSISTANT]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **(usual | options))


def source(columns: dict[str, list[Any]]) -> Source:
    return Source("task.train", "data.jsonl", pa.table(columns), Path())


def pairs(columns: dict[str, list[str]] = PAIRS, max_length: int = 64, **options: Any) -> CausalRecords:
    return tokenise_causal(source(columns), ["prompt", "completion"], tokenizer(**options), max_length)


def _decoder(family: str, tied: bool) -> nn.Module:
    shared: dict[str, Any] = {
        # With room for the token that Qwen2's tokenizer adds.
        "vocab_size": VOCABULARY + 1,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 80,
        "tie_word_embeddings": tied,
        # Larger than usual: a tiny model that hardly tells tokens apart hides mistakes.
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if family == "Qwen3":
        shared["head_dim"] = 8
    config = getattr(transformers, f"{family}Config")(**shared)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=80,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


FAMILIES = {
    "gpt2, tied": _gpt2,
    "llama": lambda: _decoder("Llama", False),
    "qwen2, tied": lambda: _decoder("Qwen2", True),
    "qwen3": lambda: _decoder("Qwen3", False),
}


def checkpoint(folder: Path, family: str) -> str:
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def adapted(folder: Path, family: str, targets: list[str] | str = "all-linear", **settings: Any) -> AdaptedModel:
    """A tiny causal model with every factor filled, since `B = 0` leaves `A` without a gradient."""
    config = ModelConfig(base=checkpoint(folder, family), head="freeze", **settings)
    base = load_base(config, "language-modelling", [], 0)
    model = adapt(base, LoraSection(r=1, lora_alpha=2, target_modules=targets), config, 0, torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    model.write({name: 0.2 * torch.randn(value.shape, generator=draws) for name, value in model.read().items()})
    return model
