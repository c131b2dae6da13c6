"""A frozen base model with LoRA factors, and its trainable tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorica.adapters.base_model import BaseModel
from lorica.adapters.names import FIXED, Pair, factor_b, is_a, is_b, is_factor, is_middle, middle, site_of
from lorica.adapters.perturbation import weight_noise
from lorica.adapters.shared_rows import separate_examples
from lorica.adapters.sites import Site, layer_of
from lorica.adapters.targets import match_targets
from lorica.config import LoraSection, ModelConfig
from lorica.errors import UserError
from lorica.privacy.gradients import TrainedTensor
from lorica.streams import stream_seed
from lorica.tasks.classification import Classification
from lorica.tasks.records import Batch, Objective

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

CROSS_ENTROPY = Classification()
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"


class AdaptedModel:
    """The base model, its adapter (through PEFT), and its trainable tensors by name.

    `tensors` maps `SITE.A`, `SITE.B`, `head.weight` and `head.bias` to linear maps. All parameters stay frozen for
    autograd: an explicit list says what a step trains, never `requires_grad`.

    Attributes:
        peft_model: the PEFT model, in evaluation mode between rounds.
        sites: the adapted linear maps, in the model's order.
        head_path: path of the head's last linear map in the base model.
        objective: the training objective.
        tensors: name -> location in the model. Contains the head only if it is trained.
        fixed: name -> module and parameter that are part of the adapter but not trained; empty unless the run starts
            from an adapter, whose values then have to reach all clients.
        device: the device of the model.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        sites: list[Site],
        head_path: str,
        head: nn.Linear | None,
        objective: Objective,
        device: torch.device,
    ) -> None:
        self.peft_model = peft_model
        self.objective = objective
        self.sites = sites
        self.head_path = head_path
        self.device = device
        self.tensors: dict[str, TrainedTensor] = {}
        self.fixed: dict[str, tuple[nn.Module, str]] = {}
        self._frozen: dict[str, Tensor] = {}
        self._merged: dict[str, Pair] = {}
        for site in sites:
            layer = peft_model.base_model.model.get_submodule(site.name)
            self.tensors[site.a] = TrainedTensor(layer.lora_A["default"], "weight")
            self.tensors[site.b] = TrainedTensor(layer.lora_B["default"], "weight")
        if head is not None:
            self.tensors[HEAD_WEIGHT] = TrainedTensor(head, "weight")
            if head.bias is not None:
                self.tensors[HEAD_BIAS] = TrainedTensor(head, "bias")

    def read(self) -> dict[str, Tensor]:
        """A copy of all trainable and fixed tensors, fp32, on the CPU."""
        return {name: self._parameter(name).detach().cpu().clone() for name in [*self.tensors, *self.fixed]}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Set trainable and fixed tensors in place; the model is never rebuilt.

        Factors of a smaller rank fill the leading ranks; the other ranks are set to zero. `SITE.R` is given together
        with `SITE.B`, and their product replaces B: `W = W0 + γ (B R) A`.

        Raises:
            KeyError: a name that is not among these tensors.
        """
        with torch.no_grad():
            for name, value in tensors.items():
                if is_middle(name):
                    continue
                between = tensors.get(middle(site_of(name))) if is_b(name) else None
                filled = value if between is None else value @ between
                parameter = self._parameter(name)
                if filled.shape != parameter.shape:
                    parameter.zero_()
                    parameter = parameter[tuple(slice(size) for size in filled.shape)]
                parameter.copy_(filled)

    def merge(self, merged: Mapping[str, Pair]) -> None:
        """Set the frozen weight of each site to `W0 + γ B A`, or to `W0` if `merged` has no entry for it.

        The sum is computed in fp32 from the original weight, so the result depends on `merged` only.
        """
        for site in self.sites:
            if not _same_pair(self._merged.get(site.name), merged.get(site.name)):
                self._set_frozen(site, merged.get(site.name))

    def frozen_weight(self, site: Site) -> Tensor:
        """The weight of a site without its factors and without what was merged, `(d_out, d_in)`, fp32, on the CPU."""
        layer = self._layer(site)
        weight = self._frozen.get(site.name, _writable_weight(layer)).detach().float().cpu()
        return weight.T if _is_transposed(layer) else weight

    def trained(self, name: str, ranks: Sequence[int] | None, tensors: Mapping[str, Tensor]) -> TrainedTensor:
        """The location of a tensor to train, and the view of its gradient that is trained.

        Args:
            ranks: the ranks to which the gradient of a factor is cut; None for all.
            tensors: the adapter, with the fixed factor `SITE.B` for the gradient of `SITE.R`:
                `∂L/∂R = Bᵀ ∂L/∂(B R)`.
        """
        if is_middle(name):
            factor = factor_b(site_of(name))
            basis = tensors[factor].to(self.device)
            return self.tensors[factor]._replace(view=lambda gradient: basis.T @ gradient)
        if ranks is None or not is_factor(name):
            return self.tensors[name]
        axis, kept = 1 if is_a(name) else 2, torch.tensor(ranks, device=self.device)
        return self.tensors[name]._replace(view=lambda gradient: gradient.index_select(axis, kept))

    @contextmanager
    def perturbed(self, ratio: float, generator: torch.Generator) -> Iterator[None]:
        """Add noise to the frozen weight of each site within the context (`lorica.adapters.perturbation`)."""
        before = {}
        try:
            with torch.no_grad():
                for site in self.sites:
                    layer = self._layer(site)
                    weight = _writable_weight(layer)
                    before[site.name] = weight.clone()
                    weight.add_(weight_noise(self._adapted_weight(site), ratio, generator, _is_transposed(layer)))
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    self.peft_model.base_model.model.get_submodule(name).get_base_layer().weight.copy_(weight)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per example, `(n,)`."""
        return self.objective.losses(model(**batch.inputs), batch)

    def assert_frozen(self) -> None:
        """Raise RuntimeError if a parameter would receive a batch gradient from autograd.

        PEFT's `set_adapter` and `disable_adapter` silently unfreeze all factors.
        """
        unfrozen = [name for name, parameter in self.peft_model.named_parameters() if parameter.requires_grad]
        if unfrozen:
            raise RuntimeError(f"parameters must stay frozen, but these require gradients: {', '.join(unfrozen[:3])}")

    def _layer(self, site: Site) -> LoraLayer:
        from peft.tuners.lora import LoraLayer

        layer = self.peft_model.base_model.model.get_submodule(site.name)
        assert isinstance(layer, LoraLayer)
        return layer

    def _set_frozen(self, site: Site, pair: Pair | None) -> None:
        layer = self._layer(site)
        weight = _writable_weight(layer)
        if site.name not in self._frozen:
            self._frozen[site.name] = weight.detach().float().clone()
        original = self._frozen[site.name]
        if pair is None:
            self._merged.pop(site.name, None)
            value = original
        else:
            self._merged[site.name] = pair
            increment = site.scale * (pair[0].to(self.device) @ pair[1].to(self.device))
            # GPT-2 stores its weights transposed.
            value = original + (increment.T if _is_transposed(layer) else increment)
        with torch.no_grad():
            weight.copy_(value)

    def _adapted_weight(self, site: Site) -> Tensor:
        """`(d_out, d_in)`, fp32: the frozen weight plus the scaled product of the factors."""
        layer = self._layer(site)
        weight: Tensor = layer.get_base_layer().weight.float()
        product = self._parameter(site.b) @ self._parameter(site.a)
        return (weight.T if _is_transposed(layer) else weight) + site.scale * product

    def _parameter(self, name: str) -> Tensor:
        module, kind = self.fixed[name] if name in self.fixed else self.tensors[name][:2]
        parameter = getattr(module, kind)
        assert isinstance(parameter, Tensor)
        return parameter


