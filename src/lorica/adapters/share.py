"""Write what others can use: a copy of an adapter that names its base model, or a whole model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from lorica.adapters.base_files import resolve_base
from lorica.adapters.export import (
    ADAPTER_CONFIG,
    check_exported,
    load_adapter,
    read_export,
    write_description,
)
from lorica.adapters.loading_section import HEADING, loading_section
from lorica.errors import UserError
from lorica.files import replaced_folder
from lorica.markdown import fenced
from lorica.tasks.kind import kind_of


def copy_adapter(folder: Path, target: Path, base: str | None = None) -> None:
    """Copy an adapter's folder, with the base model that it is to name there, such as the hub id of a local model.

    Raises:
        UserError: a file of the adapter is damaged, the base is another one, or the target is not empty.
    """
    _check_empty(target)
    export = read_export(folder, base)
    check_exported(folder)
    with replaced_folder(target) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        if base is not None:
            config = json.loads((temporary / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = base
            (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            _rewrite_card(temporary, loading_section(export, target.name))
            write_description(temporary, export)


def write_merged(folder: Path, target: Path, base: str | None = None) -> None:
    """Write the base model with the adapter merged into its weights, its tokenizer or image processor and the card.

    `AutoModelFor….from_pretrained(target)` loads it. A mean-pooled model is a class of Lorica's, whose code lies in the
    folder: `trust_remote_code=True` loads it where Lorica is not imported.

    Raises:
        UserError: as `load_adapter`, or the target is not empty.
    """
    _check_empty(target)
    export = read_export(folder, base)
    check_exported(folder)
    model = load_adapter(folder, base)
    kind = kind_of(export.task)
    processor = kind.processor(resolve_base(export.model.base))
    padding = getattr(processor, "pad_token_id", None)
    if padding is not None:
        # What the tokenizer beside it pads with: classifiers of decoders read the last token that is not padding.
        model.config.get_text_config().pad_token_id = padding
    with replaced_folder(target) as temporary:
        model.save_pretrained(temporary)
        kind.save_processor(processor, temporary)
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", temporary)
            trust = ", trust_remote_code=True" if export.model.pooling == "mean" else ""
            lines = f"from transformers import {kind.model_class}\n\nmodel = {kind.model_class}.from_pretrained("
            _rewrite_card(temporary, fenced(f'{lines}"{target.name}"{trust}).eval()'), library="transformers")


def _check_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("DIR", str(target), "it exists and is not empty", "choose a new folder")


def _rewrite_card(folder: Path, section: str, library: str = "peft") -> None:
    """Replace the section on loading, and the library that the front matter names."""
    path = folder / "README.md"
    if not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    card = re.sub(rf"(?ms)^## {HEADING}\n.*?(?=^## |\Z)", lambda _: f"## {HEADING}\n\n{section}\n\n", card)
    path.write_text(card.replace("library_name: peft", f"library_name: {library}", 1), encoding="utf-8")
