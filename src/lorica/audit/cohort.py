"""Client-level DP in an audit of the mechanism: each canary is a client, and what leaves is the noisy mean of a sample.

A client has one record, and its update is one step of SGD without noise. The update of a client that is left out is
zero. So everything that a client can add to a release, once or to two products of matrices, is known in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lorica.adapters.names import SKETCH, factor_a, is_b, is_factor, site_of
from lorica.audit.linear_model import Gradients
from lorica.audit.reading import Reading, clipped
from lorica.audit.watching import Seen, WatchedClient
from lorica.config import OptimizerConfig
from lorica.local.optimizers import learning_rates
from lorica.local.sketches import orthonormal_sketch_matrix
from lorica.messages import Projection, Training
from lorica.owner.cohort import Cohort
from lorica.privacy.unit import CLIENT
from lorica.tasks.records import Records

CLIENT_OPTIMIZER = OptimizerConfig(lr=0.5)


@dataclass
class WatchedCohort(WatchedClient, Cohort):
    """A cohort that keeps what leaves it."""


def watched_cohort(records: Records, **of_an_owner: Any) -> WatchedCohort:
    """A cohort with a client for each record."""
    members = [records.subset(np.array([index])) for index in range(len(records))]
    return WatchedCohort(records=records, members=members, unit=CLIENT, optimizer=CLIENT_OPTIMIZER, **of_an_owner)


def read_mean(seen: Seen, gradients: Gradients, cohort: WatchedCohort) -> Reading:
    """Read a mean of updates, or of sketches or projections of changes of the product.

    Args:
        gradients: of the clients' records.
    """
    work, held, terms = seen.request.work, seen.held, cohort.plan.terms
    # A projection is of the same training as the request before it, and a method that asks for one trains the same
    # tensors in each round.
    training = work if isinstance(work, Training) else cohort.asked
    assert training is not None
    trained = training.trained
    rates = learning_rates(CLIENT_OPTIMIZER, list(trained))
    updates = {name: -rates[name] * value for name, value in gradients.at(held, list(trained)).items()}
    values = {name: value.double() for name, value in seen.tensors.items()}
    if isinstance(work, Training) and work.sketch_columns is None:
        added = clipped(updates, terms.clip_norm)
    else:
        changes = {name: value for name, value in updates.items() if not is_factor(name)}
        products = {}
        for name in filter(is_b, updates):
            site = site_of(name)
            b, a = held[name].double(), held[factor_a(site)].double()
            products[site] = b @ a
            changes[site] = (b + updates[name]) @ (a + updates[factor_a(site)]) - products[site]
        added = clipped(changes, terms.clip_norm)
        for site, product in products.items():
            known = _public_matrix(seen, site, product.shape[1], cohort.seed)
            if isinstance(work, Projection):
                values[f"{SKETCH}{site}"] -= product.T @ known
                added[f"{SKETCH}{site}"] = added.pop(site).transpose(1, 2) @ known
            else:
                values[f"{SKETCH}{site}"] -= product @ known
                added[f"{SKETCH}{site}"] = added.pop(site) @ known
    return Reading(
        {name: value.flatten().numpy() for name, value in values.items()},
        {name: (added[name] / terms.batch_size).flatten(1).numpy() for name in values},
        dict.fromkeys(values, terms.noise_std),
        1,
    )


def _public_matrix(seen: Seen, site: str, width: int, seed: int) -> Tensor:
    """The orthonormal matrix with which the product of a site is multiplied, fp64."""
    work = seen.request.work
    if isinstance(work, Projection):
        return work.bases[site].double()
    assert isinstance(work, Training)
    assert work.sketch_columns is not None
    return orthonormal_sketch_matrix(seed, seen.request.round, site, width, work.sketch_columns).double()
