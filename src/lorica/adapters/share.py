"""Write what others can use: a copy of an adapter that names its base model, or a whole model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard

# The HTTP client's own base class, whichever client this release of the library has.
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

from lorica.adapters.base_files import EMBEDDED, resolve_base
from lorica.adapters.export import (
    ADAPTER_CONFIG,
    check_exported,
    load_exported,
    read_export,
    write_description,
)
from lorica.adapters.loading_section import HEADING
from lorica.errors import UserError
from lorica.files import replaced_folder
from lorica.markdown import fenced
from lorica.tasks.kind import kind_of

# The line of a card that loads the base model with PEFT, up to the model's name.
_BASE_LINE = re.compile(r'(?m)^(base = \w+\.from_pretrained\()("[^"]*"|resolve_base\("[^"]*"\))')
_LOADING_SECTION = re.compile(rf"(?ms)^## {HEADING}\n.*?(?=^## |\Z)")


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
            write_description(temporary, export)
            local = Path(base).is_dir()
            named = json.dumps(Path(base).absolute().name if local else base, ensure_ascii=False)
            _rewrite_card(
                temporary, {} if local else {"base_model": base}, _BASE_LINE, lambda found: f"{found[1]}{named}"
            )


def push_adapter(folder: Path, repository: str, base: str | None = None, private: bool = True) -> str:
    """Upload an adapter to the Hugging Face hub, with the account that `hf auth login` has stored.

    Args:
        repository: `ACCOUNT/NAME`; created if there is none.
        base: hub id of the base model, which the uploaded adapter then names.
        private: of a new repository.

    Returns:
        The address of the commit.

    Raises:
        UserError: as `copy_adapter`; the base model is a folder, which others do not have; the hub refuses.
    """
    named = base or read_export(folder).model.base
    if named.startswith(EMBEDDED) or Path(named).expanduser().is_dir():
        problem = "others do not have this folder"
        if named.startswith(EMBEDDED):
            problem = "it is part of Lorica, and not on the hub"
        raise UserError("--base", named, problem, "name the base model's hub id: --base ACCOUNT/MODEL")
    with TemporaryDirectory(prefix="lorica-") as place:
        copy_adapter(folder, Path(place) / "adapter", named)
        hub = HfApi()
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            done = hub.upload_folder(
                repo_id=repository, folder_path=Path(place) / "adapter", commit_message="Adapter, by lorica push"
            )
        # The library's own errors, and those of the HTTP client below it.
        except (HTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            remedy = "run hf auth login, and check the name and the network"
            raise UserError("REPO", repository, f"the hub does not take it ({said})", remedy) from error
    return str(done.commit_url)


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
    model = load_exported(folder, export)
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
            lines = fenced(
                f"from transformers import {kind.model_class}\n\n"
                f'model = {kind.model_class}.from_pretrained("{target.name}"{trust}).eval()'
            )
            section = f"## {HEADING}\n\n{lines}\n\n"
            _rewrite_card(temporary, {"library_name": "transformers"}, _LOADING_SECTION, lambda _: section)


def _check_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("DIR", str(target), "it exists and is not empty", "choose a new folder")


def _rewrite_card(
    folder: Path, front_matter: dict[str, str], pattern: re.Pattern[str], by: Callable[[re.Match[str]], str]
) -> None:
    """Change what the hub searches by, and a part of the text, in an adapter's model card, if it has one."""
    path = folder / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    for key, value in front_matter.items():
        setattr(card.data, key, value)
    path.write_text(f"---\n{card.data.to_yaml()}\n---\n{pattern.sub(by, card.text)}", encoding="utf-8")
