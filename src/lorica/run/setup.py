"""Load and check the server's side of a run before anything is released or written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.loading import check_isolated, load_model
from lorica.adapters.start import read_start
from lorica.adapters.state import AdapterState
from lorica.aggregation.robust import check_aggregate
from lorica.config import ExperimentConfig, FederationConfig, OptimizerConfig
from lorica.errors import UserError
from lorica.methods.base import Method, make_method
from lorica.methods.components import check_components
from lorica.run.checkpoint import has_checkpoint
from lorica.run.folder import started_from
from lorica.schedule import client_ranks, participation_schedule
from lorica.tasks.records import Task
from lorica.tracking.base import Tracker, find_trackers


@dataclass(frozen=True)
class Prepared:
    """The server's side of a run after all checks; nothing has been released or written yet.

    Attributes:
        state: the global adapter.
        schedule: participants of each round; index 0 is round 1.
        ranks: client -> rank of its factors; empty if all clients use the full rank.
        partition: label counts of each simulated client (`partition.json`), if they may be shown.
        start: name and SHA-256 of the adapter that the run starts from (`lora.start`); None for a new adapter.
        trackers: name -> class of those in `report_to`.
    """

    config: ExperimentConfig
    task: Task
    model: AdaptedModel
    state: AdapterState
    method: Method
    schedule: list[list[int]]
    ranks: dict[int, int]
    partition: dict[str, Any] | None = None
    start: dict[str, str] | None = None
    trackers: dict[str, type[Tracker]] = field(default_factory=dict)


def prepare(config: ExperimentConfig, task: Task) -> Prepared:
    """Load and check the server's side.

    Args:
        task: the server uses only its public test sets.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    trackers = find_trackers(config.report_to)
    model = load_model(config, task)
    state = AdapterState(model.sites, model.read(), model.frozen_weight)
    method = make_method(config.method, model.sites)
    federation = config.federation
    if config.privacy.unit == "client":
        # The clients are one owner to the server, which samples them in secret.
        schedule = [[0]] * federation.rounds
    else:
        schedule = participation_schedule(federation.clients, federation.rounds, federation.participants, config.seed)
    ranks = _client_ranks(config)
    check_method(config, method)
    apart = config.engine == "flower" and config.flower.superlink is not None
    if apart and federation.weights != "uniform" and federation.max_records is None:
        raise UserError(
            "federation.max_records",
            None,
            f"with federation.weights = {federation.weights}, the weight of a client depends on the number of records "
            "that it declares, which is not limited",
            "set federation.max_records to the largest number of records of an owner, or to a list of registered "
            "numbers, or set federation.weights=uniform",
        )
    start = _begin(config, task, model, state, method.merges)
    check_isolated(config, model, task.test)
    method.start(state, config.seed)
    return Prepared(config, task, model, state, method, schedule, ranks, start=start, trackers=trackers)


def server_steps(config: ExperimentConfig) -> tuple[OptimizerConfig, int]:
    """Optimiser and number of local steps as the server sees them.

    With `privacy.unit: client` the mean update itself is released: one step of rate 1.
    """
    if config.privacy.unit == "client":
        return OptimizerConfig(lr=1.0), 1
    return config.optimizer, config.federation.local_steps


def check_method(config: ExperimentConfig, method: Method) -> None:
    """Check that the method supports everything that the experiment combines it with.

    Raises:
        UserError: it does not, or too few clients take part.
    """
    federation = config.federation
    fewest = _fewest_replies(federation, federation.participants)
    # With a secure sum, and with client-level DP, the server sees one combined reply.
    single = federation.secure_sum or config.privacy.unit == "client"
    optimizer, local_steps = server_steps(config)
    method.check(optimizer, 1 if single else fewest, local_steps)
    check_components(config, method)
    check_aggregate(config.server, fewest)


def _begin(
    config: ExperimentConfig, task: Task, model: AdaptedModel, state: AdapterState, merges: bool
) -> dict[str, str] | None:
    """Move a new adapter to `lora.start`. A run that resumes from a checkpoint can do without the folder."""
    folder = config.lora.start
    if folder is None:
        return None
    recorded = started_from(config.folder)
    if recorded is not None and has_checkpoint(config.folder / "checkpoint") and not Path(folder).expanduser().exists():
        return recorded
    start = read_start(config, model, task.label_names, merges)
    start.apply(state, merges)
    return {"name": start.name, "sha256": start.sha256}


def _fewest_replies(federation: FederationConfig, participants: int) -> int:
    """The minimum number of replies in a round."""
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
                "give one rank for each client",
            )
        if not all(1 <= rank <= config.lora.r for rank in own):
            problem = "a rank is out of range"
            raise UserError("lora.client_ranks", own, problem, f"choose ranks from 1 to lora.r = {config.lora.r}")
    return client_ranks(own, federation.clients, config.lora.r, config.seed)
