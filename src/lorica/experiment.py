"""From a configuration to a finished run folder: prepare, run or resume, export, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_files import resolve_base
from lorica.adapters.base_model import load_base, resolve_device
from lorica.adapters.export import Export, export_adapter
from lorica.adapters.state import AdapterState
from lorica.aggregation.averaging import RoundAverage
from lorica.aggregation.kalman import KalmanFilter
from lorica.aggregation.robust import check_aggregate, make_aggregate
from lorica.aggregation.scaffold import Scaffold
from lorica.aggregation.server_optimizers import make_server_optimizer
from lorica.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lorica.client import Client
from lorica.config import ExperimentConfig, FederationConfig, load
from lorica.engines.local import LocalEngine
from lorica.errors import UserError
from lorica.federation import Engine, Federation, client_ranks, participation_schedule
from lorica.files import append_line, replaced_folder, write_atomically
from lorica.local.step import LocalStep
from lorica.methods.base import Method, Server, make_method
from lorica.methods.pieces import check_pieces
from lorica.optimizers import learning_rates
from lorica.owners import by_privacy_unit, divide, hold_out, ledger_path, planned, privacy_unit
from lorica.privacy.isolation import check_isolation
from lorica.privacy.ledger import Ledger
from lorica.privacy.statement import privacy_statement
from lorica.reporting.card import model_card
from lorica.reporting.html import write_report
from lorica.reporting.run_folder import read_run
from lorica.runs import claim_folder, keep_rounds, open_run
from lorica.streams import torch_stream
from lorica.tasks.label_counts import label_counts
from lorica.tasks.loading import load_task
from lorica.tasks.records import Records, Task

CHECKED_EXAMPLES = 3


@dataclass(frozen=True)
class Prepared:
    """The server's side of a run, checked; nothing has been released and no file written."""

    config: ExperimentConfig
    task: Task
    model: AdaptedModel
    state: AdapterState
    method: Method
    schedule: list[list[int]]
    ranks: dict[int, int]


OnStart = Callable[[Prepared, Federation, int], None]


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder; `report.html` is in it.
        adapter: the PEFT folder.
        metrics: one dictionary a round, round 0 first.
        privacy: the content of privacy.json.
    """

    folder: Path
    adapter: Path
    metrics: list[dict[str, Any]]
    privacy: dict[str, Any]

    @property
    def score(self) -> float:
        """The task's main metric after the last evaluated round."""
        return float([row["score"] for row in self.metrics if "score" in row][-1])

    @property
    def starting_score(self) -> float:
        return float(self.metrics[0]["score"])

    @property
    def epsilon(self) -> float:
        """The largest over the clients; infinite without privacy."""
        return float(max(client.get("epsilon", float("inf")) for client in self.privacy["clients"]))


