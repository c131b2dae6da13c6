"""What kinds of task ask of a loaded base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorica.errors import UserError


def pad_as_configured(model: nn.Module) -> None:
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


def check_causal(model: Any, base: str) -> None:
    """Refuse a model that sees the tokens that it is to predict: encoders load as language models too, without a word.

    Args:
        base: the model as the configuration names it.

    Raises:
        UserError: a later token changes what the model makes of the earlier ones.
    """
    same_beginning = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    with torch.inference_mode():
        logits = model.eval()(input_ids=same_beginning).logits[:, :-1]
    if not torch.allclose(logits[0], logits[1], atol=1e-3 * logits.std().item()):
        problem = f"{type(model).__name__} is not causal: it sees the tokens that it must predict"
        raise UserError("model.base", base, problem, "give a causal language model")