def adapt(
    base: BaseModel,
    lora: LoraSection,
    config: ModelConfig,
    seed: int,
    device: torch.device,
    objective: Objective = CROSS_ENTROPY,
) -> AdaptedModel:
    """Add LoRA factors to a base model: `A` random from the seed, `B` zero (PEFT's initialisation).

    The base is converted to `config.precision`; factors and head are always fp32.

    Raises:
        UserError: `lora.target_modules` matches nothing, the rank exceeds the size of a linear map, or the model does
            not support `model.gradient_checkpointing`.
    """
    # PEFT takes seconds to import, and nothing before this needs it.
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    targets = match_targets(base.model, lora.target_modules, base.head, base.new_modules, lora.layers_to_transform)
    # Modules that are not in the base checkpoint, such as a new head, are saved with the adapter.
    saved = [base.head, *base.new_modules] if config.head == "train" or base.head_is_new else base.new_modules
    exact = {name: copy.deepcopy(base.model.get_submodule(name).state_dict()) for name in saved}
    if config.precision == "bf16":
        base.model.to(torch.bfloat16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "factors"))
        settings = LoraConfig(
            target_modules=_shortest_names(targets, base.model),
            modules_to_save=saved or None,
            fan_in_fan_out=isinstance(base.model.get_submodule(targets[0]), Conv1D),
            **lora.model_dump(exclude={"target_modules", "layers_to_transform", "client_ranks", "start"}),
        )
        with warnings.catch_warnings():
            # PEFT 0.21 uses a property that transformers 5 has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            peft_model = get_peft_model(base.model, settings)
    if config.precision != "fp32":
        for name, state in exact.items():
            module = _saved_module(peft_model, name)
            module.float().load_state_dict(state)
            module.register_forward_pre_hook(_inputs_as_fp32)
        peft_model.register_forward_pre_hook(_floats_as_weights, with_kwargs=True)
    separate_examples(peft_model)
    if config.gradient_checkpointing:
        _checkpoint_layers(peft_model, config.base)
    peft_model.requires_grad_(False)
    sites = []
    for target in targets:
        layer = peft_model.base_model.model.get_submodule(target)
        assert isinstance(layer, LoraLayer)
        if lora.r > min(layer.in_features, layer.out_features):
            raise UserError(
                "lora.r",
                lora.r,
                f"larger than the linear map {target} ({layer.out_features} x {layer.in_features})",
                f"choose at most {min(layer.in_features, layer.out_features)}",
            )
        sites.append(
            Site(
                name=target,
                layer=layer_of(target),
                d_in=layer.in_features,
                d_out=layer.out_features,
                rank=lora.r,
                scale=float(layer.scaling["default"]),
            )
        )
    head = _saved_module(peft_model, base.head) if config.head == "train" else None
    assert head is None or isinstance(head, nn.Linear)
    model = AdaptedModel(peft_model.to(device).eval(), sites, base.head, head, objective, device)
    if lora.start is not None:
        for name in saved:
            module = _saved_module(peft_model, name)
            if module is not head:
                model.fixed |= _parameters(module, f"{FIXED}{name}.")
    return model