class Experiment:
    """A configured experiment.

    >>> experiment = Experiment.load()
    >>> experiment.config.method.name
    'as-lora'
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | None = None, overrides: list[str] | None = None) -> Experiment:
        """From a YAML file or a dictionary, by default the embedded digits experiment, with `a.b=c` overrides.

        Raises:
            UserError: names the key, the value and the remedy.
        """
        return cls(load(source, overrides))

    def run(
        self,
        on_start: OnStart = lambda prepared, federation, finished_rounds: None,
        on_round: Callable[[dict[str, Any]], None] = lambda metrics: None,
    ) -> Result:
        """Run to the end, resuming where an earlier run of the same configuration and name stopped.

        Args:
            on_start: called once everything is checked and the clients have joined, with the number of rounds that are
                already finished.
            on_round: called with each round's metrics, the starting model's (round 0) first.

        Raises:
            UserError: before any budget is spent, for everything that the configuration or the data can get wrong.
        """
        if self.config.engine == "flower":
            return _launched(self.config)
        finished = finished_result(self.config)
        if finished is not None:
            return finished
        prepared, engine = prepare_local(self.config)
        return conduct(prepared, engine, on_start, on_round)


def _launched(config: ExperimentConfig) -> Result:
    from lorica.engines.flower.launch import launch, with_absolute_paths

    config = with_absolute_paths(config)
    finished = finished_result(config)
    if finished is not None:
        return finished
    launch(config)
    if not config.folder.is_dir():
        raise UserError("output", config.output, "the run has ended, and its folder is not here", "see the SuperLink's")
    return read_result(config.folder)


def finished_result(config: ExperimentConfig) -> Result | None:
    """The result of this experiment's run if it has ended before.

    Raises:
        UserError: the run folder holds another experiment.
    """
    folder = config.folder
    claim_folder(folder, config)
    if (folder / "adapter").is_dir() and (folder / "privacy.json").is_file():
        return read_result(folder)
    return None


def prepare_local(config: ExperimentConfig) -> tuple[Prepared, LocalEngine]:
    """Load and check everything that can be checked without training, for a federation in this process.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    group = None if config.privacy == "none" else config.privacy.group
    tested = config.federation.private_test > 0
    task = load_task(config.task, resolve_base(config.model.base), config.federation.by, group, tested)
    # The ledger knows data by their records, whatever the unit.
    dataset = task.train.fingerprint()
    task = by_privacy_unit(config, task)
    prepared = prepare(config, task)
    parts = [hold_out(config, client, part) for client, part in enumerate(divide(config, task))]
    plans = [planned(config, client, len(records)) for client, (records, _) in enumerate(parts)]
    ledger = Ledger(ledger_path(config, dataset))
    clients = {
        plan.client: Client(
            number=plan.client,
            records=records,
            plan=plan,
            ledger=ledger,
            dataset=dataset,
            unit=privacy_unit(config),
            seed=config.seed,
            micro_batch_tokens=config.federation.pass_tokens(prepared.model.device.type),
            private_test=private_test,
        )
        for plan, (records, private_test) in zip(plans, parts, strict=True)
    }
    limit = None if config.privacy == "none" else config.privacy.max_lifetime_epsilon
    return prepared, LocalEngine(prepared.model, clients, limit)


def prepare(config: ExperimentConfig, task: Task) -> Prepared:
    """Load and check the server's side.

    Args:
        task: of its records the server needs the public test sets only.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    model = load_model(config, task)
    state = AdapterState(model.sites, model.read())
    method = make_method(config.method, model.sites)
    federation = config.federation
    schedule = participation_schedule(federation.clients, federation.rounds, federation.participation, config.seed)
    ranks = _client_ranks(config)
    fewest = _fewest_replies(federation, len(schedule[0]))
    # Of a secure sum the server sees as much as of one client's reply.
    method.check(config.optimizer, 1 if federation.secure_sum else fewest, federation.local_steps)
    check_pieces(config, method)
    check_aggregate(config.server, fewest)
    if federation.weights == "noise" and config.privacy == "none":
        raise UserError("federation.weights", "noise", "there is no noise without privacy", "choose uniform or records")
    check_isolated(config, model, task.test)
    method.start(state, config.seed)
    return Prepared(config, task, model, state, method, schedule, ranks)


def load_model(config: ExperimentConfig, task: Task) -> AdaptedModel:
    """The base model with fresh factors, on its device: the same on every machine.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    device = resolve_device(config.model.device)
    if config.model.threads is not None:
        torch.set_num_threads(config.model.threads)
    base = load_base(config.model, config.task.type, task.label_names, config.seed)
    return adapt(base, config.lora, config.model, config.seed, device, task.objective)


def check_isolated(config: ExperimentConfig, model: AdaptedModel, records: Records) -> None:
    """Per-example gradients of a few examples, at random factors: at `B = 0`, `A` would have no gradient.

    Whether it passes depends on the model alone.
    """
    draws = torch_stream(config.seed, "isolation")
    model.write({name: 0.1 * torch.randn(value.shape, generator=draws) for name, value in model.read().items()})
    indices = np.arange(min(CHECKED_EXAMPLES, len(records)))
    batch = next(iter(records.micro_batches(indices, 10**9))).to(model.device)
    tolerance = 1e-3 if config.model.precision == "fp32" else 0.2
    check_isolation(model.peft_model, model.losses, model.tensors, batch, tolerance)


