"""The audit of an experiment: canaries train with the experiment's settings, and attacks guess which were included.

Canaries are public test records, with wrong labels where the task has labels. They are dealt to simulated owners with a
ledger that is deleted afterwards; no owner's data is read. A coin decides about each canary. In place of one that is
left out, its owner has a record whose loss is zero, so that the number of records, the sampling rate and the noise do
not depend on the coins. Each owner's mechanism acts on its own canaries, so the claim for a canary is its owner's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.base_files import resolve_base
from lorica.adapters.memory import pass_tokens
from lorica.adapters.state import leading
from lorica.audit.attack import Ridge
from lorica.audit.canaries import Canaries, toss
from lorica.audit.estimators import (
    CONFIDENCE,
    Scores,
    best_plans,
    fdp_refutes_any,
    one_run_p_value_of,
    trade_off_inverse,
)
from lorica.audit.findings import findings, nearly_without_noise
from lorica.audit.reading import Unreadable, clipped, kept_coordinates, unshaped, updates_of
from lorica.audit.watching import Seen, WatchedClient, WatchedEngine
from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.files import throwaway_folder, to_json, write_atomically
from lorica.messages import Training
from lorica.owner.setup import make_client
from lorica.privacy.gradients import per_example_gradients
from lorica.privacy.home import Home
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import ClientPlan, plan_run
from lorica.reporting.card import add_audit
from lorica.reporting.checksums import files_are_whole
from lorica.reporting.html import write_report
from lorica.reporting.run_folder import AUDIT, experiment_hash
from lorica.run.folder import has_experiment
from lorica.run.lock import locked
from lorica.run.rounds import assemble
from lorica.run.setup import Prepared, prepare
from lorica.server.federation import Federation
from lorica.streams import numpy_stream
from lorica.tasks.loading import load_tests
from lorica.tasks.records import Records, Task, evaluating

RUN = "audit"
UNEXPLAINED = 0.1
"""Standard deviation of what shares cannot explain, relative to a release."""
LARGEST_GRADIENTS = 8 * 2**30
"""Bytes of the canaries' gradients that are in memory at a time."""


@dataclass(frozen=True)
class Trained:
    """One federation of canaries after its last round.

    Attributes:
        white_box: scores of the canaries from what the server received.
        black_box: scores from the final adapter: how much the loss of each canary fell.
    """

    plans: Mapping[int, ClientPlan]
    white_box: Scores
    black_box: Scores


def audit_run(
    config: ExperimentConfig,
    canaries: int = 1000,
    on_round: Callable[[str, int, int], None] = lambda what, done, count: None,
) -> dict[str, Any]:
    """Audit an experiment, and a control of the same experiment with nearly no noise.

    Args:
        canaries: number of canaries over all owners; more give larger lower bounds.
        on_round: called after each round with what is trained, the number of finished rounds, and that of all.

    Returns:
        JSON-able: the claim, the lower bounds of each attack, and those of the control.

    Raises:
        UserError: the experiment has no noise, there are too few test records for so many canaries, or too few canaries
            for a batch; as `prepare`.
    """
    if not config.privacy.private:
        raise UserError("privacy.noise", "none", "there is no claim to audit", "set privacy.noise=secure")
    if config.privacy.unit == "client":
        problem = "the canaries of this audit are records, not clients"
        remedy = "set privacy.unit=record, or audit the mechanism (lorica audit mechanism)"
        raise UserError("privacy.unit", "client", problem, remedy)
    config = config.model_copy(
        update={"engine": "local", "privacy": config.privacy.model_copy(update={"noise": "secure"})}
    )
    task = load_tests(config.task, resolve_base(config.model.base))
    records = _canaries(config, task, canaries)
    without_noise = config.model_copy(update={"privacy": nearly_without_noise(config.privacy)})
    trained = _train(config, task, records, lambda done, count: on_round("the claim", done, count))
    control = _train(without_noise, task, records, lambda done, count: on_round("the control", done, count))
    plan = max(trained.plans.values(), key=lambda one: one.epsilon())
    steps, claimed, delta = plan.steps(plan.max_steps), plan.epsilon(), config.privacy.delta
    # Two attacks with two tests each.
    level = (1 - CONFIDENCE) / 4
    for_one_run, for_fdp = best_plans(len(records), steps, delta)
    found = {}
    for name in ("white_box", "black_box"):
        scores = getattr(trained, name)
        refuted = one_run_p_value_of(scores, claimed, delta, for_one_run) < level
        refuted = refuted or fdp_refutes_any(scores, trade_off_inverse(steps), level, for_fdp)
        found[name] = findings(scores, getattr(control, name), claimed, steps, delta) | {"refuted": refuted}
    return {
        "method": config.method.name,
        "noise": "own" if plan.shared is None else "shared",
        "claimed_epsilon": claimed,
        "delta": plan.delta,
        "confidence": CONFIDENCE,
        "false_alarm": 1 - CONFIDENCE,
        "canaries": len(records),
        "owners": len(trained.plans),
        "sampling_rate": plan.terms.sampling_rate,
        "noise_multiplier": plan.noise_multiplier,
        "steps": plan.max_steps,
        "attacks": found,
        "refuted": any(one["refuted"] for one in found.values()),
    }


