"""A federation in one process, with one base model shared by all clients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.base_files import resolve_base
from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.messages import Projection, Request, Training
from lorica.owner.client import Client
from lorica.owner.setup import by_privacy_unit, divide, hold_out, ledger_path, make_client
from lorica.privacy.ledger import Ledger
from lorica.privacy.lifetime import history
from lorica.privacy.plan import ClientPlan, Refused, plan_run
from lorica.privacy.statement import Account, account
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

    Attributes:
        clients: number -> client.
        max_lifetime_epsilon: limit of each owner over all runs on the same data; None for no limit.
    """

    def __init__(
        self, model: AdaptedModel, clients: Mapping[int, Client], max_lifetime_epsilon: float | None = None
    ) -> None:
        self._model = model
        self.clients = clients
        self.max_lifetime_epsilon = max_lifetime_epsilon
        self._parts: dict[int, Part] = {}
        self._reserved: set[str] = set()

    @property
    def ledger(self) -> str:
        return ", ".join(sorted({str(client.ledger.path) for client in self.clients.values()}))

    def join(self, run: str) -> dict[int, ClientPlan]:
        """All clients. Their ledgers reserve the budget of the whole run.

        Raises:
            UserError: the run would exceed an owner's limit, reservations of other runs included, or it started with
                other records.
        """
        if run not in self._reserved:
            try:
                for client in self.clients.values():
                    client.check_records(run)
                    client.reserve(run, lambda _, client=client: self._check_lifetime(client, run))  # type: ignore[misc]
            except UserError:
                for client in self.clients.values():
                    client.ledger.end(run, client.number)
                raise
            self._reserved.add(run)
        return {number: client.plan for number, client in self.clients.items()}

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        """Each client's reply to its request, computed in the order of client ids."""
        return {number: self._reply(number, requests[number]) for number in sorted(requests)}

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
        return {
            number: account(client.ledger, client.dataset, client.records.fingerprint(), run, client.plan, client.unit)
            for number, client in self.clients.items()
        }

    def personal(self, run: str, round_number: int) -> dict[int, dict[str, Tensor]]:
        """Each client's personal tensors after a round (`Client.personal`)."""
        return {number: client.personal(run, round_number) for number, client in self.clients.items()}

    def _check_lifetime(self, client: Client, run: str) -> None:
        plan, limit = client.plan, self.max_lifetime_epsilon
        if limit is None or plan.noise != "secure" or plan.delta is None:
            return
        remaining = plan.steps(plan.max_steps - client.ledger.steps(run, client.number))
        if remaining.count == 0:
            # All of it is released: only the run's last files may be missing.
            return
        found = history(client.ledger, client.dataset, client.records.fingerprint())
        life = found.above(limit, plan.delta, (run, client.number), remaining, client.unit)
        if life is None:
            return
        problem = f"with this run, the total ε of client {client.number} would be {life:.3f}"
        remedy = "lower privacy.epsilon, run fewer rounds, or raise privacy.max_lifetime_epsilon"
        holders = sorted({one.run for one in found.holders(run)})
        if holders:
            problem += f", including reservations of run {', '.join(holders)}"
            remedy += (
                "; or finish that run, or release its reservation: "
                f"lorica budget {client.ledger.path} --release {holders[0]}"
            )
        raise UserError("privacy.max_lifetime_epsilon", limit, problem, remedy)


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
    parts = [hold_out(config, part) for part in divide(config, task)]
    plans = [plan_run(config, client, len(records)) for client, (records, _) in enumerate(parts)]
    ledger = open_ledger(ledger_path(config, dataset))
    clients = {
        plan.client: make_client(config, plan, records, private_test, ledger, dataset)
        for plan, (records, private_test) in zip(plans, parts, strict=True)
    }
    prepared = replace(prepared, partition=_shown_partition(config, task, [records for records, _ in parts]))
    return prepared, LocalEngine(prepared.model, clients, config.privacy.max_lifetime_epsilon)


def _shown_partition(config: ExperimentConfig, task: Task, parts: list[Records]) -> dict[str, Any] | None:
    """Label counts per client, for research runs only: a private release must not contain exact counts."""
    if not task.has_classes or config.privacy.noise == "secure":
        return None
    named = task.owners if config.federation.partition in ("column", "files") else None
    return label_counts(parts, task.label_names, None if named is None else named.names)