def conduct(
    prepared: Prepared,
    engine: Engine,
    on_start: OnStart,
    on_round: Callable[[dict[str, Any]], None],
) -> Result:
    """Run the rounds that are left, whatever moves the messages, and write everything into the run folder.

    Raises:
        UserError: a client's budget does not allow the run, or too few clients take part.
    """
    config, folder = prepared.config, prepared.config.folder
    run = open_run(folder, config, str(prepared.model.device))
    if isinstance(engine, LocalEngine):
        _write_partition(prepared, engine, folder)
    checkpoint = load_checkpoint(folder / "checkpoint")
    federation = _assemble(prepared, engine, run, checkpoint)
    federation.join()
    on_start(prepared, federation, federation.server.round)
    keep_rounds(folder / "metrics.jsonl", federation.server.round)
    keep_rounds(folder / "decisions.jsonl", federation.server.round)
    if checkpoint is None:
        keep_rounds(folder / "metrics.jsonl", -1)
        metrics = {"round": 0} | _evaluate(prepared, federation)
        append_line(folder / "metrics.jsonl", json.dumps(metrics))
        on_round(metrics)
    while federation.server.round < config.federation.rounds:
        on_round(_one_round(prepared, federation))
    return _finish(prepared, federation)


def read_result(folder: Path) -> Result:
    """The result of a finished run, from its folder."""
    run = read_run(folder)
    return Result(folder, folder / "adapter", run.metrics, run.privacy or {})


def _assemble(prepared: Prepared, engine: Engine, run: str, checkpoint: Checkpoint | None) -> Federation:
    config = prepared.config
    server = Server(
        model=prepared.state,
        rounds=config.federation.rounds,
        terms={},
        optimizer=config.optimizer,
        local_steps=config.federation.local_steps,
        rates=learning_rates(config.optimizer, list(prepared.state.tensors)),
        seed=config.seed,
        local=LocalStep(
            proximal=config.local.fedprox,
            damping=config.local.damping if config.local.scaled_gd else None,
            perturbation=config.local.flat_lora,
        ),
        ranks=prepared.ranks,
        aggregate=make_aggregate(config.server),
        optimize=make_server_optimizer(config.server),
        denoise={"none": None, "shrinkage": "shrinkage", "kalman": KalmanFilter()}[config.server.denoise],
        average=RoundAverage(config.server.average) if config.server.average else None,
        scaffold=Scaffold(config.federation.clients) if config.local.scaffold else None,
    )
    if checkpoint is not None:
        server.round = checkpoint.round
        server.model.assign(checkpoint.adapter)
        server.model.merge(checkpoint.merged)
        server.recall(checkpoint.server_numbers, checkpoint.server_tensors)
        prepared.method.restore(checkpoint.method_numbers, checkpoint.method_tensors)
    return Federation(
        run=run,
        method=prepared.method,
        server=server,
        engine=engine,
        plans={},
        schedule=prepared.schedule,
        weighting=config.federation.weights,
        min_clients=config.federation.min_clients,
        secure_sum=config.federation.secure_sum,
    )


def _write_partition(prepared: Prepared, engine: LocalEngine, folder: Path) -> None:
    """Who has what, for research only: a private release must not carry counts that no noise covers."""
    task, privacy = prepared.task, prepared.config.privacy
    if not task.has_classes or (privacy != "none" and privacy.noise == "secure"):
        return
    named = task.owners if prepared.config.federation.partition in ("column", "files") else None
    parts = [client.records for client in engine.clients.values()]
    counts = label_counts(parts, task.label_names, None if named is None else named.names)
    write_atomically(folder / "partition.json", json.dumps(counts, ensure_ascii=False).encode())