def write_audit(config: ExperimentConfig, audit: dict[str, Any]) -> Path:
    """Write `audit.json` to the folder of the experiment's run; a run that has finished gets new report and cards.

    Raises:
        UserError: the folder contains another experiment, or another process is at the same run.
    """
    folder = config.folder
    with locked(folder):
        has_experiment(folder, config)
        content = {"experiment": experiment_hash(config.model_dump(mode="json"))} | audit
        write_atomically(folder / AUDIT, to_json(content, indent=2).encode())
        if files_are_whole(folder):
            add_audit(folder)
            write_report(folder)
    return folder / AUDIT


def _canaries(config: ExperimentConfig, task: Task, count: int) -> Records:
    """Test records, as many for each owner, with wrong labels where the task has labels."""
    owners, batch_size = config.federation.clients, config.federation.batch_size
    each = count // owners
    if each < batch_size:
        raise UserError(
            "--canaries",
            count,
            f"each of {owners} owners would have {each}, fewer than federation.batch_size = {batch_size}",
            f"choose at least {owners * batch_size}, or set federation.clients or federation.batch_size to less",
        )
    draws, test = numpy_stream(config.seed, "audit"), task.test
    wrong = len(task.label_names) - 1 if task.has_classes else 1
    if each * owners > wrong * len(test):
        raise UserError(
            "--canaries",
            count,
            f"canaries are public test records with wrong labels, and the first test set gives {wrong * len(test)}",
            "choose fewer, or set task.test to a larger public set",
        )
    # A test record with each of its wrong labels in turn.
    places, shifts = np.divmod(draws.permutation(wrong * len(test))[: each * owners], wrong)
    chosen = test.subset(places)
    if task.has_classes:
        return replace(chosen, labels=(chosen.labels + 1 + shifts) % (wrong + 1))
    if np.issubdtype(chosen.labels.dtype, np.floating):
        return replace(chosen, labels=chosen.labels[draws.permutation(len(chosen))])
    return chosen


