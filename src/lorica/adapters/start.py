"""Start a run from a public PEFT adapter (`lora.start`), checked against the run's model before anything is written."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.base_files import base_identity, resolve_base
from lorica.adapters.export import ADAPTER_CONFIG, DESCRIPTION, PREFIX, WEIGHTS
from lorica.adapters.names import FIXED, is_factor
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from lorica.config import ExperimentConfig, LoraSection
from lorica.errors import UserError
from lorica.files import read_json
from lorica.paths import user_path

LARGEST_JSON = 2**22
"""Maximum number of bytes in a JSON file of an adapter."""
_COPY = "give the folder of a PEFT adapter, such as runs/NAME/adapter"
# Keys of PEFT's LoraConfig that are checked below, or do not change what a saved adapter computes. Any other key must
# have no value: it could.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_type", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "init_lora_weights", "bias", "megatron_core", "loftq_config", "eva_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# Other initialisations, such as PiSSA, also change the base weights, so that the factors alone mean nothing.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The adapter that a run starts from.

    Attributes:
        name: the last part of the folder's path; of a run's `adapter`, the last two.
        sha256: of its `adapter_model.safetensors`, as `sha256sum` prints it.
        tensors: the run's tensor names -> values, fp32. Tensors that the folder does not have, or a head for other
            labels, are left out and stay as initialised.
    """

    name: str
    sha256: str
    tensors: Mapping[str, Tensor]

    def apply(self, state: AdapterState, merges: bool) -> None:
        """Move a new adapter to this start.

        Args:
            merges: merge the products `B A` into the frozen weights, and leave the factors as initialised.
        """
        state.assign({name: value for name, value in self.tensors.items() if not (merges and is_factor(name))})
        if merges:
            state.merge({site.name: (self.tensors[site.b], self.tensors[site.a]) for site in state.sites})


def hash_of_start(folder: str) -> str:
    """SHA-256 of an adapter's weights.

    Raises:
        UserError: names `lora.start`; there is no such folder or file, or it cannot be read.
    """
    return hashlib.sha256(_weights_in(folder)).hexdigest()


def read_start(config: ExperimentConfig, model: AdaptedModel, label_names: list[str], merges: bool) -> Start:
    """Read the adapter `lora.start`.

    It must adapt the same linear maps of the same base model at the same scale `γ` and, unless it is merged, at the
    same rank. A head is taken if it has this run's shape and, where the folder names its labels, the same labels.

    Args:
        label_names: names of the labels, in order; empty for tasks without labels.
        merges: the method merges into the frozen weights, so any rank will do.

    Raises:
        UserError: names `lora.start`, the first problem and the remedy.
    """
    folder = str(config.lora.start)
    content = _weights_in(folder)
    path = Path(folder).expanduser()
    described = _read_json(folder, path / ADAPTER_CONFIG)
    provenance = _read_json(folder, path / DESCRIPTION) if (path / DESCRIPTION).is_file() else {}
    _check_kind(folder, described)
    _check_base(folder, described, provenance, config.model.base)
    saved = _read_weights(folder, content)
    tensors = _factors(folder, saved, model.sites)
    scales = _scales(folder, described, tensors, model.sites)
    if not merges:
        _check_ranks(config.lora, scales, tensors, model.sites)
    _check_scales(config.lora, scales, model.sites)
    same_labels = provenance.get("label_names") in (None, label_names)
    tensors |= _other_modules(folder, saved, model, same_labels)
    parts = path.resolve().parts
    name = "/".join(parts[-2:] if parts[-1] == "adapter" else parts[-1:])
    return Start(name, hashlib.sha256(content).hexdigest(), tensors)


def _refuse(folder: str, problem: str, remedy: str) -> NoReturn:
    raise UserError("lora.start", folder, problem, remedy)


