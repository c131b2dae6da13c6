"""The variants that a comparison runs: one experiment with different methods and options."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.config import ExperimentConfig, load
from lorica.errors import UserError
from lorica.methods.base import find_method, registry
from lorica.registry import current_method_name
from lorica.strict_yaml import read_yaml


@dataclass(frozen=True)
class Variant:
    """One line of a comparison.

    Attributes:
        label: its name in tables and plots.
        config: the experiment with this variant's method and options.
    """

    label: str
    config: ExperimentConfig


def parse_variant(label: str, config: ExperimentConfig) -> Variant:
    """Parse `as-lora`, or with options `as-lora:score=energy+server.denoise=kalman`.

    A key with a dot belongs to the experiment (`local.*`, `server.*`); a key without a dot is an option of the method.
    Options in the `method` section of the configuration apply to that method only.

    Raises:
        UserError: no such method, an option not of the form `key=value`, an unknown key or an invalid value.
    """
    name, _, text = label.partition(":")
    name = current_method_name(name)
    if name not in registry():
        raise UserError("--methods", name, "no such method", f"choose one of: {', '.join(registry())}")
    options = dict(config.method.options) if name == config.method.name else {}
    overrides = []
    for option in filter(None, text.split("+")):
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError("--methods", label, f"{option!r} is not key=value", "write as-lora:score=energy")
        if "." in key:
            overrides.append(option)
        else:
            options[key] = read_yaml(value, f"method.{key}", value, "put the value in quotes")
    changed = load(config.model_dump() | {"method": {"name": name, **options}}, overrides)
    find_method(changed.method)
    return Variant(label, changed)
