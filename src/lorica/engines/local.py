"""A federation in one process, with one base model shared by all clients."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.base_files import resolve_base
from lorica.adapters.state import AdapterState, earlier_ranks, leading
from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.messages import Delivery, Projection, Request, Training
from lorica.owner.client import Client
from lorica.owner.setup import by_privacy_unit, divide, hold_out, ledger_path, make_client, make_cohort
from lorica.privacy.ledger import Ledger
from lorica.privacy.lifetime import History, histories
from lorica.privacy.plan import ClientPlan, Refused, plan_cohort, plan_run
from lorica.privacy.statement import Account, accounts_of
from lorica.run.divergence import check_finite
from lorica.run.setup import Prepared, prepare
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.requirements import Requirements
from lorica.secure_sum.setup import SummationError
from lorica.secure_sum.stages import Input, Part, add_up, run_client_stage
from lorica.tasks.label_counts import label_counts
from lorica.tasks.loading import load_task
from lorica.tasks.overlap import check_sources, overlap
from lorica.tasks.records import Records, Task
from lorica.tensors import decode

logger = logging.getLogger(__name__)


class LocalEngine:
    """Runs the clients one after another. Each writes its tensors into the shared model in place.

    A client that sits a round out forgets what the server sent it, so that memory does not grow with the number of
    clients; before its next request it gets the same tensors back from the server's state.

    Attributes:
        clients: number -> client.
        max_lifetime_epsilon: limit of each owner over all runs on the same data; None for no limit.

    Args:
        state: the server's adapter.
    """

    def __init__(
        self,
        model: AdaptedModel,
        state: AdapterState,
        clients: Mapping[int, Client],
        max_lifetime_epsilon: float | None = None,
    ) -> None:
        self._model, self._state = model, state
        self.clients = clients
        self.max_lifetime_epsilon = max_lifetime_epsilon
        self._joined: dict[str, dict[int, ClientPlan]] = {}
        self._parts: dict[int, Part] = {}
        self._last_rounds: dict[int, int] = {}

    @property
    def ledger(self) -> str:
        return ", ".join(sorted(str(ledger.path) for ledger in self._ledgers()))

    def _ledgers(self) -> dict[Ledger, list[Client]]:
        """Ledger -> its clients: one, unless the clients were made with several."""
        found: dict[Ledger, list[Client]] = {}
        for client in self.clients.values():
            found.setdefault(client.ledger, []).append(client)
        return found

    def join(self, run: str) -> dict[int, ClientPlan]:
        """All clients. Their ledgers reserve the budget of the whole run.

        Raises:
            UserError: the run would exceed an owner's limit, reservations of other runs included, or it started with
                other records.
        """
        if run not in self._joined:
            try:
                for ledger, clients in self._ledgers().items():
                    _reserve(ledger, clients, run, self.max_lifetime_epsilon)
            except UserError:
                for ledger in self._ledgers():
                    ledger.end(run)
                raise
            self._joined[run] = {number: client.plan for number, client in self.clients.items()}
        return self._joined[run]

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        """Each client's reply to its request, computed in the order of client ids."""
        deliveries = {number: one.work for number, one in requests.items() if isinstance(one.work, Delivery)}
        if deliveries:
            return self._deliver(requests, deliveries)
        self._remind(requests)
        return {number: self._reply(number, requests[number]) for number in sorted(requests)}

    def _deliver(
        self, requests: Mapping[int, Request], deliveries: Mapping[int, Delivery]
    ) -> dict[int, dict[str, Tensor]]:
        """As each client's `reply_to`, with one write to the ledger for all of them."""
        first = next(iter(requests.values()))
        if deliveries[first.client].final:
            for ledger in self._ledgers():
                ledger.end(first.run)
        for number, work in sorted(deliveries.items()):
            self.clients[number].test_privately(self._model, requests[number], work)
        return {number: {} for number in deliveries}

    def _remind(self, requests: Mapping[int, Request]) -> None:
        """Let the clients that sat the last round out forget the server's tensors, and remind them when they are asked.

        A request brings all tensors that have changed since the client's last one, so the others are the server's own.
        """
        for number, request in requests.items():
            client = self.clients[number]
            if client.sequence is None and request.sequence > 0:
                rank = request.work.rank if isinstance(request.work, Training) else None
                client.held = {name: leading(name, value, rank) for name, value in self._state.tensors.items()}
                client.merged = {} if request.restart else earlier_ranks(self._state, request.increments)
                client.sequence = request.sequence - 1
            self._last_rounds[number] = request.round
        current = max(request.round for request in requests.values())
        for number in [number for number, last in self._last_rounds.items() if last < current]:
            self.clients[number].forget()
            del self._last_rounds[number]

    def _reply(self, number: int, request: Request, agreement: Agreement | None = None) -> dict[str, Tensor]:
        """One client's reply.

        Raises:
            UserError: the client refuses, its ledger is damaged, or the reply is not finite.
        """
        client = self.clients[number]
        try:
            content = client.reply_to(self._model, request, agreement)
        except Refused as refusal:
            raise UserError(
                "privacy.ledger",
                str(client.ledger.path),
                f"the ledger does not allow this run to go on ({refusal})",
                "set name to a new run; what this one has released stays charged",
            ) from refusal
        reply = decode(content)
        if isinstance(request.work, Training):
            check_finite(request.work.optimizer.lr, request.round, reply, {})
        return reply

    def sum(self, requests: Mapping[int, Request], agreement: Agreement) -> tuple[list[int], dict[str, Tensor]]:
        """Sum the replies with the same protocol as in a federation across machines."""

        def ask(stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
            answers = {}
            for number in sorted(questions):
                try:
                    answers[number] = self._run_stage(number, requests[number], questions[number])
                except SummationError as error:
                    logger.warning("client %d refuses: %s", number, error)
            return answers

        self._remind(requests)
        return add_up(agreement, ask)

    def _run_stage(self, number: int, request: Request, question: str) -> bytes:
        def given(agreement: Agreement) -> Input:
            derived = isinstance(request.work, Projection)
            return Input(self._reply(number, request, agreement), derived)

        shared = self.clients[number].plan.shared
        required = Requirements(request.run, number)
        if shared is not None:
            required = replace(required, min_clients=shared.min_clients)
        part = self._parts.get(number, Part())
        self._parts[number], content = run_client_stage(part, required, question, given)
        return content

    def accounts(self, run: str) -> dict[int, Account]:
        """Each client's account of this run, from its ledger."""
        found: dict[int, Account] = {}
        for ledger, clients in self._ledgers().items():
            plans = {client.number: client.plan for client in clients}
            records = {client.number: client.records.fingerprint() for client in clients}
            found |= accounts_of(ledger, clients[0].dataset, run, plans, records, clients[0].unit)
        return dict(sorted(found.items()))

    def personal(self, run: str, round_number: int) -> dict[int, dict[str, Tensor]]:
        """Each client's personal tensors after a round (`Client.personal`)."""
        return {number: client.personal(run, round_number) for number, client in self.clients.items()}


def _reserve(ledger: Ledger, clients: list[Client], run: str, limit: float | None) -> None:
    """Reserve the budgets of a run's clients in their ledger, unless one of them would exceed its lifetime's limit."""
    datasets = ledger.datasets(run)
    for client in clients:
        client.check_records(run, datasets.get(client.number, set()))
    ledger.introduce({client.records.fingerprint(): client.records.tags for client in clients})
    ledger.introduce_run(run, clients[0].run_name)
    reservations = [one for client in clients if (one := client.reservation(run)) is not None]
    if reservations:
        ledger.reserve(reservations, lambda _: _check_lifetimes(ledger, clients, run, limit))


def _check_lifetimes(ledger: Ledger, clients: list[Client], run: str, limit: float | None) -> None:
    if limit is None:
        return
    charged = ledger.charged(run)
    found = histories(ledger, clients[0].dataset, {client.records.fingerprint() for client in clients})
    for client in clients:
        plan = client.plan
        remaining = plan.steps(plan.max_steps - charged.get(client.number, (0, 0))[0])
        if plan.delta is None or remaining.count == 0:
            # All of it is released: only the run's last files may be missing.
            continue
        history = found[client.records.fingerprint()]
        life = history.above(limit, plan.delta, (run, client.number), remaining, client.unit)
        if life is not None:
            raise _beyond(limit, life, history, run, client)


def _beyond(limit: float, life: float, history: History, run: str, client: Client) -> UserError:
    problem = f"with this run, the total ε of client {client.number} would be {life:.3f}"
    remedy = "lower privacy.epsilon, run fewer rounds, or raise privacy.max_lifetime_epsilon"
    holders = sorted({(one.run, client.ledger.file_of(one.ledger)) for one in history.holders(run)})
    if holders:
        names = client.ledger.run_names()
        listed = [f"{names[held]} ({held:.8})" if held in names else held[:8] for held, _ in holders]
        problem += f", including what is reserved for run {', '.join(listed)}"
        commands = [f"lorica budget {shlex.quote(str(file))} --release {held:.8}" for held, file in holders]
        remedy += f"; or finish what has reserved it, or release that: {' and '.join(commands)}"
    return UserError("privacy.max_lifetime_epsilon", limit, problem, remedy)


def prepare_local(
    config: ExperimentConfig, open_ledger: Callable[[Path], Ledger] = Ledger
) -> tuple[Prepared, LocalEngine]:
    """Set up a federation in this process, and check everything that can be checked without training.

    Args:
        open_ledger: opens the owners' ledger.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    check_sources(config.task)
    tested = config.federation.private_test > 0
    task = load_task(config.task, resolve_base(config.model.base), config.federation.by, config.privacy.group, tested)
    task = replace(task, overlap=overlap(config.task, task))
    # The ledger identifies a data set by its records, whatever the unit of privacy.
    dataset = task.train.fingerprint()
    task = by_privacy_unit(config, task)
    prepared = prepare(config, task)
    if config.privacy.unit == "client":
        members, plan = divide(config, task), plan_cohort(config, prepared.method.client_level)
        ledger = open_ledger(ledger_path(config, dataset))
        return prepared, LocalEngine(
            prepared.model,
            prepared.state,
            {0: make_cohort(config, plan, task.train, members, ledger, dataset)},
            config.privacy.max_lifetime_epsilon,
        )
    parts = [hold_out(config, part) for part in divide(config, task)]
    plans = [plan_run(config, client, len(records)) for client, (records, _) in enumerate(parts)]
    ledger = open_ledger(ledger_path(config, dataset))
    clients = {
        plan.client: make_client(config, plan, records, private_test, ledger, dataset)
        for plan, (records, private_test) in zip(plans, parts, strict=True)
    }
    prepared = replace(prepared, partition=_shown_partition(config, task, [records for records, _ in parts]))
    return prepared, LocalEngine(prepared.model, prepared.state, clients, config.privacy.max_lifetime_epsilon)


def _shown_partition(config: ExperimentConfig, task: Task, parts: list[Records]) -> dict[str, Any] | None:
    """Label counts per client, for research runs only: a private release must not contain exact counts."""
    if not task.has_classes or config.privacy.noise == "secure":
        return None
    named = task.owners if config.federation.partition in ("column", "files") else None
    return label_counts(parts, task.label_names, None if named is None else named.names)
