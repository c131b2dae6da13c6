"""Run the remaining rounds over any engine and write their results to the run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lorica.adapters.export import Export, export_adapter
from lorica.adapters.loading_section import loading_section
from lorica.adapters.memory import pass_tokens
from lorica.aggregation.averaging import RoundAverage
from lorica.aggregation.denoising import make_denoiser
from lorica.aggregation.robust import make_aggregate
from lorica.aggregation.scaffold import Scaffold
from lorica.aggregation.server_optimizers import make_server_optimizer
from lorica.files import append_line, replaced_folder, to_json, write_atomically, write_errors
from lorica.local.optimizers import learning_rates
from lorica.local.step import LocalStep
from lorica.methods.server import Server
from lorica.privacy.spent import Spent
from lorica.privacy.statement import privacy_statement
from lorica.privacy.unit import PrivacyUnit
from lorica.reporting.card import model_card
from lorica.reporting.checksums import CHECKSUMS, write_checksums
from lorica.reporting.html import write_report
from lorica.reporting.run_folder import read_run
from lorica.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lorica.run.divergence import check_finite, check_metrics, warn_of_growth
from lorica.run.folder import keep_rounds, open_run
from lorica.run.progress import Progress
from lorica.run.result import Result, read_result
from lorica.run.setup import Prepared, server_steps
from lorica.server.federation import Engine, Federation

OnStart = Callable[[Prepared, Federation, int], None]
OnOpen = Callable[[str, int], None]


def conduct(
    prepared: Prepared,
    engine: Engine,
    data: dict[str, str],
    on_start: OnStart,
    on_round: Callable[[dict[str, Any]], None],
) -> Result:
    """Run the remaining rounds over an engine and write everything to the run folder, with the report.

    The report is there from the first round on, and `report_to` is told of each round. Arguments are those of `train`.

    Raises:
        UserError: as `train`, or a tracker cannot be used.
    """
    with Progress(prepared) as progress:

        def after(row: dict[str, Any]) -> None:
            progress.round(row)
            on_round(row)

        result = train(prepared, engine, data, on_start, after, progress.open)
        write_report(result.folder)
        return result


def train(
    prepared: Prepared,
    engine: Engine,
    data: dict[str, str],
    on_start: OnStart = lambda prepared, federation, finished_rounds: None,
    on_round: Callable[[dict[str, Any]], None] = lambda metrics: None,
    on_open: OnOpen = lambda run, finished: None,
) -> Result:
    """Run the remaining rounds over an engine and write everything to the run folder, except for the report.

    Call it under the lock of the run folder (`lorica.run.lock`).

    Args:
        data: fingerprints of the data (`lorica.run.data`), taken before they were read.
        on_start: called once the clients have joined, with the number of rounds already finished.
        on_round: called with the line of metrics.jsonl of each round, once there is a checkpoint of it.
        on_open: called before the clients are asked to join, with the id of the run and the last round in
            metrics.jsonl, -1 if there is none.

    Raises:
        UserError: the run exceeds a client's budget, too few clients take part, the run diverges, or a file of the run
            folder is damaged.
    """
    config, folder = prepared.config, prepared.config.folder
    run = open_run(folder, config, str(prepared.model.device), data, prepared.start)
    with write_errors(folder / CHECKSUMS):
        (folder / CHECKSUMS).unlink(missing_ok=True)
    if prepared.partition is not None:
        write_atomically(folder / "partition.json", json.dumps(prepared.partition, ensure_ascii=False).encode())
    checkpoint = load_checkpoint(folder / "checkpoint")
    federation = assemble(prepared, engine, run, checkpoint)
    finished = federation.server.round
    keep_rounds(folder / "metrics.jsonl", 0, -1 if checkpoint is None else finished)
    keep_rounds(folder / "decisions.jsonl", 1, finished)
    on_open(run, -1 if checkpoint is None else finished)
    federation.join()
    on_start(prepared, federation, finished)
    if checkpoint is None:
        metrics = {"round": 0} | _evaluate(prepared, federation)
        append_line(folder / "metrics.jsonl", to_json(metrics))
        on_round(metrics)
    if finished == config.federation.rounds:
        # The run was stopped after its last round, and joining has reserved its budget again: deliver once more.
        metrics = {"round": finished} | _evaluate(prepared, federation)
        if not (folder / "metrics.jsonl").is_file():
            append_line(folder / "metrics.jsonl", to_json(metrics))
    steps = prepared.method.client_level if config.privacy.unit == "client" else federation.server.local_steps
    spent = Spent(prepared.schedule[:finished], steps)
    while federation.server.round < config.federation.rounds:
        on_round(_one_round(prepared, federation, spent))
    return _finish(prepared, federation)


def assemble(prepared: Prepared, engine: Engine, run: str, checkpoint: Checkpoint | None = None) -> Federation:
    """The server of a run, from its start or from a checkpoint.

    Args:
        run: id under which the ledger records the run.
    """
    config = prepared.config
    optimizer, local_steps = server_steps(config)
    server = Server(
        model=prepared.state,
        rounds=config.federation.rounds,
        terms={},
        optimizer=optimizer,
        local_steps=local_steps,
        full_rates=learning_rates(optimizer, list(prepared.state.tensors)),
        seed=config.seed,
        local=LocalStep() if config.privacy.unit == "client" else LocalStep.of(config.local),
        ranks=prepared.ranks,
        aggregate=make_aggregate(config.server),
        optimize=make_server_optimizer(config.server),
        denoise=make_denoiser(config.server),
        average=RoundAverage(config.server.average) if config.server.average else None,
        scaffold=Scaffold(config.federation.clients) if config.local.scaffold else None,
    )
    if checkpoint is not None:
        server.round = checkpoint.round
        server.model.assign(checkpoint.adapter)
        server.model.merged = dict(checkpoint.merged)
        server.load_state_dict(checkpoint.server)
        prepared.method.load_state_dict(checkpoint.method)
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
        trusted=config.privacy.unit == "client",
    )


def _one_round(prepared: Prepared, federation: Federation, spent: Spent) -> dict[str, Any]:
    folder = prepared.config.folder
    started = time.perf_counter()
    traffic = federation.round()
    server = federation.server
    rate = prepared.config.optimizer.lr
    check_finite(rate, server.round, server.model.tensors, server.model.merged)
    check_finite(rate, server.round, server.evaluated, {})
    metrics: dict[str, Any] = {"round": server.round}
    last = server.round == server.rounds
    if last or server.round % prepared.config.federation.evaluate_every == 0:
        metrics |= _evaluate(prepared, federation)
    metrics |= spent.add(prepared.schedule[server.round - 1], federation.plans)
    metrics |= {"seconds": time.perf_counter() - started, "server_seconds": traffic.server_seconds}
    if prepared.config.privacy.unit != "client":
        # The guarantee of client-level DP counts on it that nobody knows who took part.
        metrics |= {
            "participants": traffic.participants,
            "missing": traffic.missing,
            "bytes_up": traffic.bytes_up,
            "bytes_down": traffic.bytes_down,
        }
    decisions = {"round": server.round, "factors": traffic.factors} | prepared.method.decisions()
    append_line(folder / "decisions.jsonl", to_json(decisions))
    append_line(folder / "metrics.jsonl", to_json(metrics))
    save_checkpoint(
        folder / "checkpoint",
        Checkpoint(
            server.round,
            server.model.tensors,
            server.model.merged,
            prepared.method.state_dict(),
            server.state_dict(),
        ),
    )
    return metrics


def _evaluate(prepared: Prepared, federation: Federation) -> dict[str, Any]:
    """Metrics on the public test set, of the global model or of each client's own model and their mean.

    Personal models of clients outside this process are not evaluated. The model is then delivered to the clients, if
    they test it privately or if it is the final one.

    Raises:
        Diverged: a metric is not finite.
    """
    metrics, server = _metrics(prepared, federation), federation.server
    # After the server's own test: a model that has diverged is not delivered.
    if prepared.config.federation.private_test or server.round == server.rounds:
        federation.deliver(final=server.round == server.rounds)
    return metrics


def _metrics(prepared: Prepared, federation: Federation) -> dict[str, Any]:
    config, model, server = prepared.config, prepared.model, federation.server
    models = _models(prepared, federation)
    if not models:
        return {}
    model.merge(server.model.merged)
    tokens = pass_tokens(config.federation.micro_batch_tokens, model.peft_model, model.device)
    found = []
    main = prepared.task.objective.metric
    for tensors in models.values():
        model.write(tensors)
        found.append(prepared.task.evaluate(model.peft_model, tokens, model.device))
    mean = {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}
    check_metrics(config.optimizer.lr, server.round, mean)
    own = {"client_scores": {number: metrics[main] for number, metrics in enumerate(found)}}
    return mean | {"metric": main, "score": mean[main]} | (own if prepared.method.personal else {})


def _models(prepared: Prepared, federation: Federation) -> dict[str, dict[str, Tensor]]:
    """Name -> tensors of each final model that is available to the server.

    Either the global model, named "", or one model for each client of this process.
    """
    tensors = federation.server.evaluated
    if not prepared.method.personal:
        return {"": tensors}
    personal = federation.engine.personal(federation.run, federation.server.round)
    return {f"client-{number}": tensors | dict(own) for number, own in personal.items()}


def _finish(prepared: Prepared, federation: Federation) -> Result:
    config, folder = prepared.config, prepared.config.folder
    statement = privacy_statement(
        federation.plans,
        federation.engine.accounts(federation.run),
        config.privacy.epsilon,
        PrivacyUnit.of(config.privacy),
        prepared.task.overlap,
        prepared.start,
    )
    write_atomically(folder / "privacy.json", to_json(statement, indent=2).encode())
    # If the personal models stay with their clients, export the tensors that all clients share.
    models = _models(prepared, federation) or {"": federation.server.evaluated}
    export = Export(config.model, config.task, prepared.task.label_names, config.seed)
    with replaced_folder(folder / "adapter") as target:
        for name, tensors in models.items():
            prepared.model.write(tensors)
            path = f"adapter/{name}".rstrip("/")
            card = model_card(read_run(folder), loading_section(export, path))
            export_adapter(prepared.model, federation.server.model.merged, target / name, export, card)
    write_checksums(folder)
    result = read_result(folder)
    warn_of_growth(result.metrics)
    return result