def _train(config: ExperimentConfig, task: Task, records: Records, on_round: Callable[[int, int], None]) -> Trained:
    """Train a federation of canaries, and attack it."""
    owners = config.federation.clients
    parts = np.split(np.arange(len(records)), owners)
    plans = {owner: plan_run(config, owner, len(part)) for owner, part in enumerate(parts)}
    canaries = {owner: Canaries.of(records.subset(part), toss(len(part))) for owner, part in enumerate(parts)}
    prepared = prepare(config, task)
    _check_memory(prepared.model, len(records) if config.federation.secure_sum else len(parts[0]))
    with throwaway_folder() as folder:
        ledger = Ledger(folder / "ledger.sqlite", Home(folder / "home"))
        clients = {
            owner: WatchedClient(**vars(make_client(config, plan, canaries[owner], None, ledger, RUN)))
            for owner, plan in plans.items()
        }
        engine = WatchedEngine(prepared.model, prepared.state, clients)
        federation = assemble(prepared, engine, RUN)
        federation.join()
        before = _losses(prepared, federation, canaries)
        attack = Attack(prepared, clients, canaries)
        for done in range(1, config.federation.rounds + 1):
            federation.round()
            try:
                attack.learn(engine)
            except Unreadable as reason:
                problem = f"what leaves an owner cannot be attacked: {reason}"
                raise UserError("method.name", config.method.name, problem, "choose another method") from None
            on_round(done, config.federation.rounds)
        after = _losses(prepared, federation, canaries)
    included = np.concatenate([one.included for one in canaries.values()])
    return Trained(plans, Scores(attack.scores(), included), Scores(before - after, included))


class Attack:
    """A ridge attack on everything that the server receives: replies, or only their secure sums.

    The share of a canary in a release is its clipped gradient at the state that its owner started from, times its
    expected number of batches over the batch size, `E q/b`. What owners do to noisy gradients is undone as far as it
    can be; after AdamW or momentum, only the direction of a release is compared.
    """

    def __init__(
        self, prepared: Prepared, clients: Mapping[int, WatchedClient], canaries: Mapping[int, Canaries]
    ) -> None:
        self._prepared, self._clients, self._canaries = prepared, clients, canaries
        # A sum depends on the canaries of all owners, a reply on those of its own.
        groups = [list(canaries)] if prepared.config.federation.secure_sum else [[owner] for owner in canaries]
        self._attacks = [(owners, Ridge(sum(len(canaries[owner]) for owner in owners))) for owners in groups]

    def learn(self, engine: WatchedEngine) -> None:
        """Read what was released since the last call.

        Raises:
            Unreadable: a sketch does not determine the factors behind it.
        """
        replies = {
            (owner, seen.request.round, seen.request.exchange): seen
            for owner, client in self._clients.items()
            for seen in client.seen
            if isinstance(seen.request.work, Training)
        }
        if self._prepared.config.federation.secure_sum:
            (owners, attack), sums = self._attacks[0], engine.sums
            for one in sums:
                places = {owner: (owner, one.round, one.exchange) for owner in one.members}
                members = {owner: replies[place] for owner, place in places.items() if place in replies}
                if members:
                    attack.add(*self._read(one.tensors, owners, members, one.members))
        else:
            for (owner, _, _), seen in replies.items():
                owners, attack = self._attacks[owner]
                attack.add(*self._read(seen.tensors, owners, {owner: seen}, {owner: 1.0}))
        engine.sums.clear()
        for client in self._clients.values():
            client.seen.clear()

    def scores(self) -> np.ndarray:
        """(canaries,), in the order of the owners."""
        return np.concatenate([attack.scores() for _, attack in self._attacks])

    def _read(
        self,
        released: Mapping[str, Tensor],
        owners: list[int],
        members: Mapping[int, Seen],
        weights: Mapping[int, float],
    ) -> tuple[np.ndarray, np.ndarray]:
        """A release, (d,), and the shares of all canaries of `owners`, (canaries, d), in units of the noise.

        Where there is hardly any noise, what the shares cannot explain takes its place: gradients move during the steps
        of an exchange.

        Args:
            released: the weighted sum of the members' replies, or one reply.
            members: owner -> the work that it was asked to do.
        """
        seen = next(iter(members.values()))
        work = _work(seen)
        start = _start(seen)
        trained = {name: work.part(name, value) for name, value in start.items()}
        active = [work.local.active(work.trained, step) for step in range(work.steps)]
        gradients = {owner: self._gradients(owner, one) for owner, one in members.items()}
        values, shares = [], []
        for name, update in updates_of(
            replace(seen, tensors=released), work, start, self._prepared.config.seed
        ).items():
            steps = sum(name in names for names in active)
            known = work.optimizer.weight_decay * trained[name].double() + work.corrections.get(name, 0.0)
            value = unshaped(name, -update / work.rates[name] - steps * known, trained, work.local).flatten()
            parts = []
            for owner in owners:
                if owner in members:
                    terms = _work(members[owner]).terms
                    each = weights[owner] * steps * terms.sampling_rate / terms.batch_size
                    parts.append(each * kept_coordinates(name, gradients[owner][name], work.local).flatten(1).double())
                else:
                    parts.append(torch.zeros(len(self._canaries[owner]), len(value), dtype=torch.float64))
            noise = math.sqrt(steps * sum((weights[one] * _work(members[one]).terms.noise_std) ** 2 for one in members))
            size = float(value.square().mean().sqrt())
            deviation = math.hypot(noise, UNEXPLAINED * size)
            plain = work.optimizer.name == "sgd" and not work.optimizer.momentum
            values.append(value / (deviation if plain else size))
            shares.append(torch.cat(parts) / (deviation if plain else noise))
        return torch.cat(values).numpy(), torch.cat(shares, dim=1).numpy()

    def _gradients(self, owner: int, seen: Seen) -> dict[str, Tensor]:
        """Name -> (n, *shape), the clipped gradient of each canary at the state that the owner started from."""
        model, config, work, start = self._prepared.model, self._prepared.config, _work(seen), _start(seen)
        model.merge(seen.merged)
        model.write({name: value.to(model.device) for name, value in start.items()})
        places = {name: model.trained(name, work.ranks(name), start) for name in work.trained}
        records = self._canaries[owner].base
        found = {name: torch.zeros(len(records), *place.zeros(1).shape[1:]) for name, place in places.items()}
        tokens = pass_tokens(config.federation.micro_batch_tokens, model.peft_model, model.device)
        for indices in records.micro_batch_indices(np.arange(len(records)), tokens):
            batch = records.batch(indices).to(model.device)
            gradients = per_example_gradients(
                partial(model.losses, model.peft_model, batch), places, len(batch), batch.example_of_row
            )
            for name, value in gradients.items():
                found[name][torch.from_numpy(indices)] = value.cpu()
        return clipped(found, work.terms.clip_norm)


