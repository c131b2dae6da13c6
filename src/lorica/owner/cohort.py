"""Client-level DP (`privacy.unit: client`): a trusted server and its simulated clients, seen from outside as one owner.

The records of an owner are clients here, a step is a round, and a gradient is a client's whole update. So plan, ledger
and statement are those of any owner, with the number of clients for that of records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.algebra import inner
from lorica.adapters.names import SKETCH, Pair, factor_a, factor_b, is_b, is_factor, site_of
from lorica.config import OptimizerConfig
from lorica.local.optimizers import learning_rates, schedule_factor
from lorica.local.sketches import orthonormal_sketch_matrix
from lorica.local.step import LocalStep
from lorica.messages import Projection, Request, Training
from lorica.owner.client import Client, SentAndKept
from lorica.privacy.ledger import Earlier
from lorica.privacy.mechanism import Terms, noisy_mean_update
from lorica.privacy.randomness import Randomness, SecureRandomness
from lorica.privacy.released import Released, post_process
from lorica.secure_sum.agreement import Agreement
from lorica.tasks.records import Records

Part = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass
class Cohort(Client):
    """All clients of a federation and the server that they trust; `records` are those of all clients together.

    A request for one step of rate 1 gets the released mean update: each client enters the sample with the probability
    `q`, trains without noise from the global adapter, and its whole update is clipped to norm C. Who takes part is as
    secret as the noise. A request for sketches, or for a projection, gets those of the mean product, from a sample of
    its own: of `B A + (1/K₀) Σ c_k (B_k A_k - B A)`, with noise on the sketch of the sum. Each request is a step, and a
    row of the ledger with the unit `client`.

    Attributes:
        members: records of each client.
        optimizer, steps, batch_size, local: how a client trains in a round. A client with fewer records than a batch
            uses all of them in each step.
    """

    members: list[Records] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1
    batch_size: int = 1
    local: LocalStep = field(default_factory=LocalStep)
    asked: Training | None = None

    def reply_to(self, model: AdaptedModel, request: Request, agreement: Agreement | None = None) -> bytes:
        # A projection is of the same training, for another sample.
        if isinstance(request.work, Training):
            self.asked = request.work
        return super().reply_to(model, request, agreement)

    def _steps_of(self, request: Request) -> int:
        return 1

    def _allow(self, earlier: Earlier, request: Request) -> None:
        assert self.asked is not None
        self.plan.check(self.asked.terms, earlier.steps(request.run, self.number) + 1)

    def _sketched(self, request: Request, kept: Mapping[str, Released]) -> dict[str, Released]:
        return {}

    def _train(
        self, model: AdaptedModel, request: Request, work: Training, own: Mapping[str, Released], seed: bytes | None
    ) -> SentAndKept:
        if work.sketch_columns is None:
            return self._mean(model, request, work, seed, lambda update: update), None
        matrices = {
            site.name: orthonormal_sketch_matrix(self.seed, request.round, site.name, site.d_in, work.sketch_columns)
            for site in model.sites
        }

        def sketched(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
            scale, changes = self._changes(update)
            found = {name: scale * value for name, value in update.items() if not is_factor(name)}
            for name, (b, a) in changes.items():
                found[f"{SKETCH}{name}"] = scale * (b @ (a @ matrices[name].double())).float()
            return found

        released = self._mean(model, request, work, seed, sketched)
        return released | self._with_products(released, lambda b, a, site: b @ (a @ matrices[site])), None

    def _project(
        self, model: AdaptedModel, request: Request, work: Projection, own: Mapping[str, Released], seed: bytes | None
    ) -> dict[str, Released]:
        assert self.asked is not None

        def projected(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
            scale, changes = self._changes(update)
            return {
                f"{SKETCH}{name}": scale * (a.T @ (b.T @ work.bases[name].double())).float()
                for name, (b, a) in changes.items()
            }

        released = self._mean(model, request, self.asked, seed, projected)
        return self._with_products(released, lambda b, a, site: a.T @ (b.T @ work.bases[site]))

    def _mean(
        self, model: AdaptedModel, request: Request, work: Training, seed: bytes | None, part: Part
    ) -> dict[str, Released]:
        """The noisy mean over a sample of clients of a part of each one's update."""
        randomness = self._reproducible(request) if seed is None else SecureRandomness(seed)
        adapter = {name: value.to(model.device) for name, value in self.held.items()}
        model.merge(self.merged)

        def update_of(number: int) -> Mapping[str, Tensor]:
            return part(self._update(model, request, work, adapter, self.members[number], randomness))

        shapes = {name: value.shape for name, value in part({n: 0 * self.held[n] for n in work.trained}).items()}
        return noisy_mean_update(update_of, len(self.members), shapes, work.terms, randomness)

    def _changes(self, update: Mapping[str, Tensor]) -> tuple[float, dict[str, Pair]]:
        """`c_k`, and site -> `B_k A_k - B A` as `[B_k, -B] [A_k; A]`, fp64.

        `c_k = min(1, C/n)`, with the norm n of all changes of products and of the head together.
        """
        pairs = {}
        for name in filter(is_b, update):
            site = site_of(name)
            b, a = (self.held[each].double() for each in (name, factor_a(site)))
            own_b, own_a = b + update[name].double(), a + update[factor_a(site)].double()
            pairs[site] = torch.cat([own_b, -b], dim=1), torch.cat([own_a, a])
        squares = sum(max(inner(pair, pair), 0.0) for pair in pairs.values())
        squares += sum(float(value.double().square().sum()) for name, value in update.items() if not is_factor(name))
        scale = min(1.0, self.plan.terms.clip_norm / math.sqrt(squares)) if squares else 1.0
        return scale, pairs

    def _with_products(
        self, released: Mapping[str, Released], function: Callable[[Tensor, Tensor, str], Tensor]
    ) -> dict[str, Released]:
        """The sketches of the new mean product: those of the public product, plus those of the mean change."""
        found = {}
        for name, change in released.items():
            if not name.startswith(SKETCH):
                continue
            site = name.removeprefix(SKETCH)
            public = function(self.held[factor_b(site)], self.held[factor_a(site)], site)
            found[f"{SKETCH}{site}"] = post_process(lambda value, public=public: value + public, change)
        return found

    def _update(
        self,
        model: AdaptedModel,
        request: Request,
        work: Training,
        adapter: dict[str, Tensor],
        records: Records,
        randomness: Randomness,
    ) -> dict[str, Tensor]:
        """One client's update, without noise: the server that it is sent to is trusted."""
        batch = min(self.batch_size, len(records))
        factor = schedule_factor(self.optimizer.schedule, request.round, work.rounds)
        rates = learning_rates(self.optimizer, list(work.trained))
        alone = replace(
            work,
            terms=Terms(batch / len(records), batch, math.inf, 0.0),
            steps=self.steps,
            optimizer=self.optimizer,
            rates={name: factor * rate for name, rate in rates.items()},
            local=self.local,
        )
        updates, _ = self._steps(model, request, alone, adapter, records, randomness)
        return {name: update.tensor.cpu() for name, update in updates.items()}
