"""Export an adapted model as a standard PEFT folder, and load it back."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.base_files import EMBEDDED, base_identity, resolve_base
from lorica.adapters.base_model import load_base, resolve_device
from lorica.adapters.names import Pair
from lorica.adapters.state import fold, stack_pairs
from lorica.config import ModelConfig, TaskConfig
from lorica.errors import UserError
from lorica.files import read_json, sha256_of
from lorica.paths import user_path
from lorica.pretrained import damaged_file
from lorica.tasks.kind import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = "lorica.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Export:
    """What an adapter was trained for: all that using it takes beside the PEFT files.

    Attributes:
        task: names no files once it has been read back from an adapter's folder.
    """

    model: ModelConfig
    task: TaskConfig
    label_names: list[str]
    seed: int


def export_adapter(model: AdaptedModel, merged: Mapping[str, Pair], folder: Path, export: Export, card: str) -> None:
    """Write the model's current adapter as a PEFT folder: with a model card, the tokenizer or image processor, and the
    description that `load_adapter` reads.

    `PeftModel.from_pretrained(base, folder)` loads it into the original base with a head of the same number of labels.
    It refuses an adapter of a mean-pooled model, which it could only load into a model that pools otherwise.

    Args:
        merged: site name -> `(B, A)` merged into the frozen weight. The factors are stacked with it, so the exported
            rank is higher than the trained one. If it exceeds the rank of a full matrix, the product is used instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind, base = kind_of(export.task), resolve_base(export.model.base)
    # Embeddings are never trained; PEFT would ask the hub for the size of the vocabulary.
    model.peft_model.save_pretrained(folder, save_embedding_layers=False)
    tensors: dict[str, Tensor] = safetensors.torch.load_file(folder / WEIGHTS)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    # A path that means the same wherever the adapter is loaded on this machine.
    config["base_model_name_or_path"] = str(Path(base).absolute()) if Path(base).is_dir() else base
    if kind.peft_task is not None:
        config |= {"task_type": kind.peft_task, "auto_mapping": None}
        config["modules_to_save"] = _add_heads(model, tensors, config["modules_to_save"] or [], kind.heads)
    if merged:
        config |= _raise_ranks(model, merged, tensors)
    if export.model.pooling == "mean":
        config["target_modules"] = _only_in_lorica([site.name for site in model.sites])
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    kind.save_processor(kind.processor(base), folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_description(folder, export)


def write_description(folder: Path, export: Export) -> None:
    """Write `lorica.json` beside the other files of an adapter, whose hashes it contains."""
    base = export.model.base
    if Path(resolve_base(base)).is_dir() and not base.startswith(EMBEDDED):
        base = str(Path(resolve_base(base)).absolute())
    files = sorted(path for path in folder.iterdir() if path.name not in ("README.md", DESCRIPTION))
    description = {
        "model": export.model.model_dump() | {"base": base},
        "task": export.task.model_dump(exclude={"train", "test", "test_overlap"}),
        "label_names": export.label_names,
        "seed": export.seed,
        "base": base_identity(base),
        "sha256": {path.name: sha256_of(path) for path in files},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False), encoding="utf-8")


def check_exported(folder: Path) -> None:
    """Check that the adapter of a finished run, or the adapters of its clients, are as they were exported.

    Raises:
        UserError: a file is missing, damaged or changed; the remedy writes the adapter again.
    """
    places = sorted(folder.glob("client-*")) or [folder]
    for place in places:
        try:
            # Earlier versions of Lorica wrote no checksums.
            sums = read_json(place / DESCRIPTION).get("sha256", {})
            wrong = next((name for name, found in sums.items() if sha256_of(place / name) != found), None)
        except (OSError, ValueError, AttributeError):
            wrong = DESCRIPTION
        if wrong is not None:
            raise UserError(
                "adapter",
                str(place / wrong),
                "the file is missing or damaged, or was changed after the run",
                f"delete {folder} and run again to export the adapter again",
            )


