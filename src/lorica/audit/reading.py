"""From what left an owner back to its noisy gradients: public maps of a reply are inverted.

What an owner does to a noisy gradient after the noise is public: a step of SGD, a filter, a preconditioner, a sketch.
Undone, a reply gives coordinates of the noisy gradient `ĝ = (Σ_i clip(g_i) + noise)/b` in an orthonormal basis, where
the noise has the promised standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lorica.adapters.names import SKETCH, factor_a, factor_b, is_a, is_factor, other_factor
from lorica.adapters.state import leading
from lorica.audit.linear_model import Gradients
from lorica.audit.watching import Seen, Summed
from lorica.local.sketches import sketch_matrix
from lorica.local.smoothing import NOISE_ENERGY, smooth
from lorica.local.step import LocalStep
from lorica.messages import Training
from lorica.privacy.clipping import ROUNDING_MARGIN

# Directions that a filter nearly removes say nothing: undoing it there would only magnify rounding errors.
LEAST_SINGULAR_VALUE = 0.05


class Unreadable(Exception):
    """A reply is a function of the noisy gradients that cannot be undone here; the message says why."""


@dataclass(frozen=True)
class Reading:
    """A release in coordinates of the noisy gradient.

    Attributes:
        values: tensor -> (d,), the sum of its noisy gradients over its steps.
        shares: tensor -> (steps · n, d), what each canary adds in each step if it is in the batch.
        deviations: tensor -> promised standard deviation of the noise in `values`.
        steps: number of steps.
    """

    values: Mapping[str, np.ndarray]
    shares: Mapping[str, np.ndarray]
    deviations: Mapping[str, float]
    steps: int

    def whitened(self) -> tuple[np.ndarray, np.ndarray]:
        """All values, (d,), and shares, (steps · n, d), over the standard deviation of the noise."""
        names = list(self.values)
        values = np.concatenate([self.values[name] / self.deviations[name] for name in names])
        return values, np.concatenate([self.shares[name] / self.deviations[name] for name in names], axis=1)

    def noise(self, batches: np.ndarray) -> dict[str, np.ndarray]:
        """Tensor -> (d,), the noise over its promised standard deviation.

        Args:
            batches: (steps · n,), which canaries were in the batch of each step.
        """
        return {
            name: (value - batches.astype(np.float64) @ self.shares[name]) / self.deviations[name]
            for name, value in self.values.items()
        }


def read(seen: Seen, gradients: Gradients, seed: int) -> Reading:
    """Read an owner's reply to a request for training.

    Args:
        gradients: of the owner's canaries.
        seed: the public seed, for sketches.

    Raises:
        Unreadable: more happens to the noisy gradient than can be undone.
    """
    work = seen.request.work
    assert isinstance(work, Training)
    start = {name: leading(name, value, work.rank) for name, value in seen.start.items()}
    parts = {name: work.part(name, value) for name, value in start.items()}
    updates = updates_of(seen, work, start, seed)
    _check_readable(work)
    terms, trained = work.terms, work.trained
    active = [work.local.active(trained, step) for step in range(work.steps)]
    counts = {name: sum(name in names for names in active) for name in updates}
    values = {name: unshaped(name, -update / work.rates[name], parts, work.local) for name, update in updates.items()}
    shares: dict[str, list[np.ndarray]] = {name: [] for name in updates}
    state = start
    for step, names in enumerate(active):
        trained_parts = {name: work.part(name, value) for name, value in gradients.at(state, names).items()}
        added = clipped(trained_parts, terms.clip_norm)
        for name in updates:
            rest = torch.zeros(len(gradients.positions), *parts[name].shape, dtype=torch.float64)
            own = added.get(name, rest) / terms.batch_size
            shares[name].append(kept_coordinates(name, own, work.local).flatten(1).numpy())
        moved = {
            name: work.whole(name, start[name], parts[name] + updates[name].to(parts[name]))
            for name in names
            if name in updates
        }
        if step + 1 < work.steps and any(is_factor(name) and counts.get(name) != 1 for name in names):
            raise Unreadable("after several steps on the same factor, the state in between is not known")
        state = state | moved
    return Reading(
        {name: value.flatten().numpy() for name, value in values.items()},
        {name: np.concatenate(parts) for name, parts in shares.items()},
        {name: terms.noise_std * math.sqrt(counts[name]) for name in updates},
        work.steps,
    )


def read_sum(summed: Summed, members: Mapping[int, tuple[Seen, Gradients]], noise_std: Mapping[int, float]) -> Reading:
    """Read a secure sum of one step of SGD of each member, `Σ_k w_k U_k`. The shares are those of all members in turn.

    Args:
        members: client -> its reply before it was masked, for the work that it was asked to do, and its canaries.
        noise_std: client -> standard deviation of its own noise.
    """
    readings = {client: read(seen, gradients, 0) for client, (seen, gradients) in members.items()}
    weights, work = summed.members, next(iter(members.values()))[0].request.work
    assert isinstance(work, Training)
    deviation = math.sqrt(sum((weights[client] * noise_std[client]) ** 2 for client in members))
    return Reading(
        {name: (-value.double() / work.rates[name]).flatten().numpy() for name, value in summed.tensors.items()},
        {
            name: np.concatenate([weights[client] * readings[client].shares[name] for client in members])
            for name in summed.tensors
        },
        dict.fromkeys(summed.tensors, deviation),
        1,
    )


def with_factors(seen: Seen) -> Seen:
    """A reply with updates of factors in place of sketches that do not determine them.

    The noisy factors stay with the owner, and the sketches are functions of them. So this reads more than a server
    could, and what it bounds holds for the sketches too.
    """
    if not any(is_a(name) for name in seen.sketched):
        return seen
    updates = {name: value.double() - seen.start[name] for name, value in seen.sketched.items()}
    rest = {name: value for name, value in seen.tensors.items() if not name.startswith(SKETCH)}
    return replace(seen, tensors=rest | updates)


def factor_updates(
    tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], trained: tuple[str, ...], seed: int, round_number: int
) -> dict[str, Tensor]:
    """The update of B behind each sketch: from `Y = B (A Ω)` with a public A, `B - B₀ = (Y - B₀ A Ω)(A Ω)⁺`, fp64.

    Raises:
        Unreadable: A was trained too, or the sketch has fewer columns than the rank.
    """
    found = {}
    for name, value in tensors.items():
        site = name.removeprefix(SKETCH)
        a, b = start[factor_a(site)].double(), start[factor_b(site)].double()
        if factor_a(site) in trained or value.shape[1] < a.shape[0]:
            raise Unreadable("a sketch does not determine the factors behind it")
        wide = a @ sketch_matrix(seed, round_number, site, a.shape[1], value.shape[1]).double()
        found[factor_b(site)] = (value.double() - b @ wide) @ torch.linalg.pinv(wide)
    return found


def updates_of(seen: Seen, work: Training, start: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The update of the trained part of each tensor that left the owner, fp64.

    Raises:
        Unreadable: a sketch does not determine the factors behind it.
    """
    sketches = {name: value for name, value in seen.tensors.items() if name.startswith(SKETCH)}
    plain = {name: value.double() for name, value in seen.tensors.items() if name in work.trained}
    if sketches:
        plain |= factor_updates(sketches, start, work.trained, seed, seen.request.round)
    return plain


