"""What a run will cost and release, before it starts: plans, ledger, traffic, memory and time."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lorica.adapters.memory import pass_tokens
from lorica.config import ExperimentConfig
from lorica.engines.local import LocalEngine, prepare_local
from lorica.errors import UserError
from lorica.owner.client import Client
from lorica.owner.cohort import Cohort
from lorica.privacy.accounting import Steps
from lorica.privacy.home import Home
from lorica.privacy.ledger import Ledger
from lorica.privacy.ledger_file import working_copy
from lorica.privacy.lifetime import history
from lorica.run.data import DATA, fingerprints
from lorica.run.folder import claim_folder, started_run
from lorica.run.rounds import assemble
from lorica.run.setup import Prepared
from lorica.tasks.groups import grouped

TIMED_STEPS = 2
"""Local steps of a timed round; there are methods whose steps take turns between two tensors."""


def rehearse(config: ExperimentConfig, on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """Prepare a run as it would be prepared, and time two of its rounds. Nothing is charged, and nothing is written
    into the run folder or the ledger.

    The timed rounds have as many records and the same noise, but their records are those of the public test set:
    nothing is computed on private records beyond what a run's start does. They go through a temporary ledger.

    Args:
        on_stage: told what is being done.

    Returns:
        `clients`: a row each; with secret noise, which the ledger charges, also the lifetime ε of the client's most
        exposed record `before` and `after` this run, reservations of other runs included, and what is then `left` of
        `privacy.max_lifetime_epsilon`. `refused`: why the ledger would refuse the run; None if it would not. `bytes`:
        of all clients over the whole run, the first round and a later one. `seconds`: of a client's step, of the server
        in a round, of an evaluation, and of the whole run. `memory`: bytes, the peak.

    Raises:
        UserError: whatever a run would refuse before it starts; or the owners are on other machines.
    """
    if config.engine == "flower" and config.flower.superlink is not None:
        problem = "the owners' data are on other machines"
        raise UserError("--dry-run", True, problem, "let each owner run it with engine=local and its own data")
    # A new run has nothing to compare with, and the key of fingerprints would be written to Lorica's home.
    claim_folder(config.folder, config, fingerprints(config) if (config.folder / DATA).is_file() else {})
    run = started_run(config.folder) or "dry-run"
    with TemporaryDirectory(prefix="lorica-") as place:
        on_stage("Reading the data and the model")
        paths: list[Path] = []

        def opened(path: Path) -> Ledger:
            paths.append(path)
            return working_copy(path, Path(place) / "ledger")

        prepared, engine = prepare_local(config, opened)
        on_stage("Composing what the ledger has charged")
        clients, refused = _clients(config, engine, run)
        on_stage("Timing two rounds on the public test set")
        measured = _measure(prepared, engine, Path(place) / "timed")
    return {
        "name": config.name,
        "method": config.method.name,
        "rounds": config.federation.rounds,
        "local_steps": config.federation.local_steps,
        "delta": config.privacy.delta if config.privacy.private else None,
        "noise": config.privacy.noise,
        "ledger": str(paths[0]),
        "max_lifetime_epsilon": config.privacy.max_lifetime_epsilon,
        "clients": clients,
        "refused": refused,
    } | measured


def _clients(config: ExperimentConfig, engine: LocalEngine, run: str) -> tuple[list[dict[str, Any]], str | None]:
    try:
        engine.join(run)
        refused = None
    except UserError as error:
        refused = str(error)
    return [
        _client_row(client, run, config.privacy.max_lifetime_epsilon) for client in engine.clients.values()
    ], refused


def _client_row(client: Client, run: str, limit: float | None) -> dict[str, Any]:
    plan = client.plan
    row: dict[str, Any] = {
        "client": client.number,
        "records": plan.records,
        "sampling_rate": plan.terms.sampling_rate,
        "noise_multiplier": plan.noise_multiplier if plan.delta is not None else None,
        "clip_norm": plan.terms.clip_norm,
        "steps": plan.max_steps,
        "delta": plan.delta,
        "epsilon": plan.epsilon(),
    }
    if plan.shared is not None:
        row |= {"own_noise_multiplier": plan.terms.noise_multiplier, "epsilon_own_noise": plan.epsilon_own_noise()}
    delta = plan.delta
    if delta is None or plan.noise != "secure":
        return row
    client.introduce()
    found = history(client.ledger, client.dataset, client.records.fingerprint())
    remaining = plan.steps(plan.max_steps - client.ledger.steps(run, client.number))
    own = (run, client.number)

    def life(planned: Steps | None) -> float:
        if found.unprotected:
            return math.inf
        return found.epsilon(delta, own, planned, client.unit, reserved=True)

    row |= {"lifetime_epsilon_before": life(None), "lifetime_epsilon_after": life(remaining)}
    if limit is not None:
        row["left"] = max(0.0, limit - row["lifetime_epsilon_after"])
    return row


def _measure(prepared: Prepared, engine: LocalEngine, folder: Path) -> dict[str, Any]:
    """Traffic, memory and time of the run, from two rounds of its method over the public test set."""
    config, task, model = prepared.config, prepared.task, prepared.model
    federation = config.federation
    steps = min(federation.local_steps, TIMED_STEPS)
    smaller = federation.model_copy(update={"local_steps": steps})
    ledger = Ledger(folder / "ledger.sqlite", Home(folder))

    def on_public_records(client: Client) -> Client:
        count, per_unit = client.plan.records, config.privacy.group_records if config.privacy.group else 1
        records = task.test.subset(np.resize(np.arange(len(task.test)), count * per_unit))
        if config.privacy.group:
            # As many as a group may have, so that the time is none that tells how many they have.
            records = grouped(records, np.repeat(np.arange(count), per_unit).astype(str), per_unit, seed=0)
        public = replace(client, records=records, ledger=ledger, dataset="public", private_test=None)
        if isinstance(public, Cohort):
            # All members alike, so that the time is none that tells how many records each one has.
            share = -(-sum(map(len, public.members)) // count)
            public.members = [task.test.subset(np.resize(np.arange(len(task.test)), share))] * count
            public.steps = steps
        return public

    clients = {number: on_public_records(client) for number, client in engine.clients.items()}
    shorter = replace(prepared, config=config.model_copy(update={"federation": smaller}))
    server = assemble(shorter, LocalEngine(model, shorter.state, clients), "timed")
    server.join()
    started = time.perf_counter()
    tokens = pass_tokens(federation.micro_batch_tokens, model.peft_model, model.device)
    task.evaluate(model.peft_model, tokens, model.device)
    evaluation = time.perf_counter() - started
    timed = []
    # The first round also sends the whole adapter, and warms up.
    for _ in range(min(federation.rounds, 2)):
        started = time.perf_counter()
        traffic = server.round()
        timed.append((traffic, time.perf_counter() - started))
    (first, _), (traffic, seconds) = timed[0], timed[-1]
    step = (seconds - traffic.server_seconds) / (len(traffic.participants) * steps)
    a_round = len(traffic.participants) * federation.local_steps * step + traffic.server_seconds
    evaluations = 1 + -(-federation.rounds // federation.evaluate_every)
    later = federation.rounds - 1
    # With client-level DP one reply is the mean over the clients of a round, each of whom sends as much.
    senders = federation.participants if config.privacy.unit == "client" else 1
    return {
        "bytes": {
            way: {"first_round": senders * one, "later_round": senders * other, "all": senders * (one + later * other)}
            for way, one, other in (
                ("up", sum(first.bytes_up.values()), sum(traffic.bytes_up.values())),
                ("down", sum(first.bytes_down.values()), sum(traffic.bytes_down.values())),
            )
        },
        "seconds": {
            "step": step,
            "server_round": traffic.server_seconds,
            "evaluation": evaluation,
            "all": federation.rounds * a_round + evaluations * evaluation,
        },
        "device": str(model.device),
        "memory": _peak_memory(model.device),
    }


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
