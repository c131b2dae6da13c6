"""The server's side of shared noise (`lorica.privacy.shared_noise`): each member's part, and the terms of a sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lorica.errors import UserError
from lorica.messages import Request, Training
from lorica.privacy.mechanism import Terms
from lorica.privacy.plan import ClientPlan
from lorica.privacy.shared_noise import own_noise_std, summand_limits
from lorica.secure_sum.agreement import AgreedNoise
from lorica.secure_sum.setup import Setup


def shared_terms(plans: Mapping[int, ClientPlan], weights: Mapping[int, float]) -> dict[int, Terms]:
    """Client -> its terms, with as much noise as the records of all clients need.

    `R = max_k w_k τ_k`; client j's own noise has the multiplier `R b_j / (w_j C √(m - t))`.
    """
    noise_in_sum = max(weights[client] * plan.noise_std for client, plan in plans.items())
    terms = {}
    for client, plan in plans.items():
        shared = plan.shared
        assert shared is not None
        own = own_noise_std(noise_in_sum, weights[client], shared.min_clients, shared.colluding)
        multiplier = own * plan.terms.batch_size / plan.terms.clip_norm
        # Never below the plan, whatever the rounding.
        terms[client] = replace(plan.terms, noise_multiplier=max(multiplier, plan.terms.noise_multiplier))
    return terms


def agreed_noise(
    requests: Mapping[int, Request],
    plans: Mapping[int, ClientPlan],
    weights: Mapping[int, float],
    adapter: Mapping[str, Tensor],
) -> AgreedNoise:
    """The noise that the members of a sum agree on.

    `R` is the largest noise to which every member's part suffices, `min_k w_k s_k √(m - t)`.

    Args:
        weights: client -> its weight in this sum.
        adapter: all global tensors.
    """
    shared = plans[next(iter(requests))].shared
    assert shared is not None
    parts = []
    for client, request in requests.items():
        assert isinstance(request.work, Training)
        # The inverse of `own_noise_std`.
        part = own_noise_std(1.0, weights[client], shared.min_clients, shared.colluding)
        parts.append(request.work.terms.noise_std / part)
        work = request.work
    return AgreedNoise(min(parts), shared.min_clients, shared.colluding, work.common_digest(adapter))


def shared_setup(
    setup: Setup, requests: Mapping[int, Request], weights: Mapping[int, float], adapter: Mapping[str, Tensor]
) -> Setup:
    """The setup with a bound that no summand exceeds, and words long enough for the noise.

    Raises:
        UserError: not even words of 64 bits are long enough.
    """
    limits = []
    for client, request in requests.items():
        work = request.work
        assert isinstance(work, Training)
        limits.append(summand_limits(work.terms, weights[client], work.rates, work.optimizer.weight_decay, adapter))
    bound, grid = max(limit for limit, _ in limits), min(limit for _, limit in limits)
    for bits in (32, 64):
        setup = replace(setup, bits=bits, bound=bound)
        if setup.step <= grid:
            return setup
    raise UserError(
        "privacy.noise_against",
        "sums",
        f"even numbers of 64 bits are spaced by {setup.step:.3g} in the sum, but its noise needs {grid:.3g}",
        "make learning rates and client weights less unequal, or set privacy.noise_against=replies",
    )