def _one_round(prepared: Prepared, federation: Federation) -> dict[str, Any]:
    folder = prepared.config.folder
    started = time.perf_counter()
    traffic = federation.round()
    server = federation.server
    metrics: dict[str, Any] = {"round": server.round}
    last = server.round == server.rounds
    if last or server.round % prepared.config.federation.evaluate_every == 0:
        metrics |= _evaluate(prepared, federation)
    spent = [
        plan.epsilon(server.local_steps * sum(number in who for who in prepared.schedule[: server.round]))
        for number, plan in federation.plans.items()
        if plan.delta is not None
    ]
    metrics |= {"epsilon": max(spent)} if spent else {}
    metrics |= {
        "seconds": time.perf_counter() - started,
        "server_seconds": traffic.server_seconds,
        "participants": traffic.participants,
        "missing": traffic.missing,
        "bytes_up": traffic.bytes_up,
        "bytes_down": traffic.bytes_down,
    }
    decisions = {"round": server.round, "factors": traffic.factors} | prepared.method.decisions()
    append_line(folder / "decisions.jsonl", json.dumps(decisions))
    append_line(folder / "metrics.jsonl", json.dumps(metrics))
    save_checkpoint(
        folder / "checkpoint",
        Checkpoint(
            server.round, server.model.tensors, server.model.merged, *prepared.method.state(), *server.remembered()
        ),
    )
    return metrics


def _evaluate(prepared: Prepared, federation: Federation) -> dict[str, Any]:
    """On the public test set: of the global model, or of every client's own and their mean.

    Clients' own models that are not in this process are not evaluated.
    """
    config, model, server = prepared.config, prepared.model, federation.server
    if config.federation.private_test or server.round == server.rounds:
        federation.deliver(final=server.round == server.rounds)
    models = _models(prepared, federation)
    if not models:
        return {}
    model.merge(server.model.merged)
    found = []
    main = prepared.task.objective.metric
    for tensors in models.values():
        model.write(tensors)
        found.append(
            prepared.task.evaluate(model.peft_model, config.federation.pass_tokens(model.device.type), model.device)
        )
    mean = {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}
    own = {"client_scores": {number: metrics[main] for number, metrics in enumerate(found)}}
    return mean | {"metric": main, "score": mean[main]} | (own if prepared.method.personal else {})


def _models(prepared: Prepared, federation: Federation) -> dict[str, dict[str, Tensor]]:
    """Name -> tensors of every model that the method ends with and the server has.

    One, named "", or one for each client of this process.
    """
    tensors = federation.server.evaluated
    if not prepared.method.personal:
        return {"": tensors}
    personal = federation.engine.personal(federation.run)
    return {f"client-{number}": tensors | dict(own) for number, own in personal.items()}


def _finish(prepared: Prepared, federation: Federation) -> Result:
    config, folder = prepared.config, prepared.config.folder
    statement = privacy_statement(
        federation.plans,
        federation.engine.accounts(federation.run),
        None if config.privacy == "none" else config.privacy.epsilon,
        privacy_unit(config),
    )
    write_atomically(folder / "privacy.json", json.dumps(statement, indent=2).encode())
    # What every client has in common, where the rest of a model is with its client.
    models = _models(prepared, federation) or {"": federation.server.evaluated}
    export = Export(config.model, config.task.type, prepared.task.label_names, config.seed)
    with replaced_folder(folder / "adapter") as target:
        for name, tensors in models.items():
            prepared.model.write(tensors)
            path = f"adapter/{name}".rstrip("/")
            card = model_card(read_run(folder), f'import lorica\n\nmodel = lorica.load_adapter("{path}")')
            export_adapter(prepared.model, federation.server.model.merged, target / name, export, card)
    write_report(folder)
    return read_result(folder)


def _fewest_replies(federation: FederationConfig, participants: int) -> int:
    """How many clients' replies a round has at least."""
    if federation.min_clients is None:
        return participants
    if federation.min_clients > participants:
        raise UserError(
            "federation.min_clients",
            federation.min_clients,
            f"only {participants} clients take part in a round",
            f"choose at most {participants}",
        )
    return federation.min_clients


def _client_ranks(config: ExperimentConfig) -> dict[int, int]:
    own, federation = config.lora.client_ranks, config.federation
    if isinstance(own, list):
        if len(own) != federation.clients:
            raise UserError(
                "lora.client_ranks",
                own,
                f"{len(own)} ranks for {federation.clients} clients",
                "give one for each client",
            )
        if not all(1 <= rank <= config.lora.r for rank in own):
            raise UserError("lora.client_ranks", own, f"not all between 1 and lora.r = {config.lora.r}", "change them")
    return client_ranks(own, federation.clients, config.lora.r, config.seed)
