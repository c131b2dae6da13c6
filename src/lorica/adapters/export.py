"""Standard PEFT folders out of an adapted model, and back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.base_model import load_base, resolve_base
from lorica.config import ModelConfig
from lorica.errors import UserError

DESCRIPTION = "lorica.json"


def export_adapter(
    model: AdaptedModel, folder: Path, config: ModelConfig, task_type: str, label_names: list[str], seed: int, card: str
) -> None:
    """Write the model's current adapter as a PEFT folder with a model card, and what `load_adapter` needs beside it.

    `PeftModel.from_pretrained(base, folder)` loads it into the base with a head of the same number of labels.
    """
    temporary = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    model.peft_model.peft_config["default"].base_model_name_or_path = resolve_base(config.base)
    model.peft_model.save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    description = {"model": config.model_dump(), "task_type": task_type, "label_names": label_names, "seed": seed}
    (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def load_adapter(folder: str | Path) -> nn.Module:
    """Base model, head and adapter of a finished run, in evaluation mode, fp32.

    Raises:
        UserError: the folder was not written by Lorica.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError("adapter", str(folder), f"holds no {DESCRIPTION}", "give the adapter folder of a finished run")
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = ModelConfig.model_validate(description["model"] | {"precision": "fp32"})
    base = load_base(config, description["task_type"], description["label_names"], description["seed"])
    model: nn.Module = PeftModel.from_pretrained(base.model, folder).eval()
    return model