def _check_readable(work: Training) -> None:
    sgd = work.optimizer.name == "sgd" and not work.optimizer.momentum and not work.optimizer.weight_decay
    local = work.local
    plain = LocalStep(alternate=local.alternate, smoothing=local.smoothing, kept=local.kept, damping=local.damping)
    if not sgd or work.corrections or local != plain or (local.damping is not None and work.steps > 1):
        raise Unreadable("its local steps do more to the noisy gradient than this audit can undo")


def clipped(gradients: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Each canary's gradients, name -> (n, *shape), clipped by their joint norm, one formula apart from the owner's."""
    squares = torch.stack([value.flatten(1).square().sum(dim=1) for value in gradients.values()])
    scale = (clip_norm * (1 - ROUNDING_MARGIN) / squares.sum(dim=0).sqrt()).clamp(max=1.0)
    return {name: value * scale.reshape(-1, *[1] * (value.dim() - 1)) for name, value in gradients.items()}


def unshaped(name: str, step: Tensor, start: Mapping[str, Tensor], local: LocalStep) -> Tensor:
    """The noisy gradient behind a step over minus the learning rate, in the coordinates that a filter keeps."""
    if not is_factor(name):
        return step
    if local.damping is not None:
        other = start[other_factor(name)].double()
        gram = other.T @ other if is_a(name) else other @ other.T
        damped = gram + local.damping * torch.eye(len(gram), dtype=gram.dtype)
        step = damped @ step if is_a(name) else step @ damped
    if local.smoothing == "gaussian":
        _, after, values = _filter(step.shape[1 if is_a(name) else 0])
        return (step @ after if is_a(name) else step.T @ after) / values
    return step / NOISE_ENERGY**0.5 if local.smoothing == "rescale" else step


def kept_coordinates(name: str, gradients: Tensor, local: LocalStep) -> Tensor:
    """Gradients, (n, *shape), in the coordinates that `unshaped` gives."""
    if local.smoothing != "gaussian" or not is_factor(name):
        return gradients
    before, _, _ = _filter(gradients.shape[2 if is_a(name) else 1])
    return (gradients if is_a(name) else gradients.transpose(1, 2)).double() @ before


@lru_cache(maxsize=8)
def _filter(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The filter on vectors of this length as `x ↦ x P diag(λ) Qᵀ`, without its small singular values: P, Q and λ."""
    matrix = smooth(torch.eye(length, dtype=torch.float64), axis=1)
    p, values, qt = torch.linalg.svd(matrix)
    kept = values > LEAST_SINGULAR_VALUE
    return p[:, kept], qt.T[:, kept], values[kept]
