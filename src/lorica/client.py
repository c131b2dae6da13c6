"""One owner's side of a round: check the terms, train under them, charge the ledger, reply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.messages import Reply, Request
from lorica.optimizers import make_optimizer
from lorica.privacy.ledger import Ledger, Release
from lorica.privacy.mechanism import noisy_gradient
from lorica.privacy.plan import ClientPlan
from lorica.privacy.randomness import Randomness, ReproducibleRandomness, SecureRandomness
from lorica.privacy.released import Released, post_process
from lorica.streams import stream_seed
from lorica.tasks.records import Records


@dataclass
class Client:
    """An owner: its records, its plan, its ledger.

    Attributes:
        number: public id.
        records: private.
        plan: what it agreed to; a request that goes beyond it is refused.
        ledger: charged before a reply leaves.
        dataset: fingerprint of the data set that the records are part of.
        seed: public seed, for dropout masks and reproducible noise.
        held: the server's tensors as last received.
    """

    number: int
    records: Records
    plan: ClientPlan
    ledger: Ledger
    dataset: str
    seed: int
    micro_batch_tokens: int
    held: dict[str, Tensor] = field(default_factory=dict)

    def answer(self, model: AdaptedModel, request: Request) -> bytes:
        """Train as asked and return the encoded reply.

        The reply is charged to the ledger and stored before it is returned. A request that was answered before gets the
        stored reply: the same release, at no further cost.

        Raises:
            Refused: the request goes beyond the owner's plan.
        """
        self.held.update(request.tensors)
        digest = request.digest(self.held)
        stored = self.ledger.recall(request.run, self.number, digest)
        if stored is not None:
            return stored
        self.plan.check(request.terms, self.ledger.steps(request.run, self.number) + request.steps)
        reply = Reply(self.number, self._train(model, request)).encode()
        release = Release(
            dataset=self.dataset,
            owner=self.records.fingerprint(),
            run=request.run,
            client=self.number,
            round=request.round,
            sampling_rate=request.terms.sampling_rate,
            noise_multiplier=request.terms.noise_multiplier,
            clip_norm=request.terms.clip_norm,
            steps=request.steps,
            noise=self.plan.noise,
            request=digest,
        )
        self.ledger.charge(release, reply)
        return reply

    def _train(self, model: AdaptedModel, request: Request) -> dict[str, Released]:
        """`steps` noisy steps from the global adapter; returns each trained tensor's update `θ_E - θ_0`."""
        model.write(self.held)
        start = {name: self.held[name].to(model.device) for name in request.trained}
        trained = {name: model.tensors[name] for name in request.trained}
        optimizer = make_optimizer(request.optimizer, request.rates)
        randomness = self._randomness(request)
        updates: dict[str, Released] = {}
        gradients: dict[str, Released] = {}
        model.peft_model.train()
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(stream_seed(self.seed, "dropout", request.round, request.exchange, self.number))
            for _ in range(request.steps):
                model.assert_frozen()
                gradients = noisy_gradient(
                    model.peft_model,
                    model.losses,
                    trained,
                    self.records,
                    request.terms,
                    randomness,
                    self.micro_batch_tokens,
                )
                increments = optimizer.step(gradients, _moved(start, updates))
                for name, increment in increments.items():
                    updates[name] = post_process(torch.add, updates[name], increment) if name in updates else increment
                model.write(_moved(start, updates))
        model.peft_model.eval()
        if request.last_step_energy:
            energies = {f"energy:{name}": post_process(_energy, gradient) for name, gradient in gradients.items()}
            return updates | energies
        return updates

    def _randomness(self, request: Request) -> Randomness:
        if self.plan.noise == "reproducible":
            return ReproducibleRandomness(self.seed, request.round, request.exchange, self.number)
        return SecureRandomness()


def _moved(start: Mapping[str, Tensor], updates: Mapping[str, Released]) -> dict[str, Tensor]:
    return {name: value + updates[name].tensor if name in updates else value for name, value in start.items()}


def _energy(gradient: Tensor) -> Tensor:
    return gradient.square().sum()