def _work(seen: Seen) -> Training:
    assert isinstance(seen.request.work, Training)
    return seen.request.work


def _start(seen: Seen) -> dict[str, Tensor]:
    return {name: leading(name, value, _work(seen).rank) for name, value in seen.start.items()}


def _losses(prepared: Prepared, federation: Federation, canaries: Mapping[int, Canaries]) -> np.ndarray:
    """(canaries,), the loss of each canary under the model that its owner ends with."""
    model, server = prepared.model, federation.server
    personal = federation.engine.personal(federation.run, server.round) if prepared.method.personal else {}
    tokens = pass_tokens(prepared.config.federation.micro_batch_tokens, model.peft_model, model.device)
    model.merge(server.model.merged)
    losses = []
    for owner, own in canaries.items():
        model.write(
            {name: value.to(model.device) for name, value in (server.evaluated | dict(personal.get(owner, {}))).items()}
        )
        found = np.zeros(len(own))
        with evaluating(model.peft_model):
            for indices in own.base.micro_batch_indices(np.arange(len(own)), tokens):
                batch = own.base.batch(indices).to(model.device)
                found[indices] = model.losses(model.peft_model, batch).double().cpu().numpy()
        losses.append(found)
    return np.concatenate(losses)


def _check_memory(model: AdaptedModel, canaries: int) -> None:
    coordinates = sum(tensor.zeros(1).numel() for tensor in model.tensors.values())
    needed = 3 * 8 * canaries * coordinates
    if needed > LARGEST_GRADIENTS:
        raise UserError(
            "--canaries",
            canaries,
            f"the gradients of the canaries that share a release would take {needed / 2**30:.0f} GiB",
            "choose fewer canaries, or a smaller lora.r",
        )