def read_export(folder: str | Path, base: str | None = None) -> Export:
    """What the adapter in a folder was trained for.

    Args:
        base: the base model, where it is not where the adapter's description says.

    Raises:
        UserError: the folder was not written by Lorica, contains one adapter per client, or a file is missing or
            damaged; the base model is not on this machine, or is another one.
    """
    folder = user_path("adapter", folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        own = sorted(found.parent.name for found in folder.glob(f"client-*/{DESCRIPTION}"))
        if own:
            raise UserError(
                "adapter",
                str(folder),
                "it contains one adapter per client",
                f"load one of them, such as {folder / own[0]}",
            )
        inside = Path(folder) / "adapter"
        remedy = f"give {inside}" if inside.is_dir() else "give the adapter folder of a run, such as runs/NAME/adapter"
        raise UserError("adapter", str(folder), f"has no {DESCRIPTION}", remedy)
    for name in (WEIGHTS, ADAPTER_CONFIG):
        if not (path.parent / name).is_file():
            raise UserError("adapter", str(folder), f"has no {name}", "give the adapter folder of a finished run")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if description.get("sha256", {}).get(WEIGHTS) not in (None, sha256_of(path.parent / WEIGHTS)):
            raise ValueError(f"{WEIGHTS} does not match its checksum in {DESCRIPTION}")
        # Earlier versions of Lorica described the task by its type alone.
        task = description.get("task") or {"type": description["task_type"]}
        export = Export(
            ModelConfig.model_validate(description["model"] | {"precision": "fp32", "dropout": True}),
            TaskConfig.model_validate(task | {"train": "", "test": ""}),
            list(description["label_names"]),
            int(description["seed"]),
        )
        identity = description.get("base")
    except Exception as error:
        raise _not_loaded(Path(folder), error) from error
    return replace(export, model=_with_base(export.model, base, identity))


def load_adapter(folder: str | Path, base: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """The base model with the head and the adapter of a finished run merged into it: a model of transformers in
    evaluation mode and fp32, whose `config.id2label` names the labels.

    Args:
        base: folder or hub id of the base model, where it is not where it was at the export.
        device: `cpu`, `cuda`, …; `auto` uses a GPU if there is one.

    Raises:
        UserError: as `read_export`; no such device. Weights are read from safetensors only, and modules named in the
            folder are not imported.
    """
    return load_exported(folder, read_export(folder, base), device)


def load_exported(folder: str | Path, export: Export, device: str = "cpu") -> PreTrainedModel:
    """As `load_adapter`, of an adapter whose description has been read."""
    target = resolve_device(device)
    from peft import PeftModel

    try:
        for_peft = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # PEFT imports the module named in `megatron_core`.
        if for_peft["peft_type"] != "LORA" or for_peft.get("megatron_config") is not None:
            raise ValueError(f"{ADAPTER_CONFIG} was not written by Lorica")
        loaded = load_base(export.model, export.task.type, export.label_names, export.seed)
        with warnings.catch_warnings():
            # PEFT 0.21 uses a property that transformers 5 has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            peft_model = PeftModel.from_pretrained(loaded.model, folder)
        model: PreTrainedModel = peft_model.merge_and_unload()
    except UserError:
        raise
    # PEFT and the libraries below it raise errors of a dozen types.
    except Exception as error:
        raise _not_loaded(Path(folder), error) from error
    if kind_of(export.task).own_head:
        # Training needs no cache, but who generates does.
        model.config.use_cache = True
    return model.to(target).eval()


def _not_loaded(folder: Path, error: Exception) -> UserError:
    damaged = damaged_file(folder)
    unfit = f"{WEIGHTS} or {ADAPTER_CONFIG} does not fit: {type(error).__name__}: {error}".splitlines()[0]
    reason = unfit if damaged is None else f"{damaged} is damaged"
    problem = f"cannot be loaded ({reason})"
    return UserError("adapter", str(folder), problem, "export the adapter again, or get another copy of it")


def _with_base(model: ModelConfig, base: str | None, identity: object) -> ModelConfig:
    """The model with its base where it is now, which must be the one that the adapter was trained on."""
    found = base or model.base
    remedy = "give its folder or hub id: --base, or load_adapter(…, base=…)"
    try:
        own = base_identity(found)
    except UserError as error:
        raise UserError("base", found, error.problem, remedy) from None
    if isinstance(identity, str) and {own[:7], identity[:7]} == {"sha256:"} and own != identity:
        raise UserError("base", found, f"it is not the model that the adapter was trained on ({identity})", remedy)
    return model.model_copy(update={"base": found})


def _add_heads(model: AdaptedModel, tensors: dict[str, Tensor], saved: list[str], heads: tuple[str, ...]) -> list[str]:
    """Add the heads that PEFT replaces for this kind of task, and name the modules that an adapter contains.

    PEFT replaces every module whose path ends with the name of a head, whether or not the adapter was trained with one.

    Returns:
        The outermost of the modules: of a module within another one, PEFT would make two copies.
    """
    inner = model.peft_model.base_model.model
    paths = [path.replace(".modules_to_save.default", "") for path, _ in inner.named_modules()]
    replaced = {path for path in paths if path.endswith(heads) and ".original_module" not in path} | set(saved)
    outermost = sorted(path for path in replaced if not any(path.startswith(f"{other}.") for other in replaced))
    for path, value in inner.state_dict().items():
        name = path.replace(".modules_to_save.default", "")
        if ".original_module." not in path and any(name.startswith(f"{module}.") for module in outermost):
            tensors.setdefault(f"{PREFIX}{name}", value.detach().cpu().float().contiguous())
    return outermost


def _only_in_lorica(sites: list[str]) -> str:
    """A regular expression for the sites' whole paths, which no other model has: PEFT then says that it found none of
    these modules, and quotes the comment.
    """
    return f"(?#mean pooling: load this adapter with lorica.load_adapter){'|'.join(map(re.escape, sites))}"


def _raise_ranks(model: AdaptedModel, merged: Mapping[str, Pair], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Replace the factors of an exported adapter by `[B_merged B]` and `[A_merged; A]`; gives back PEFT's new ranks."""
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for site in model.sites:
        a_name, b_name = (f"{PREFIX}{site.name}.lora_{factor}.weight" for factor in "AB")
        pair = (tensors[b_name], tensors[a_name])
        if site.name in merged:
            pair = stack_pairs(merged[site.name], pair)
        if pair[0].shape[1] > min(site.d_in, site.d_out):
            pair = fold(pair)
        tensors[b_name], tensors[a_name] = pair[0].contiguous(), pair[1].contiguous()
        ranks[site.name] = pair[0].shape[1]
        scales[site.name] = site.scale * ranks[site.name]
    patterns = {"rank_pattern": ranks, "alpha_pattern": scales, "use_rslora": False}
    return patterns | {"r": max(ranks.values()), "lora_alpha": max(scales.values())}