def _parameters(module: nn.Module, prefix: str) -> dict[str, tuple[nn.Module, str]]:
    """Prefix and path of each parameter -> the module that has it, and its name there."""
    found = {}
    for path, _ in module.named_parameters():
        parent, _, name = path.rpartition(".")
        found[f"{prefix}{path}"] = (module.get_submodule(parent), name)
    return found


def _checkpoint_layers(model: nn.Module, base: str) -> None:
    """Recompute each layer's activations in the backward pass.

    The recomputation triggers the forward hooks again, on copies that receive no gradient; the outputs of the first
    pass receive it. This holds for PyTorch's non-reentrant checkpoints only.
    """
    from transformers import PreTrainedModel

    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    try:
        with warnings.catch_warnings():
            # Renamed in transformers 5.23.
            warnings.simplefilter("ignore", FutureWarning)
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise UserError(
            "model.gradient_checkpointing",
            True,
            f"{type(inner).__name__} ({base}) does not support it",
            "set model.gradient_checkpointing=false",
        ) from None


def _is_transposed(layer: LoraLayer) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer.get_base_layer(), Conv1D)


def _writable_weight(layer: LoraLayer) -> Tensor:
    """The frozen weight, for changes in place; `UserError` if it is quantised."""
    weight: Tensor = layer.get_base_layer().weight
    if not weight.is_floating_point():
        raise UserError(
            "model.precision", "quantised", "this run changes the frozen weights", "set model.precision=bf16"
        )
    return weight


def _same_pair(first: Pair | None, second: Pair | None) -> bool:
    if first is None or second is None:
        return first is second
    return all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _saved_module(peft_model: PeftModel, name: str) -> nn.Module:
    module = peft_model.base_model.model.get_submodule(name).modules_to_save["default"]
    assert isinstance(module, nn.Module)
    return module


def _inputs_as_fp32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


def _floats_as_weights(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pixels as bf16, or as fp32 while `check_isolation` has the weights in fp32: not every family converts them."""
    dtype = next(value.dtype for value in module.parameters() if value.is_floating_point())
    return inputs, {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in named.items()
    }


def _shortest_names(targets: list[str], model: nn.Module) -> list[str]:
    """The last parts of the paths, such as `[q_proj, v_proj]`, if they select exactly `targets`; else full paths."""
    endings = sorted({target.rsplit(".", 1)[-1] for target in targets})
    named = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings]
    return endings if sorted(named) == sorted(targets) else targets
