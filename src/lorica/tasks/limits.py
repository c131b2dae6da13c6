"""What a text model can take: so many positions, and the tokens that it has an embedding for.

One record beyond these limits would end a run in the middle, when it happens to be sampled: after releases were
charged, and in a way that a server can see. They are the model's, so they are known before any record is read.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from lorica.errors import UserError

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# What a tokenizer adds by itself.
ADDED = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "unk_token_id")


def fit_tokenizer(tokenizer: Any, config: Any, base: str) -> None:
    """Make a tokenizer give what its model can take.

    - `model_max_length` becomes what the model has positions for, if that is less.
    - Special tokens without an embedding that it adds to no text (such as Gemma 3's place of an image, in the models
      for texts alone) are read as any other text.
    - Token types are left out if the model has only one.

    Args:
        config: of the model, by transformers.
        base: the model as the configuration names it, for errors.

    Raises:
        UserError: the tokenizer gives tokens that the model has no embedding for.
    """
    config = config.get_text_config()
    limit = most_tokens(config)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    _check_ids(tokenizer, config, base)
    types = getattr(config, "type_vocab_size", None)
    if types and max(tokenizer("a", "b").get("token_type_ids", [0])) >= types:
        kept = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = kept


def most_tokens(config: Any) -> int | None:
    """The most tokens of a text that a model takes; None if it sets no limit.

    It is `max_position_embeddings`. RoBERTa and its relatives count positions from one beyond the padding id, so that
    they take `pad_token_id + 1` tokens less: those whose table of positions has a padding row.
    """
    if getattr(config, "position_biased_input", True) is False or getattr(config, "alibi", False):
        return None
    found = next((value for name in POSITIONS if (value := getattr(config, name, None))), None)
    if not isinstance(found, int) or found < 1:
        return None
    return max(found - _first_position(config), 1)


def _first_position(config: Any) -> int:
    from transformers import AutoModel

    # No memory and no random numbers: only the shapes are made.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModel.from_config(config)
    tables = [
        module.padding_idx
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
    ]
    return max(tables, default=-1) + 1


def _check_ids(tokenizer: Any, config: Any, base: str) -> None:
    rows = config.vocab_size
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    added = {number for name in ADDED if (number := getattr(tokenizer, name, None)) is not None}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    numbers = set(beyond.values())
    if not tokenizer.is_fast or numbers & added or numbers - special:
        raise UserError(
            "model.base",
            base,
            f"its tokenizer has {len(beyond)} tokens, such as {min(beyond, key=beyond.__getitem__)!r} (id "
            f"{min(numbers)}), that the model has no embedding for (it has {rows})",
            "use the model's own tokenizer, or save the model after model.resize_token_embeddings(len(tokenizer))",
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