def _weights_in(folder: str) -> bytes:
    path = user_path("lora.start", folder)
    if not path.is_dir():
        _refuse(folder, "no such folder", _COPY)
    own = sorted(found.parent.name for found in path.glob(f"client-*/{WEIGHTS}"))
    if own:
        _refuse(folder, "it contains one adapter per client", f"give one of them, such as {path / own[0]}")
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        remedy = "save it again as safetensors: model.save_pretrained(FOLDER)" if pickled else _COPY
        _refuse(folder, f"it has no {WEIGHTS}", remedy)
    try:
        return (path / WEIGHTS).read_bytes()
    except OSError as error:
        _refuse(folder, f"{WEIGHTS} cannot be read ({error.strerror})", "check the permissions of the file")


def _read_json(folder: str, path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("it is too large")
        return read_json(path)
    except FileNotFoundError:
        _refuse(folder, f"it has no {path.name}", _COPY)
    except (OSError, ValueError) as error:
        _refuse(folder, f"{path.name} is damaged ({type(error).__name__})", "get another copy of the adapter")


def _read_weights(folder: str, content: bytes) -> dict[str, Tensor]:
    try:
        saved: dict[str, Tensor] = safetensors.torch.load(content)
    except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        _refuse(folder, f"{WEIGHTS} is damaged ({type(error).__name__})", "get another copy of the adapter")
    for name, value in saved.items():
        if not value.is_floating_point():
            _refuse(folder, f"{name!r:.200} is {value.dtype}", "give an adapter in fp32, fp16 or bf16")
        saved[name] = value.float()
        if not bool(torch.isfinite(saved[name]).all()):
            _refuse(folder, f"{name!r:.200} is not finite", "give an adapter whose training has not diverged")
    return saved


def _check_kind(folder: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        _refuse(folder, f"it is an adapter of type {config.get('peft_type')!r:.100}", "give a LoRA adapter")
    initialisation = config.get("init_lora_weights", True)
    if not any(initialisation is plain or initialisation == plain for plain in _PLAIN_INITIALISATIONS):
        problem = f"its initialisation {initialisation!r:.100} may have changed the base weights"
        _refuse(folder, problem, "convert it with PEFT's path_initial_model_for_weight_conversion")
    further = [key for key, value in config.items() if key not in _HARMLESS and value]
    if config.get("bias", "none") != "none":
        further.append("bias")
    if further:
        _refuse(folder, f"it uses {min(further)!r:.100}, which Lorica does not train", "give a plain LoRA adapter")


def _check_base(folder: str, config: Mapping[str, Any], provenance: Mapping[str, Any], base: str) -> None:
    own, theirs = base_identity(base), provenance.get("base")
    if isinstance(theirs, str) and own.startswith("sha256:") and theirs.startswith("sha256:"):
        if theirs != own:
            problem = f"it was trained on the base model {theirs:.100}, but model.base is {own}"
            _refuse(folder, problem, "set model.base to the model that the adapter was trained on")
        return
    name, names = config.get("base_model_name_or_path"), {Path(base).name, Path(resolve_base(base)).name}
    if not isinstance(name, str) or Path(name).name not in names:
        remedy = f"set model.base to that model; if it is the same, write its name into {ADAPTER_CONFIG}"
        _refuse(folder, f"its base model is {name!r:.200}, but model.base is {base}", remedy)


def _factors(folder: str, saved: Mapping[str, Tensor], sites: list[Site]) -> dict[str, Tensor]:
    """The factors by their names in a run; their shapes fit each other and the linear maps."""
    found = {site.name: (_key(site, "A"), _key(site, "B")) for site in sites}
    expected = {key for keys in found.values() for key in keys}
    adapted = {name for name in saved if ".lora_" in name}
    if adapted != expected:
        paths = [name.removeprefix(PREFIX).split(".lora_")[0] for name in adapted]
        endings = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths}))
        odd = min(adapted ^ expected).removeprefix(PREFIX)
        problem = f"it and this run adapt different linear maps, or in a different way ({odd!r:.200} is not in both)"
        _refuse(folder, problem, f"set lora.target_modules to the modules that it adapts ({endings:.500})")
    tensors: dict[str, Tensor] = {}
    for site in sites:
        a, b = (saved[key] for key in found[site.name])
        fits = a.dim() == b.dim() == 2 and (a.shape[1], b.shape[0]) == (site.d_in, site.d_out)
        if not fits or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            problem = f"its factors of {site.name} have shapes {tuple(b.shape)} and {tuple(a.shape)}"
            remedy = "set model.base to the model that the adapter was trained on"
            _refuse(folder, f"{problem}, but the linear map is {site.d_out} x {site.d_in}", remedy)
        tensors |= {site.a: a, site.b: b}
    return tensors


