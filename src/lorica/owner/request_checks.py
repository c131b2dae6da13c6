"""Check a request at the owner, apart from terms and budget: tensors that fit the model, and work that can be done.

Numbers used after the noise is added (learning rates, damping, SCAFFOLD's corrections) are not checked: they change
what is computed from noisy gradients, but not what the gradients reveal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.adapters.names import Pair, factor_a, factor_b, is_a, is_factor, is_middle, middle, site_of
from lorica.messages import Delivery, Projection, Request, Training

Shape = tuple[int, ...]
MAX_COUNT = 2**31
"""Bound on the counters: rounds, exchanges, requests, steps."""


def check_request(request: Request, model: Mapping[str, Shape]) -> str | None:
    """Why a request cannot be carried out; None if it can.

    Args:
        model: name -> shape of every tensor that can be trained, at full rank.
    """
    counts = {"round": request.round, "exchange": request.exchange, "sequence": request.sequence}
    for name, count in counts.items():
        if not 0 <= count < MAX_COUNT:
            return f"{name} = {count}"
    sites = _sites(model)
    wrong = _increments(request.increments, sites)
    if wrong is not None:
        return wrong
    if isinstance(request.work, Delivery):
        return _increments(request.work.merged, sites) or _tensors(request.work.model, model, None, whole=True)
    if isinstance(request.work, Projection):
        ranks = [len(value) for name, value in request.tensors.items() if is_a(name) and value.dim() == 2]
        rank = ranks[0] if ranks else None
        return _tensors(request.tensors, model, rank, request.sequence == 0) or _bases(request.work, sites)
    wrong = _training(request.work, model, sites)
    return wrong or _tensors(request.tensors, model, request.work.rank, request.sequence == 0)


def _training(work: Training, model: Mapping[str, Shape], sites: Mapping[str, Shape]) -> str | None:
    if not 1 <= work.steps < MAX_COUNT:
        return f"the number of steps is {work.steps}"
    rank = _rank(model)
    if work.rank is not None and not 1 <= work.rank <= rank:
        return f"rank {work.rank}, but the model has rank {rank}"
    known = model.keys() | {middle(site) for site in sites}
    unknown = [name for name in work.trained if name not in known]
    if unknown:
        return f"it trains {unknown[0]!r:.80}, which is not in this model"
    if len(set(work.trained)) < len(work.trained) or not all(map(work.local.active, [work.trained] * 2, range(2))):
        return "a step trains no tensor, or the same tensor twice"
    if work.rates.keys() != set(work.trained):
        return "its learning rates do not match the tensors that it trains"
    if not set(work.personal) <= set(work.trained):
        return "it keeps tensors at the client that it does not train"
    wrong = _slices(work, sites, rank)
    if wrong is not None:
        return wrong
    if work.personal and work.sketch_columns is not None:
        # A sketch of tensors kept from earlier rounds could be summed a second time, over other clients.
        return "it asks for sketches of tensors that it keeps at the client"
    if not work.corrections.keys() <= set(work.trained):
        return "it corrects tensors that it does not train"
    if work.sketch_columns is not None and not 1 <= work.sketch_columns <= _max_dim(sites):
        return f"sketches with {work.sketch_columns} columns"
    return _tensors(work.corrections, model, work.rank, whole=False)


def _slices(work: Training, sites: Mapping[str, Shape], rank: int) -> str | None:
    if not work.slices:
        return None
    if work.rank is not None or work.personal or work.sketch_columns is not None:
        return "it trains single ranks, and cuts the factors, sketches them or keeps factors at the client"
    if work.slices.keys() != {site_of(name) for name in work.trained if is_factor(name)}:
        return "the sites of the ranks that it trains are not those of the tensors that it trains"
    for site, ranks in work.slices.items():
        if site not in sites or not ranks or list(ranks) != sorted({each for each in ranks if 0 <= each < rank}):
            return f"it trains the ranks {ranks!r:.80} of {site!r:.80}, but the model has rank {rank}"
    return None


def _tensors(tensors: Mapping[str, Tensor], model: Mapping[str, Shape], rank: int | None, whole: bool) -> str | None:
    """Compare with the model's shapes, factors at `rank`. With `whole`, no tensor of the model may be missing."""
    missing = model.keys() - tensors.keys() if whole else set()
    if missing:
        return f"{min(missing)} is missing"
    for name, value in tensors.items():
        expected = _shape(name, model, rank)
        if expected is None:
            return f"{name!r:.80} is not a tensor of this model"
        if tuple(value.shape) != expected or value.dtype != torch.float32:
            return f"{name} is {value.dtype} of shape {tuple(value.shape)}, not torch.float32 of shape {expected}"
    return None


def _shape(name: str, model: Mapping[str, Shape], rank: int | None) -> Shape | None:
    if is_middle(name) and factor_a(site_of(name)) in model:
        return (_rank(model),) * 2
    shape = model.get(name)
    if shape is None or rank is None or not is_factor(name):
        return shape
    return (min(rank, shape[0]), shape[1]) if is_a(name) else (shape[0], min(rank, shape[1]))


def _increments(pairs: Mapping[str, Pair], sites: Mapping[str, Shape]) -> str | None:
    for site, (b, a) in pairs.items():
        if site not in sites:
            return f"it merges into {site!r:.80}, which is not in this model"
        d_out, d_in = sites[site]
        fits = b.dim() == a.dim() == 2 and (b.shape[0], a.shape[1]) == (d_out, d_in) and b.shape[1] == a.shape[0]
        if not fits or {b.dtype, a.dtype} != {torch.float32}:
            return f"it merges {tuple(b.shape)} x {tuple(a.shape)} into {site}, which is {d_out} x {d_in}"
    return None


def _bases(work: Projection, sites: Mapping[str, Shape]) -> str | None:
    for site, basis in work.bases.items():
        if site not in sites:
            return f"it projects {site!r:.80}, which is not in this model"
        fits = basis.dim() == 2 and basis.shape[0] == sites[site][0] and 1 <= basis.shape[1] <= _max_dim(sites)
        if not fits or basis.dtype != torch.float32:
            return f"its basis for {site} is {basis.dtype} of shape {tuple(basis.shape)}"
    return None


def _sites(model: Mapping[str, Shape]) -> dict[str, Shape]:
    """Site name -> `(d_out, d_in)`."""
    names = [site_of(name) for name in model if is_a(name)]
    return {name: (model[factor_b(name)][0], model[factor_a(name)][1]) for name in names}


def _rank(model: Mapping[str, Shape]) -> int:
    return next(shape[0] for name, shape in model.items() if is_a(name))


def _max_dim(sites: Mapping[str, Shape]) -> int:
    return max(max(shape) for shape in sites.values())
