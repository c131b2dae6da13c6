"""What a comparison runs: one experiment with each of several methods, and with options of its own for each."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from lorica.config import ExperimentConfig, load
from lorica.errors import UserError
from lorica.methods.base import find_method, registry


@dataclass(frozen=True)
class Variant:
    """One line of a comparison.

    Attributes:
        label: how tables and plots call it.
        config: the experiment with this variant's method and options.
    """

    label: str
    config: ExperimentConfig


def parse_variant(label: str, config: ExperimentConfig) -> Variant:
    """`as-lora`, or with options `as-lora:score=energy+server.denoise=kalman`.

    A key with a dot is one of the experiment, such as those of `local` and `server`; one without is the method's own.
    Options in the configuration's own `method` section hold for that method only.

    Raises:
        UserError: no such method, an option not of the form `key=value`, a key that does not exist or a value that it
            does not take.
    """
    name, _, text = label.partition(":")
    if name not in registry():
        raise UserError("--methods", name, "no such method", f"choose among: {', '.join(registry())}")
    options = dict(config.method.options) if name == config.method.name else {}
    overrides = []
    for option in filter(None, text.split("+")):
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError("--methods", label, f"{option!r} is not key=value", "write as-lora:score=energy")
        if "." in key:
            overrides.append(option)
        else:
            options[key] = yaml.safe_load(value)
    changed = load(config.model_dump() | {"method": {"name": name, **options}}, overrides)
    find_method(changed.method)
    return Variant(label, changed)
