"""From a configuration to a finished run folder: prepare, run or resume, export, report."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import load_base, resolve_base, resolve_device
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
from lorica.federation import Federation, client_ranks, participation_schedule
from lorica.files import append_line, home_folder, replaced_folder, write_atomically
from lorica.local.step import LocalStep
from lorica.methods.base import Method, Server, make_method
from lorica.methods.pieces import check_pieces
from lorica.optimizers import learning_rates
from lorica.privacy.isolation import check_isolation
from lorica.privacy.ledger import Ledger, lifetime_epsilon
from lorica.privacy.plan import ClientPlan, plan_client
from lorica.privacy.statement import privacy_statement
from lorica.reporting.card import model_card
from lorica.reporting.html import write_report
from lorica.reporting.run_folder import read_run
from lorica.runs import claim_folder, keep_rounds, open_run
from lorica.streams import numpy_stream, stream_seed, torch_stream
from lorica.tasks import load_task
from lorica.tasks.groups import by_group
from lorica.tasks.label_counts import label_counts
from lorica.tasks.owners import first_source
from lorica.tasks.partition import BY_LABELS, partition
from lorica.tasks.records import Records, Task, evaluating

CHECKED_EXAMPLES = 3
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked; nothing has been released and no file written."""

    config: ExperimentConfig
    task: Task
    dataset: str
    model: AdaptedModel
    state: AdapterState
    method: Method
    parts: list[Records]
    private_tests: list[Records]
    schedule: list[list[int]]
    plans: dict[int, ClientPlan]
    ranks: dict[int, int]
    ledger_path: Path


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
        on_start: Callable[[Prepared, int], None] = lambda prepared, finished_rounds: None,
        on_round: Callable[[dict[str, Any]], None] = lambda metrics: None,
    ) -> Result:
        """Run to the end, resuming where an earlier run of the same configuration and name stopped.

        Args:
            on_start: called once everything is checked, with the number of rounds that are already finished.
            on_round: called with each round's metrics, the starting model's (round 0) first.

        Raises:
            UserError: before any budget is spent, for everything that the configuration or the data can get wrong.
        """
        folder = self.config.folder
        claim_folder(folder, self.config)
        if (folder / "adapter").is_dir() and (folder / "privacy.json").is_file():
            return read_result(folder)
        prepared = prepare(self.config)
        run = open_run(folder, self.config, str(prepared.model.device))
        _write_partition(prepared, folder)
        checkpoint = load_checkpoint(folder / "checkpoint")
        federation, clients = _assemble(prepared, run, checkpoint)
        _check_lifetime(prepared, clients, run)
        on_start(prepared, federation.server.round)
        keep_rounds(folder / "metrics.jsonl", federation.server.round)
        keep_rounds(folder / "decisions.jsonl", federation.server.round)
        if checkpoint is None:
            keep_rounds(folder / "metrics.jsonl", -1)
            metrics = {"round": 0} | _evaluate(prepared, federation, clients)
            append_line(folder / "metrics.jsonl", json.dumps(metrics))
            on_round(metrics)
        while federation.server.round < self.config.federation.rounds:
            metrics = _one_round(prepared, federation, clients, folder)
            on_round(metrics)
        return _finish(prepared, federation, clients, folder, run)


