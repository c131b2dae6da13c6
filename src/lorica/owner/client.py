"""The owner's side of a round: check the terms, train, charge the ledger, reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.memory import pass_tokens
from lorica.adapters.names import ENERGY, SKETCH, Pair, is_factor
from lorica.adapters.state import leading, stack_pairs
from lorica.errors import UserError
from lorica.files import append_line, to_json
from lorica.local.optimizers import make_optimizer
from lorica.local.perturbation import strength
from lorica.local.sketches import project, sketch
from lorica.local.step import transform_gradients
from lorica.messages import Delivery, Projection, Reply, Request, Training
from lorica.owner.shared_noise import check_shared_noise
from lorica.privacy.exposures import Exposure
from lorica.privacy.ledger import Earlier, Ledger, Release
from lorica.privacy.mechanism import noisy_gradient
from lorica.privacy.plan import ClientPlan, Refused
from lorica.privacy.policy import Policy
from lorica.privacy.randomness import Randomness, ReproducibleRandomness, SecureRandomness
from lorica.privacy.released import Released, post_process
from lorica.privacy.unit import RECORD, PrivacyUnit
from lorica.secure_sum.agreement import Agreement
from lorica.streams import torch_stream
from lorica.tasks.records import Records, evaluating

SentAndKept = tuple[dict[str, Released], dict[str, Released] | None]
"""Tensors for the server, and tensors that stay with the client for later exchanges (None if there are none)."""


@dataclass
class Client:
    """An owner with its records, its plan and its ledger.

    Attributes:
        number: public id.
        records: private.
        plan: the agreed terms; a request that exceeds them is refused.
        ledger: charged before a record is sampled. It also stores the tensors that stay with the client.
        dataset: fingerprint of the whole data set.
        unit: the unit of privacy, which is one of `records`.
        seed: public seed, for dropout masks, sketches, perturbations and reproducible noise.
        private_test: the owner's test records; their results stay with the owner.
        policy: the owner's limits over all runs; None if one process simulates all owners.
        run_name: name of the run, for the owner's account of the ledger.
        held: the server's tensors as last received.
        merged: site name -> `(B, A)` merged into the frozen weight.
        sequence: number of the last request; None before the first.
    """

    number: int
    records: Records
    plan: ClientPlan
    ledger: Ledger
    dataset: str
    seed: int
    micro_batch_tokens: int | None = None
    unit: PrivacyUnit = RECORD
    private_test: Records | None = None
    policy: Policy | None = None
    run_name: str = ""
    held: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, Pair] = field(default_factory=dict)
    sequence: int | None = None

    def reply_to(self, model: AdaptedModel, request: Request, agreement: Agreement | None = None) -> bytes:
        """Do the work and return the encoded reply.

        The ledger charges the release before the first record is sampled, and stores the reply before it is returned. A
        repeated request gets the stored reply; an interrupted one is repeated with the same batches and noise. Both are
        the same release, at no further cost.

        Args:
            agreement: the terms of the sum that the reply becomes part of; None if it is sent by itself.

        Raises:
            Refused: the request exceeds the owner's plan or policy, belongs to an earlier round, or builds on a request
                that did not arrive.
        """
        if isinstance(request.work, Delivery):
            if request.work.final:
                self.ledger.end(request.run, self.number)
            self.test_privately(model, request, request.work)
            return Reply(self.number, {}).encode()
        self._receive(request)
        if self.plan.shared is not None:
            check_shared_noise(self.plan, request, self.held, agreement)
        digest = request.digest(self.held, self.merged)
        stored = self.ledger.recall(request.run, self.number, digest)
        if stored is not None:
            return stored
        if request.round < self.ledger.last_round(request.run, self.number):
            raise Refused(f"client {self.number}: round {request.round} is over, and its releases are not repeated")
        own = self.ledger.kept(request.run, self.number, request.round)
        if isinstance(request.work, Projection):
            own = self._sketched(request, own)
        release = Release(
            dataset=self.dataset,
            records=self.records.fingerprint(),
            run=request.run,
            client=self.number,
            round=request.round,
            sampling_rate=self.plan.terms.sampling_rate,
            noise_multiplier=self.plan.noise_multiplier,
            clip_norm=self.plan.terms.clip_norm,
            steps=self._steps_of(request),
            noise=self.plan.noise,
            request=digest,
            unit=self.unit,
            own_noise_multiplier=self._own_noise_multiplier(request),
        )
        model.assert_frozen()
        self.introduce()
        charge = self.ledger.charge(release, lambda earlier: self._allow(earlier, request))
        if isinstance(request.work, Training):
            released, kept = self._train(model, request, request.work, own, charge.seed)
        else:
            released, kept = self._project(model, request, request.work, own, charge.seed), None
        return self.ledger.attach(charge, Reply(self.number, released).encode(), kept)

    def _steps_of(self, request: Request) -> int:
        """Noisy steps of a request. A projection is a function of earlier releases."""
        return request.work.steps if isinstance(request.work, Training) else 0

    def _project(
        self, model: AdaptedModel, request: Request, work: Projection, own: Mapping[str, Released], seed: bytes | None
    ) -> dict[str, Released]:
        return project(work.bases, self.held, own)

    def check_records(self, run: str, datasets: set[str]) -> None:
        """Refuse to go on with a run that started with other records.

        Args:
            datasets: the data sets that this client's releases in the run are about (`Ledger.datasets`).

        Raises:
            UserError: they include another one.
        """
        if datasets - {self.dataset}:
            raise UserError(
                "task.train",
                str(self.ledger.path),
                f"the training data have changed since run {run:.8} started, as this ledger shows",
                "restore the earlier data, or set name to a new run for the changed data",
            )

    def forget(self) -> None:
        """Forget all that the server sent: its next request must contain everything."""
        self.held, self.merged, self.sequence = {}, {}, None

    def reserve(self, run: str, allow: Callable[[list[Release]], None]) -> None:
        """Reserve the budget of a whole run, unless `allow` raises. The end of the run releases the rest.

        Runs without secret noise have no budget and reserve nothing.

        Args:
            allow: called with the unused reservations of other runs, under the ledger's lock.
        """
        self.introduce()
        self.ledger.introduce_run(run, self.run_name)
        planned = self.reservation(run)
        if planned is None:
            allow([])
        else:
            self.ledger.reserve([planned], allow)

    def reservation(self, run: str) -> Exposure | None:
        """What this client reserves for a whole run; None without secret noise."""
        if self.plan.noise != "secure":
            return None
        return Exposure(
            ledger=self.ledger.identity,
            run=run,
            client=self.number,
            records=self.records.fingerprint(),
            unit=self.unit,
            noise=self.plan.noise,
            sampling_rate=self.plan.terms.sampling_rate,
            noise_multiplier=self.plan.noise_multiplier,
            steps=0,
            planned=self.plan.max_steps,
            releases=0,
            own_noise_multiplier=self.plan.terms.noise_multiplier,
        )

    def introduce(self) -> None:
        """Store the records in the ledger, so that each one is recognised in other files."""
        self.ledger.introduce({self.records.fingerprint(): self.records.tags})

    def _own_noise_multiplier(self, request: Request) -> float | None:
        """The noise multiplier of this client's own noise, if it shares the noise with others."""
        if self.plan.shared is None or not isinstance(request.work, Training):
            return None
        return request.work.terms.noise_multiplier

    def personal(self, run: str, round_number: int) -> dict[str, Tensor]:
        """The noisy tensors that this client trained and did not send: its personal part of the model after a round."""
        return {name: released.tensor for name, released in self.ledger.kept(run, self.number, round_number).items()}

    def _allow(self, earlier: Earlier, request: Request) -> None:
        """Refuse steps that exceed the policy or the plan. Work without steps costs nothing and is not checked."""
        if not isinstance(request.work, Training):
            return
        steps = request.work.steps
        if self.policy is not None:
            elsewhere = self.ledger.elsewhere(self.records.fingerprint())
            self.policy.review_release([*earlier.costs(), *elsewhere], self.unit, self.plan, steps)
        self.plan.check(request.work.terms, earlier.steps(request.run, self.number) + steps)

    def _receive(self, request: Request) -> None:
        if request.sequence not in (0, self.sequence) and self.sequence != request.sequence - 1:
            raise Refused(f"client {self.number}: an earlier request did not arrive; send the whole adapter")
        if request.sequence != self.sequence or request.sequence == 0:
            self.held = dict(request.tensors) if request.sequence == 0 else self.held | dict(request.tensors)
            self.merged = {} if request.restart or request.sequence == 0 else dict(self.merged)
            for name, pair in request.increments.items():
                self.merged[name] = stack_pairs(self.merged.get(name), pair)
            self.sequence = request.sequence

    def _sketched(self, request: Request, kept: Mapping[str, Released]) -> dict[str, Released]:
        """The kept factors of this round's sketch.

        Raises:
            Refused: this round has no sketch.
        """
        prefix = _sketched_in(request.round)
        factors = {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
        if not factors:
            raise Refused(f"client {self.number}: round {request.round} has no sketch to project")
        return factors

    def test_privately(self, model: AdaptedModel, request: Request, work: Delivery) -> None:
        """Evaluate a delivered model on the owner's test records, if there are any. The result stays with the owner."""
        if self.private_test is None:
            return
        model.merge(work.merged)
        model.write(dict(work.model) | (self.personal(request.run, request.round) if work.personal else {}))
        with evaluating(model.peft_model):
            tokens = pass_tokens(self.micro_batch_tokens, model.peft_model, model.device)
            metrics = model.objective.evaluate(model.peft_model, self.private_test, tokens, model.device)
        line = {"run": request.run, "client": self.number, "round": request.round} | metrics
        append_line(private_metrics_path(self.ledger.path), to_json(line), private=True)

    def _train(
        self, model: AdaptedModel, request: Request, work: Training, own: Mapping[str, Released], seed: bytes | None
    ) -> SentAndKept:
        """Take the noisy steps from the global adapter; the update of each trained tensor is `θ_E - θ_0`."""
        personal = {name: own[name] for name in work.personal if name in own}
        adapter = self.held | {name: released.tensor for name, released in personal.items()}
        adapter = {name: leading(name, value, work.rank).to(model.device) for name, value in adapter.items()}
        model.merge(self.merged)
        randomness = self._reproducible(request) if seed is None else SecureRandomness(seed)
        updates, gradients = self._steps(model, request, work, adapter, self.records, randomness)
        moved = {
            name: _after(work.part(name, adapter[name]), update, personal.get(name)) for name, update in updates.items()
        }
        released = {name: update for name, update in updates.items() if name not in work.personal}
        kept = {name: value for name, value in moved.items() if name in work.personal}
        if work.sketch_columns is not None:
            sketches = sketch(adapter, moved, work.sketch_columns, self.seed, request.round)
            # The prefix separates these factors from those of other rounds and from other tensors kept at the client.
            kept |= {f"{_sketched_in(request.round)}{name}": moved[name] for name in moved if is_factor(name)}
            released = {name: value for name, value in released.items() if not is_factor(name)} | sketches
        if work.last_step_energy:
            released |= {f"{ENERGY}{name}": post_process(_energy, gradient) for name, gradient in gradients.items()}
        return released, kept or None

    def _steps(
        self,
        model: AdaptedModel,
        request: Request,
        work: Training,
        adapter: dict[str, Tensor],
        records: Records,
        randomness: Randomness,
    ) -> tuple[dict[str, Released], dict[str, Released]]:
        """The updates after all steps from an adapter, and the noisy gradients of the last one."""
        model.write(adapter)
        parts = {name: work.part(name, value) for name, value in adapter.items()}
        start = {name: parts[name] for name in work.trained}
        places = {name: model.trained(name, work.ranks(name), adapter) for name in work.trained}
        optimizer = make_optimizer(work.optimizer, work.rates)
        updates: dict[str, Released] = {}
        gradients: dict[str, Released] = {}
        values = parts
        tokens = pass_tokens(self.micro_batch_tokens, model.peft_model, model.device)
        model.peft_model.train()
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            _seed_dropout(randomness.dropout_seed(), model.device)
            for step in range(work.steps):
                model.assert_frozen()
                active = {name: places[name] for name in work.local.active(work.trained, step)}
                with self._perturbed(model, request, work, step):
                    gradients = noisy_gradient(
                        model.peft_model,
                        model.losses,
                        active,
                        records,
                        work.terms,
                        randomness,
                        tokens,
                    )
                shaped = transform_gradients(gradients, values, start, work.corrections, work.local)
                for name, increment in optimizer.step(shaped, values).items():
                    updates[name] = post_process(torch.add, updates[name], increment) if name in updates else increment
                values = parts | {name: start[name] + update.tensor for name, update in updates.items()}
                model.write(adapter | {name: work.whole(name, adapter[name], values[name]) for name in updates})
        model.peft_model.eval()
        return updates, gradients

    @contextmanager
    def _perturbed(self, model: AdaptedModel, request: Request, work: Training, step: int) -> Iterator[None]:
        if work.local.perturbation == 0:
            yield
            return
        ratio = work.local.perturbation * strength(
            (request.round - 1) * work.steps + step, max(work.rounds * work.steps - 1, 1)
        )
        generator = torch_stream(self.seed, "perturbation", request.round, request.exchange, self.number, step)
        with model.perturbed(ratio, generator):
            yield

    def _reproducible(self, request: Request) -> Randomness:
        return ReproducibleRandomness(self.seed, request.round, request.exchange, self.number)


def _seed_dropout(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed`, which keeps a stack trace of every call for as long as CUDA is not initialised."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def _sketched_in(round_number: int) -> str:
    """Prefix of the names of the factors that a client keeps behind a round's sketch."""
    return f"{SKETCH}{round_number}:"


def private_metrics_path(ledger: Path) -> Path:
    """The file with the results of private tests, next to the ledger."""
    return ledger.with_name(f"{ledger.name.removesuffix('.sqlite').removesuffix('.ledger')}.private-metrics.jsonl")


def _after(start: Tensor, update: Released, before: Released | None) -> Released:
    """A tensor after training. `start` is public, except for a personal tensor, whose noisy value is `before`."""
    if before is None:
        return post_process(lambda u: start + u, update)
    return post_process(lambda u, s: s.to(u) + u, update, before)


def _energy(gradient: Tensor) -> Tensor:
    return gradient.square().sum()
