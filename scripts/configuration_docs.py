"""Write docs/configuration.md from the configuration models, so that it cannot go stale (a test compares)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lorica.config import ExperimentConfig
from lorica.methods.base import registry
from lorica.owner.settings import NodeSettings
from lorica.privacy.policy import Policy

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

Generated from `src/lorica/config.py` by `python scripts/configuration_docs.py`; do not edit. On the command line, set
any key with `section.key=value`. An unknown key is an error that suggests the nearest known key.
"""
POLICY = """A separate file, which stays with the owner: see [privacy.md](privacy.md#the-owners-policy). Generated from
`src/lorica/privacy/policy.py`.
"""
NODE = """The `--node-config` of an owner's SuperNode: see [federation.md](federation.md). Generated from
`src/lorica/owner/settings.py`.
"""


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Experiment\n", _table(ExperimentConfig, skip_sections=True)]
    for name, field in ExperimentConfig.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            note = f"\n{_text(field.description)}\n" if field.description else ""
            parts += [f"## `{name}`\n", f"{_text(section.__doc__)}\n{note}", _table(section)]
    parts += ["## An owner's policy\n", POLICY, _table(Policy)]
    parts += ["## An owner's node\n", NODE, _table(NodeSettings)]
    parts.append("## Options of methods\n\nThese keys stand beside `method.name`.\n")
    for name, method in registry().items():
        if method.Options.model_fields:
            parts += [f"### `{name}`\n", _table(method.Options)]
    return "\n".join(parts)


def _section(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _table(model: type[BaseModel], skip_sections: bool = False) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if skip_sections and _section(field.annotation) is not None:
            continue
        default = "required" if field.default is PydanticUndefined else f"`{_value(field.default)}`"
        lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {_text(field.description)} |")
    return "\n".join(lines) + "\n"


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{_value(value)}`" for value in get_args(annotation))
    name = annotation.__name__ if annotation in (str, int, float, bool) else str(annotation)
    return name.replace("typing.", "").replace("None", "null").replace("|", "\\|")


def _value(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _text(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
