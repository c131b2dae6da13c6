"""Project DeBERTa-v3's relative positions separately for each example.

The query and key maps of DeBERTa-v3 are applied to the content `(n, t, d)` and to a table of relative positions
`(1, s, d)`, whose projection is copied for the n examples. The gradient of this second use sums over all examples, so
hooks could not separate them. Copying before projecting gives the same output, but each row belongs to one example.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def separate_examples(model: nn.Module) -> None:
    """Change DeBERTa's attention to copy the position table before projecting it, where it shares the maps."""
    for module in model.modules():
        if getattr(module, "share_att_key", False) and hasattr(module, "disentangled_attention_bias"):
            module.disentangled_attention_bias = partial(_bias, module)  # type: ignore[assignment]


def _bias(attention: Any, query_layer: Tensor, *others: Any, **named: Any) -> Tensor:
    """The position bias of the attention scores, `(n heads, t, t)`."""
    # Without gradients, one shared projection gives the same result at lower cost.
    seen = _Separate(attention, len(query_layer)) if torch.is_grad_enabled() else attention
    found: Tensor = type(attention).disentangled_attention_bias(seen, query_layer, *others, **named)
    return found


class _Separate:
    """Wraps an attention for its `disentangled_attention_bias`: one example with the heads of all n examples.

    With that many heads, the method makes `n heads / n heads = 1` copy of its projection.
    """

    def __init__(self, attention: Any, all_heads: int) -> None:
        self._attention = attention
        self._examples = all_heads // attention.num_attention_heads
        self.num_attention_heads = all_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def query_proj(self, positions: Tensor) -> Tensor:
        found: Tensor = self._attention.query_proj(positions.expand(self._examples, -1, -1))
        return found

    def key_proj(self, positions: Tensor) -> Tensor:
        found: Tensor = self._attention.key_proj(positions.expand(self._examples, -1, -1))
        return found

    def transpose_for_scores(self, projected: Tensor, _: int) -> Tensor:
        found: Tensor = self._attention.transpose_for_scores(projected, self._attention.num_attention_heads)
        return found
