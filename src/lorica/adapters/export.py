"""Export an adapted model as a standard PEFT folder, and load it back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.base_files import base_identity, resolve_base
from lorica.adapters.base_model import load_base
from lorica.adapters.names import Pair
from lorica.adapters.state import fold, stack_pairs
from lorica.config import ModelConfig
from lorica.errors import UserError
from lorica.files import sha256_of
from lorica.pretrained import damaged_file

DESCRIPTION = "lorica.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Export:
    """What `load_adapter` needs in addition to the PEFT files."""

    model: ModelConfig
    task_type: str
    label_names: list[str]
    seed: int


def export_adapter(model: AdaptedModel, merged: Mapping[str, Pair], folder: Path, export: Export, card: str) -> None:
    """Write the model's current adapter as a PEFT folder with a model card and the description for `load_adapter`.

    `PeftModel.from_pretrained(base, folder)` loads it into the original base with a head of the same number of labels.

    Args:
        merged: site name -> `(B, A)` merged into the frozen weight. The factors are stacked with it, so the exported
            rank is higher than the trained one. If it exceeds the rank of a full matrix, the product is used instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_model.peft_config["default"].base_model_name_or_path = resolve_base(export.model.base)
    model.peft_model.save_pretrained(folder)
    if merged:
        _raise_ranks(model, merged, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    sums = {name: sha256_of(folder / name) for name in (WEIGHTS, ADAPTER_CONFIG)}
    description = asdict(export) | {
        "model": export.model.model_dump(),
        "base": base_identity(export.model.base),
        "sha256": sums,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")


def check_exported(folder: Path) -> None:
    """Check that the adapter of a finished run, or the adapters of its clients, are as they were exported.

    Raises:
        UserError: a file is missing, damaged or changed; the remedy writes the adapter again.
    """
    places = sorted(folder.glob("client-*")) or [folder]
    for place in places:
        try:
            # Earlier versions of Lorica wrote no checksums.
            sums = json.loads((place / DESCRIPTION).read_bytes()).get("sha256", {})
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


def load_adapter(folder: str | Path) -> nn.Module:
    """Load the base model, head and adapter of a finished run, in evaluation mode and fp32.

    Raises:
        UserError: the folder was not written by Lorica, contains one adapter per client, or a file is missing or
            damaged. Weights are read from safetensors only, and modules named in the folder are not imported.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        own = sorted(found.parent.name for found in Path(folder).glob(f"client-*/{DESCRIPTION}"))
        if own:
            raise UserError(
                "adapter",
                str(folder),
                "it contains one adapter per client",
                f"load one of them, such as {Path(folder) / own[0]}",
            )
        raise UserError("adapter", str(folder), f"has no {DESCRIPTION}", "give the adapter folder of a finished run")
    from peft import PeftModel

    for name in (WEIGHTS, ADAPTER_CONFIG):
        if not (path.parent / name).is_file():
            raise UserError("adapter", str(folder), f"has no {name}", "give the adapter folder of a finished run")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if description.get("sha256", {}).get(WEIGHTS) not in (None, sha256_of(path.parent / WEIGHTS)):
            raise ValueError(f"{WEIGHTS} does not match its checksum in {DESCRIPTION}")
        config = ModelConfig.model_validate(description["model"] | {"precision": "fp32"})
        for_peft = json.loads((path.parent / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # PEFT imports the module named in `megatron_core`.
        if for_peft["peft_type"] != "LORA" or for_peft.get("megatron_config") is not None:
            raise ValueError(f"{ADAPTER_CONFIG} was not written by Lorica")
        base = load_base(config, description["task_type"], description["label_names"], description["seed"])
        with warnings.catch_warnings():
            # PEFT 0.21 uses a property that transformers 5 has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            model: nn.Module = PeftModel.from_pretrained(base.model, folder).eval()
    except UserError:
        raise
    # PEFT and the libraries below it raise errors of a dozen types.
    except Exception as error:
        damaged = damaged_file(path.parent)
        unfit = f"{WEIGHTS} or {ADAPTER_CONFIG} does not fit: {type(error).__name__}: {error}".splitlines()[0]
        reason = unfit if damaged is None else f"{damaged} is damaged"
        problem = f"cannot be loaded ({reason})"
        raise UserError(
            "adapter", str(folder), problem, "export the adapter again, or get another copy of it"
        ) from error
    return model


def _raise_ranks(model: AdaptedModel, merged: Mapping[str, Pair], folder: Path) -> None:
    """Replace the factors of an exported adapter by `[B_merged B]` and `[A_merged; A]`, and update the ranks."""
    tensors: dict[str, Tensor] = safetensors.torch.load_file(folder / WEIGHTS)
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
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config_path = folder / ADAPTER_CONFIG
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {"rank_pattern": ranks, "alpha_pattern": scales, "use_rslora": False}
    config |= {"r": max(ranks.values()), "lora_alpha": max(scales.values())}
    config_path.write_text(json.dumps(config, indent=2), encoding="utf-8")
