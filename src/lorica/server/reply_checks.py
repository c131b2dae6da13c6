"""Check replies at the server: exactly the requested tensors, finite, and no larger than the steps allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorica.adapters.names import ENERGY, SKETCH, factor_a, factor_b, is_b, is_factor, site_of
from lorica.local.sketches import sketch_matrix
from lorica.messages import Projection, Request, Training
from lorica.server.reply_bounds import ROUNDING, active_steps, gradient_bound, norm, update_bounds


@dataclass(frozen=True)
class Expected:
    """Requirements on a reply.

    Attributes:
        shapes: name -> shape; the reply has exactly these names.
        norms: name -> largest L2 norm.
        coordinates: name -> largest absolute value of each coordinate, if a bound is known.
        rates, joint: `√(Σ_n ‖U_n‖²/rates_n²) ≤ joint` over the updates.
        kept: name -> largest L2 norm of a factor that the client keeps for a projection.
    """

    shapes: Mapping[str, tuple[int, ...]]
    norms: Mapping[str, float] = field(default_factory=dict)
    coordinates: Mapping[str, Tensor] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    joint: float = math.inf
    kept: Mapping[str, float] = field(default_factory=dict)


def check_reply(reply: Mapping[str, Tensor], expected: Expected) -> str | None:
    """The first problem with a reply, with the name of the tensor; None if it meets all requirements."""
    missing, extra = expected.shapes.keys() - reply.keys(), reply.keys() - expected.shapes.keys()
    if missing:
        return f"missing {_listed(missing)}"
    if extra:
        return f"unexpected {_listed(extra)}"
    for name, shape in expected.shapes.items():
        value = reply[name]
        if tuple(value.shape) != shape:
            return f"{name} has shape {tuple(value.shape)}, not {shape}"
        if value.dtype != torch.float32:
            return f"{name} is {value.dtype}, not torch.float32"
        if not bool(torch.isfinite(value).all()):
            return f"{name} is not finite"
        if name.startswith(ENERGY) and float(value) < 0:
            return f"{name} is negative"
    norms = {name: norm(reply[name]) for name in expected.shapes}
    for name, bound in expected.norms.items():
        if norms[name] > bound:
            return f"{name} has norm {norms[name]:.4g}, but its steps allow at most {bound:.4g}"
    for name, largest in expected.coordinates.items():
        if bool((reply[name].abs() > largest).any()):
            return f"{name} has coordinates that AdamW cannot reach in its steps"
    joint = math.sqrt(sum((norms[name] / rate) ** 2 for name, rate in expected.rates.items()))
    if joint > expected.joint:
        return f"the updates over their rates have norm {joint:.4g}, but the steps allow at most {expected.joint:.4g}"
    return None


def reply_shapes(request: Request, model: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in the reply to a request; empty if there is no reply.

    Args:
        model: all global tensors.
    """
    work = request.work
    if isinstance(work, Projection):
        return {
            f"{SKETCH}{site}": (model[factor_a(site)].shape[1], basis.shape[1]) for site, basis in work.bases.items()
        }
    if not isinstance(work, Training):
        return {}
    active = active_steps(work)
    sketched = [site_of(name) for name in active if is_b(name)] if work.sketch_columns is not None else []
    shapes = {name: tuple(work.part(name, model[name]).shape) for name in _sent(work, active)}
    shapes |= {f"{SKETCH}{site}": (model[factor_b(site)].shape[0], work.sketch_columns or 0) for site in sketched}
    return shapes | {f"{ENERGY}{name}": () for name in _with_energy(work, active)}


def expected_reply(
    request: Request, records: int, model: Mapping[str, Tensor], seed: int, earlier: Expected | None
) -> Expected:
    """Requirements that every honest reply to a request meets.

    Exactly the requested tensors, fp32 and finite; if gradients are clipped, also the bounds of
    `lorica.server.reply_bounds`. For sketches:
    `‖B_k A_k Ω‖ ≤ ‖B_0 A_0 Ω‖ + ‖U_B‖ ‖A_0 Ω‖₂ + ‖B_k‖ ‖U_A‖ ‖Ω‖₂` and `‖A_kᵀ B_kᵀ Q‖ ≤ ‖A_k‖ ‖B_k‖ ‖Q‖₂`.

    Args:
        records: `n` of the client, public.
        model: all global tensors.
        seed: public seed of the sketches.
        earlier: the requirements on the client's previous reply in this round, for a `Projection`.
    """
    if isinstance(request.work, Projection):
        return _projection(request.work, reply_shapes(request, model), model, earlier)
    assert isinstance(request.work, Training)
    shapes = reply_shapes(request, model)
    if math.isinf(request.work.terms.clip_norm):
        return Expected(shapes)
    return _training(request.work, shapes, records, model, seed, request.round)


def _sent(work: Training, active: Mapping[str, list[int]]) -> list[str]:
    """Names of the updates in a reply."""
    return [n for n in active if n not in work.personal and (work.sketch_columns is None or not is_factor(n))]


def _with_energy(work: Training, active: Mapping[str, list[int]]) -> list[str]:
    return [name for name, steps in active.items() if work.last_step_energy and steps[-1] == work.steps - 1]


def _training(
    work: Training,
    shapes: Mapping[str, tuple[int, ...]],
    records: int,
    model: Mapping[str, Tensor],
    seed: int,
    round_number: int,
) -> Expected:
    tensors = {name: work.part(name, value) for name, value in model.items()}
    active = active_steps(work)
    sent, sketched = _sent(work, active), [name.removeprefix(SKETCH) for name in shapes if name.startswith(SKETCH)]
    bounds = update_bounds(work, records, model)
    norms = {name: bounds.norms[name] for name in sent}
    for name in _with_energy(work, active):
        norms[f"{ENERGY}{name}"] = gradient_bound(work.terms, records, tensors[name].numel()) ** 2
    ends = {name: norm(tensors[name]) + bounds.norms[name] for name in active if is_factor(name)}
    for site in sketched:
        name_a, name_b = factor_a(site), factor_b(site)
        a, b = tensors[name_a], tensors[name_b]
        omega = sketch_matrix(seed, round_number, site, a.shape[1], work.sketch_columns or 0)
        bound = norm(b @ (a @ omega)) + bounds.norms[name_b] * _spectral_norm(a @ omega)
        if name_a in active:
            bound += ends[name_b] * bounds.norms[name_a] * _spectral_norm(omega)
        norms[f"{SKETCH}{site}"] = (1 + ROUNDING) * bound
    return Expected(
        shapes,
        norms,
        {name: value for name, value in bounds.coordinates.items() if name in sent},
        {name: work.rates[name] for name in sent},
        bounds.joint,
        ends if sketched else {},
    )


def _projection(
    work: Projection, shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, Tensor], earlier: Expected | None
) -> Expected:
    kept = {} if earlier is None else earlier.kept
    norms = {}
    for site, basis in work.bases.items():
        name_a, name_b = factor_a(site), factor_b(site)
        if name_b in kept:
            own_a = kept.get(name_a, _spectral_norm(model[name_a]))
            norms[f"{SKETCH}{site}"] = (1 + ROUNDING) * own_a * kept[name_b] * _spectral_norm(basis)
    return Expected(shapes, norms, kept=kept)


def _spectral_norm(value: Tensor) -> float:
    """The largest singular value, from the Gram matrix of the shorter side: these matrices are long and thin."""
    matrix = value.double()
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())


def _listed(names: Iterable[str]) -> str:
    """Up to three names, quoted and shortened, since names from a reply may contain anything."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(repr(name[:60]) for name in listed[:3]) + more
