"""Client-level DP (`privacy.unit: client`): a trusted server and its simulated clients, seen from outside as one owner.

The records of an owner are clients here, a step is a round, and a gradient is a client's whole update. So plan, ledger
and statement are those of any owner, with the number of clients for that of records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.config import OptimizerConfig
from lorica.local.optimizers import learning_rates, schedule_factor
from lorica.local.step import LocalStep
from lorica.messages import Request, Training
from lorica.owner.client import Client, SentAndKept
from lorica.privacy.mechanism import Terms, noisy_mean_update, poisson_sample
from lorica.privacy.randomness import Randomness, SecureRandomness
from lorica.privacy.released import Released
from lorica.tasks.records import Records


@dataclass
class Cohort(Client):
    """All clients of a federation and the server that they trust; `records` are those of all clients together.

    A request for one step of rate 1 gets the released mean update: each client enters the round with the probability
    `q`, trains without noise from the global adapter, and its whole update is clipped to norm C. Who takes part is as
    secret as the noise. The ledger has one row a round, with the unit `client`.

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

    def _train(
        self, model: AdaptedModel, request: Request, work: Training, own: Mapping[str, Released], seed: bytes | None
    ) -> SentAndKept:
        randomness = self._reproducible(request) if seed is None else SecureRandomness(seed)
        adapter = {name: value.to(model.device) for name, value in self.held.items()}
        model.merge(self.merged)
        sample = poisson_sample(len(self.members), work.terms.sampling_rate, randomness)
        updates = (
            self._update(model, request, work, adapter, self.members[number], randomness) for number in sample.tolist()
        )
        shapes = {name: adapter[name].shape for name in work.trained}
        return noisy_mean_update(updates, shapes, work.terms, randomness), None

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
        return {name: update.tensor for name, update in updates.items()}