def _scales(folder: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: list[Site]) -> list[float]:
    """PEFT's `γ = lora_alpha / r`, or `lora_alpha / √r`, at each linear map."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    try:
        alphas = [
            float(patterns.get(get_pattern_key(list(patterns), site.name), config.get("lora_alpha", 8)))
            for site in sites
        ]
    except Exception:
        _refuse(folder, f"the scales in {ADAPTER_CONFIG} cannot be read", "get another copy of the adapter")
    ranks = [tensors[site.a].shape[0] for site in sites]
    return [
        alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        for alpha, rank in zip(alphas, ranks, strict=True)
    ]


def _check_ranks(lora: LoraSection, scales: list[float], tensors: Mapping[str, Tensor], sites: list[Site]) -> None:
    ranks = [tensors[site.a].shape[0] for site in sites]
    for site, rank, scale in zip(sites, ranks, scales, strict=True):
        if rank != site.rank:
            problem = f"its rank at {site.name} is {rank}, but lora.r is {site.rank}"
            remedy = f"set lora.r={rank} and lora.lora_alpha={_alpha(lora, scale, rank):g}"
            if len(set(ranks)) > 1:
                problem, remedy = f"{problem}, and its ranks differ", "choose a method that merges, such as flora"
            _refuse(str(lora.start), problem, remedy)


def _check_scales(lora: LoraSection, scales: list[float], sites: list[Site]) -> None:
    for site, scale in zip(sites, scales, strict=True):
        if not math.isclose(scale, site.scale, rel_tol=1e-6):
            problem = f"its scale at {site.name} is {scale:g}, but lora_alpha and r give {site.scale:g}"
            _refuse(str(lora.start), problem, f"set lora.lora_alpha={_alpha(lora, scale, site.rank):g}")


def _alpha(lora: LoraSection, scale: float, rank: int) -> float:
    """`lora.lora_alpha` that gives a scale at a rank."""
    return scale * (math.sqrt(rank) if lora.use_rslora else rank)


def _other_modules(
    folder: str, saved: Mapping[str, Tensor], model: AdaptedModel, same_labels: bool
) -> dict[str, Tensor]:
    """The head and other modules that the adapter contains, by their names in a run."""
    own = model.read()
    trained = {f"{model.head_path}.{part}": f"head.{part}" for part in ("weight", "bias")}
    head_names = {*trained.values(), *(f"{FIXED}{path}" for path in trained)}
    taken = {}
    for key, value in saved.items():
        if ".lora_" in key:
            continue
        path = key.removeprefix(PREFIX)
        name = next((name for name in (trained.get(path, ""), f"{FIXED}{path}") if name in own), None)
        if name is None and _is_of_the_base(model, path, value):
            # PEFT's types of tasks have adapters contain the head, trained or not.
            continue
        if name is None:
            problem = f"it contains {path!r:.200}, which is part of the base model here"
            _refuse(folder, problem, "if that is the head, set model.head=train; otherwise remove it from the adapter")
        if name not in head_names and value.shape != own[name].shape:
            problem = f"its {path} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}"
            _refuse(folder, problem, "set model.base to the model that the adapter was trained on")
        taken[name] = value
    in_file = taken.keys() & head_names
    if in_file and not (same_labels and all(taken[name].shape == own[name].shape for name in in_file)):
        logger.warning("the head of the adapter in lora.start has other labels, so this run starts with a new head")
        return {name: value for name, value in taken.items() if name not in in_file}
    return taken


def _is_of_the_base(model: AdaptedModel, path: str, value: Tensor) -> bool:
    own = model.peft_model.base_model.model.state_dict().get(path)
    return own is not None and own.shape == value.shape and torch.equal(own.cpu().float(), value)


def _key(site: Site, factor: str) -> str:
    return f"{PREFIX}{site.name}.lora_{factor}.weight"