def prepare(config: ExperimentConfig) -> Prepared:
    """Load and check everything that can be checked without training.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    group = None if config.privacy == "none" else config.privacy.group
    held_out = config.federation.private_test
    if group is not None and held_out:
        reason = "a group is one record, and its records have a prediction each"
        raise UserError("federation.private_test", held_out, reason, "set it to 0")
    task = load_task(config.task, resolve_base(config.model.base), config.federation.by, group, held_out > 0)
    dataset = task.train.fingerprint()
    if config.privacy != "none" and group is not None:
        divided = config.federation.partition in ("column", "files")
        task = by_group(task, config.privacy.group_records, divided, stream_seed(config.seed, "groups"))
    device = resolve_device(config.model.device)
    if config.model.threads is not None:
        torch.set_num_threads(config.model.threads)
    base = load_base(config.model, config.task.type, task.label_names, config.seed)
    model = adapt(base, config.lora, config.model, config.seed, device, task.objective)
    state = AdapterState(model.sites, model.read())
    method = make_method(config.method, model.sites)
    federation = config.federation
    schedule = participation_schedule(federation.clients, federation.rounds, federation.participation, config.seed)
    ranks = _client_ranks(config)
    fewest = _fewest_replies(federation, len(schedule[0]))
    method.check(config.optimizer, fewest, federation.local_steps)
    check_pieces(config, method)
    check_aggregate(config.server, fewest)
    if federation.weights == "noise" and config.privacy == "none":
        raise UserError("federation.weights", "noise", "there is no noise without privacy", "choose uniform or records")
    if federation.partition in BY_LABELS and not task.has_classes:
        raise UserError(
            "federation.partition",
            federation.partition,
            f"it goes by labels, and {config.task.type} has none",
            "choose iid or quantity",
        )
    owners = None if task.owners is None else task.owners.of
    indices = partition(task.train.labels, federation, stream_seed(config.seed, "partition"), owners)
    parts = [task.train.subset(part) for part in indices]
    private_tests: list[Records] = []
    if federation.private_test:
        parts, private_tests = _held_out(parts, federation.private_test, config.seed)
    plans = {}
    for client, part in enumerate(parts):
        steps = federation.local_steps * sum(client in participants for participants in schedule)
        plans[client] = plan_client(client, len(part), federation.batch_size, steps, config.privacy)
        if config.privacy != "none" and config.privacy.delta >= 1 / len(part):
            logger.warning(
                "privacy.delta = %g is not below 1/%d, the inverse of client %d's records: publishing a random record "
                "would satisfy it. Choose a smaller privacy.delta.",
                config.privacy.delta,
                len(part),
                client,
            )
    ledger_path = _ledger_path(config, dataset)
    prepared = Prepared(
        config, task, dataset, model, state, method, parts, private_tests, schedule, plans, ranks, ledger_path
    )
    _check_isolation(prepared)
    method.start(state, config.seed)
    return prepared


def _held_out(parts: list[Records], share: float, seed: int) -> tuple[list[Records], list[Records]]:
    """Each client's records to train on, and those that it tests on: a public draw, at least one of each."""
    kept, held = [], []
    for client, part in enumerate(parts):
        order = numpy_stream(seed, "private-test", client).permutation(len(part))
        cut = min(max(1, round(share * len(part))), len(part) - 1)
        held.append(part.subset(np.sort(order[:cut])))
        kept.append(part.subset(np.sort(order[cut:])))
    return kept, held


def read_result(folder: Path) -> Result:
    """The result of a finished run, from its folder."""
    run = read_run(folder)
    return Result(folder, folder / "adapter", run.metrics, run.privacy or {})


