"""DeBERTa-v3's relative positions, projected for every example by itself.

Its query and key maps see the content `(n, t, d)` and also a table of relative positions `(1, s, d)`, whose projection
is then copied for the n examples. In the gradient of that second use all examples are summed up, so no hook could tell
them apart. Copying first and projecting afterwards gives the same output with rows that belong to one example each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def separate_examples(model: nn.Module) -> None:
    """Make every attention of DeBERTa that shares its maps with the positions copy before it projects."""
    for module in model.modules():
        if getattr(module, "share_att_key", False) and hasattr(module, "disentangled_attention_bias"):
            module.disentangled_attention_bias = partial(_bias, module)  # type: ignore[assignment]


def _bias(attention: Any, query_layer: Tensor, *others: Any, **named: Any) -> Tensor:
    """What the positions add to the attention scores, `(n heads, t, t)`."""
    # Without gradients the one projection for all is the same and costs less.
    seen = _Separate(attention, len(query_layer)) if torch.is_grad_enabled() else attention
    found: Tensor = type(attention).disentangled_attention_bias(seen, query_layer, *others, **named)
    return found


class _Separate:
    """An attention as its own `disentangled_attention_bias` is to see it: one example with the heads of all n.

    With that many heads the method makes `n heads / n heads = 1` copy of what it projects.
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
