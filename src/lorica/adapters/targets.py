"""Select the modules of a model that get LoRA factors."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from lorica.adapters.mean_pooled import MeanPooledConfig
from lorica.adapters.sites import layer_of
from lorica.errors import UserError

# Names of the same role in different model families; transformers 5 renamed several.
ROLES = [
    ("query", "q_proj", "q_lin", "query_proj", "q"),
    ("key", "k_proj", "k_lin", "key_proj", "k"),
    ("value", "v_proj", "v_lin", "value_proj", "v"),
]
# Names of linear maps that compute query, key and value together.
FUSED = ("c_attn", "Wqkv", "qkv", "query_key_value", "qkv_proj")


def match_targets(
    model: nn.Module,
    targets: list[str] | str,
    head: str,
    new_modules: Collection[str] = (),
    layers: Collection[int] | None = None,
) -> list[str]:
    """Dotted names of the linear maps selected by `targets`, in the model's order, without the head.

    Args:
        targets: a list of names with which module paths end; one regular expression for whole paths; `all-linear`; or
            `auto`. `auto` selects query and value or, if the model has no such maps, PEFT's default for the family; in
            a model for text, the towers for images and sound are left out. The roles query, key and value are
            recognised under each family's own names, and in a fused map for all three.
        head: path of the head's linear map.
        new_modules: paths of modules that are not in the checkpoint; they are exported whole, so they are left out too.
        layers: numbers of the layers to which the selection is limited; a map's is the last number in its path, as in
            PEFT. None for all maps, also those outside of layers.

    Raises:
        UserError: an entry of `targets` matches no linear map, or a layer has none; names the available ones.
    """
    from transformers.pytorch_utils import Conv1D

    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name not in (head, *new_modules)
        and not name.startswith(head.split(".")[0] + ".")
    ]
    if layers is None:
        return _matching(model, targets, linear)
    by_layer: dict[int, list[str]] = {}
    for name in _matching(model, targets, linear):
        last = layer_of(name).rsplit(".", 1)[-1]
        if last.isdigit():
            by_layer.setdefault(int(last), []).append(name)
    for layer in layers:
        if layer not in by_layer:
            available = ", ".join(map(str, sorted(by_layer))) or "none"
            raise UserError(
                "lora.layers_to_transform",
                sorted(layers),
                f"no selected linear map is in a layer {layer}",
                f"choose from these layers: {available}",
            )
    chosen = {name for layer in layers for name in by_layer[layer]}
    return [name for name in linear if name in chosen]


def _matching(model: nn.Module, targets: list[str] | str, linear: list[str]) -> list[str]:
    if targets == "all-linear":
        return linear
    if targets == "auto":
        linear = _without_other_towers(model, linear)
        targets = _usual_targets(model, linear)
    if isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
        try:
            matched = [name for name in linear if re.fullmatch(targets, name)]
        except re.error as error:
            problem = f"not a valid regular expression ({error})"
            raise UserError("lora.target_modules", targets, problem, "correct the expression") from None
        if not matched:
            raise _no_match(targets, linear)
        return matched
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        found = _named(target, linear)
        if not found:
            raise _no_match(target, linear)
        chosen.update(found)
    return [name for name in linear if name in chosen]


def _named(target: str, linear: list[str]) -> list[str]:
    """Paths that end with this name or, if there are none, with another name of the same role."""
    role = next((role for role in ROLES if target in role), ())
    for ending in (target, *role, *(FUSED if role else ())):
        found = [name for name in linear if name == ending or name.endswith(f".{ending}")]
        if found:
            return found
    return []


def _without_other_towers(model: nn.Module, linear: list[str]) -> list[str]:
    """Leave out the maps that text inputs do not reach: they would add noise to every step and learn nothing."""
    from transformers import PreTrainedModel

    if "text" not in getattr(model, "input_modalities", "text"):
        return linear
    towers = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and "text" not in module.input_modalities
    ]
    return [name for name in linear if not name.startswith(tuple(towers))]


def _usual_targets(model: nn.Module, linear: list[str]) -> list[str] | str:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if _named("query", linear) and _named("value", linear):
        return ["query", "value"]
    config = getattr(model, "config", None)
    family = getattr(config.text_config if isinstance(config, MeanPooledConfig) else config, "model_type", None)
    targets: list[str] | str | None = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(family)
    if targets is None:
        raise _no_match("auto", linear)
    return targets


def _no_match(target: object, linear: list[str]) -> UserError:
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    return UserError(
        "lora.target_modules", target, "no linear map of the model matches", f"choose one of: {', '.join(endings)}"
    )