def _assemble(prepared: Prepared, run: str, checkpoint: Checkpoint | None) -> tuple[Federation, dict[int, Client]]:
    config = prepared.config
    ledger = Ledger(prepared.ledger_path)
    clients = {
        number: Client(
            number=number,
            records=part,
            plan=prepared.plans[number],
            ledger=ledger,
            dataset=prepared.dataset,
            unit=_unit(config),
            seed=config.seed,
            micro_batch_tokens=_micro_batch_tokens(prepared),
        )
        for number, part in enumerate(prepared.parts)
    }
    server = Server(
        model=prepared.state,
        rounds=config.federation.rounds,
        terms={number: plan.terms for number, plan in prepared.plans.items()},
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
    federation = Federation(
        run=run,
        method=prepared.method,
        server=server,
        engine=LocalEngine(prepared.model, clients),
        plans=prepared.plans,
        schedule=prepared.schedule,
        weighting=config.federation.weights,
        min_clients=config.federation.min_clients,
    )
    return federation, clients


def _write_partition(prepared: Prepared, folder: Path) -> None:
    """Who has what, for research only: a private release must not carry counts that no noise covers."""
    task, privacy = prepared.task, prepared.config.privacy
    if not task.has_classes or (privacy != "none" and privacy.noise == "secure"):
        return
    named = task.owners if prepared.config.federation.partition in ("column", "files") else None
    counts = label_counts(prepared.parts, task.label_names, None if named is None else named.names)
    write_atomically(folder / "partition.json", json.dumps(counts, ensure_ascii=False).encode())


def _one_round(prepared: Prepared, federation: Federation, clients: dict[int, Client], folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    traffic = federation.round()
    server = federation.server
    metrics: dict[str, Any] = {"round": server.round}
    last = server.round == server.rounds
    if last or server.round % prepared.config.federation.evaluate_every == 0:
        metrics |= _evaluate(prepared, federation, clients)
    spent = [
        plan.epsilon(server.local_steps * sum(number in who for who in prepared.schedule[: server.round]))
        for number, plan in prepared.plans.items()
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


def _evaluate(prepared: Prepared, federation: Federation, clients: dict[int, Client]) -> dict[str, Any]:
    """On the public test set: of the global model, or of every client's own and their mean."""
    model = prepared.model
    model.merge(federation.server.model.merged)
    found = []
    main = prepared.task.objective.metric
    for tensors in _models(prepared, federation, clients).values():
        model.write(tensors)
        found.append(prepared.task.evaluate(model.peft_model, _micro_batch_tokens(prepared), model.device))
    _evaluate_privately(prepared, federation, clients)
    mean = {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}
    own = {"client_scores": {number: metrics[main] for number, metrics in enumerate(found)}}
    return mean | {"metric": main, "score": mean[main]} | (own if prepared.method.personal else {})


def _evaluate_privately(prepared: Prepared, federation: Federation, clients: dict[int, Client]) -> None:
    """Every owner's own test: a line in a file of the owner's, which nothing else reads."""
    model, tokens = prepared.model, _micro_batch_tokens(prepared)
    models = _models(prepared, federation, clients)
    for number, records in enumerate(prepared.private_tests):
        model.write(models.get(f"client-{number}") or models[""])
        with evaluating(model.peft_model):
            metrics = prepared.task.objective.evaluate(model.peft_model, records, tokens, model.device)
        line = {"run": federation.run, "client": number, "round": federation.server.round} | metrics
        append_line(private_metrics_path(prepared.ledger_path), json.dumps(line))


def private_metrics_path(ledger: Path) -> Path:
    """Where an owner's own test results are: beside the ledger."""
    return ledger.with_name(f"{ledger.name.removesuffix('.sqlite').removesuffix('.ledger')}.private-metrics.jsonl")


def _models(prepared: Prepared, federation: Federation, clients: dict[int, Client]) -> dict[str, dict[str, Tensor]]:
    """Name -> tensors of every model that the method ends with: one, named "", or one for each client."""
    tensors = federation.server.evaluated
    if not prepared.method.personal:
        return {"": tensors}
    return {f"client-{number}": tensors | client.personal(federation.run) for number, client in clients.items()}


def _micro_batch_tokens(prepared: Prepared) -> int:
    configured = prepared.config.federation.micro_batch_tokens
    return configured or (1024 if prepared.model.device.type == "cpu" else 32768)


def _finish(prepared: Prepared, federation: Federation, clients: dict[int, Client], folder: Path, run: str) -> Result:
    config = prepared.config
    statement = privacy_statement(
        prepared.plans,
        {number: client.records.fingerprint() for number, client in clients.items()},
        Ledger(prepared.ledger_path),
        prepared.dataset,
        run,
        None if config.privacy == "none" else config.privacy.epsilon,
        _unit(config),
    )
    write_atomically(folder / "privacy.json", json.dumps(statement, indent=2).encode())
    models = _models(prepared, federation, clients)
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


def _check_isolation(prepared: Prepared) -> None:
    """Per-example gradients of a few public examples, at random factors: at `B = 0`, `A` would have no gradient."""
    model, config = prepared.model, prepared.config
    draws = torch_stream(config.seed, "isolation")
    model.write(
        {name: 0.1 * torch.randn(value.shape, generator=draws) for name, value in prepared.state.tensors.items()}
    )
    indices = np.arange(min(CHECKED_EXAMPLES, len(prepared.task.test)))
    batch = next(iter(prepared.task.test.micro_batches(indices, 10**9))).to(model.device)
    tolerance = 1e-3 if config.model.precision == "fp32" else 0.2
    check_isolation(model.peft_model, model.losses, model.tensors, batch, tolerance)


def _check_lifetime(prepared: Prepared, clients: dict[int, Client], run: str) -> None:
    privacy = prepared.config.privacy
    if privacy == "none" or privacy.max_lifetime_epsilon is None or privacy.noise != "secure":
        return
    for number, client in clients.items():
        plan = prepared.plans[number]
        remaining = plan.steps(plan.max_steps - client.ledger.steps(run, number))
        life = lifetime_epsilon(
            client.ledger.releases(client.dataset),
            client.records.fingerprint(),
            privacy.delta,
            remaining,
            client.unit,
        )
        if life > privacy.max_lifetime_epsilon:
            raise UserError(
                "privacy.max_lifetime_epsilon",
                privacy.max_lifetime_epsilon,
                f"with this run, client {number} would have released ε = {life:.3f} in all",
                "lower privacy.epsilon, run fewer rounds, or raise the limit",
            )


def _unit(config: ExperimentConfig) -> str:
    privacy = config.privacy
    if privacy == "none" or privacy.group is None:
        return "record"
    return f"group {privacy.group}, at most {privacy.group_records} records"


def _ledger_path(config: ExperimentConfig, dataset: str) -> Path:
    """Beside the training data; for data without a place of its own, under Lorica's home."""
    if config.privacy != "none" and config.privacy.ledger is not None:
        return Path(config.privacy.ledger).expanduser()
    train = first_source(config.task.train)
    # A run without privacy has no budget to keep, so it may go on where the data's folder is read-only.
    if train.exists() and (config.privacy != "none" or os.access(train.absolute().parent, os.W_OK)):
        return train.with_name(train.name + ".ledger.sqlite")
    return home_folder() / "ledgers" / f"{dataset[:16]}.sqlite"
