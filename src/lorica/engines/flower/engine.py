"""Send requests and receive replies as Flower messages over a `Grid`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from torch import Tensor

from lorica.adapters.state import AdapterState
from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.messages import LARGEST_COUNT, Delivery, Invitation, Request, Training, decode_account, decode_plan
from lorica.privacy.plan import ClientPlan, plan_run
from lorica.privacy.statement import Account
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.stages import INPUT, add_up
from lorica.server.reply_checks import reply_shapes
from lorica.tensors import decode

RECORD = "lorica"
POLL_SECONDS = 0.2
logger = logging.getLogger(__name__)


class FlowerEngine:
    """Sends each client's requests to its node.

    Answers of nodes are not trusted. The server computes each plan itself, compares each account with the plan and the
    replies, and rejects replies that are longer than requested. A bad answer removes its client from the round and has
    no other effect.

    Args:
        config: the experiment as sent to the nodes.
        base: hash of the server's base model.
        state: the global adapter.
    """

    ledger = "with each owner"

    def __init__(self, grid: Grid, config: ExperimentConfig, base: str, state: AdapterState) -> None:
        self._grid, self._config, self._base, self._state = grid, config, base, state
        self._nodes: dict[int, int] = {}
        self._plans: dict[int, ClientPlan] = {}
        self._accounts: dict[int, Account] = {}
        self._paid: dict[int, Account] = {}
        self._invited: dict[str, int] = {}
        self._declined: dict[int, str] = {}

    def join(self, run: str) -> dict[int, ClientPlan]:
        """Invite the nodes that have not joined yet, and add those that accepted.

        The first call waits until all `federation.clients` have joined, at most `flower.wait` seconds. Later calls do
        not wait: a late node takes part from the round after its answer.

        Raises:
            UserError: fewer than `federation.min_clients` (default: all) have joined after `flower.wait` seconds.
        """
        first, deadline = not self._plans, time.monotonic() + self._config.flower.wait
        declined: set[int] = set()
        while True:
            self._invite(run, declined)
            declined |= self._collect_plans()
            if not first or len(self._plans) == self._config.federation.clients or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        needed = self._config.federation.min_clients or self._config.federation.clients
        if first and len(self._plans) < needed:
            raise UserError(
                "federation.min_clients",
                needed,
                f"{len(self._plans)} clients have joined after {self._config.flower.wait:g} seconds",
                "start more nodes, check the log for refusals, or lower federation.min_clients",
            )
        return self._plans

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        """Replies of the clients that answered within `flower.timeout`. The others are logged and left out."""
        run = next(iter(requests.values())).run
        replies = {}
        contents = {client: {"request": requests[client].encode()} for client in sorted(requests)}
        for client, content in self._replies(run, contents, requests).items():
            shapes = reply_shapes(requests[client], self._state.tensors)
            try:
                replies[client] = decode(content, shapes)
            except Exception as error:
                logger.warning("client %d sent an unreadable reply (%s)", client, _quoted(error))
        return replies

    def sum(self, requests: Mapping[int, Request], agreement: Agreement) -> tuple[list[int], dict[str, Tensor]]:
        """As `exchange`, but in the four stages of a secure sum."""
        run = next(iter(requests.values())).run

        def ask(stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
            contents: dict[int, dict[str, str | bytes]] = {}
            for client, question in sorted(questions.items()):
                request = {"request": requests[client].encode()} if stage == INPUT else {}
                contents[client] = {"question": question, **request}
            return self._replies(run, contents, requests if stage == INPUT else {})

        return add_up(agreement, ask)

    def accounts(self, run: str) -> dict[int, Account]:
        """The accounts of this run as reported by the clients, corrected where they are impossible."""
        return {client: self._accounts.get(client, Account(0, 0)) for client in self._plans}

    def spent(self) -> dict[int, float]:
        """Client -> ε of this run, as reported by the client."""
        return {
            client: plan.epsilon(self._accounts[client].steps)
            for client, plan in sorted(self._plans.items())
            if client in self._accounts
        }

    def personal(self, run: str, round_number: int) -> dict[int, dict[str, Tensor]]:
        """Empty: personal tensors stay with the owners."""
        return {}

    def _replies(
        self, run: str, contents: Mapping[int, Mapping[str, str | bytes]], requests: Mapping[int, Request]
    ) -> dict[int, bytes]:
        """Send messages, keep the accounts that come back, and return the replies. Malformed answers are dropped.

        Args:
            requests: the requests among the messages, which clients are charged for.
        """
        replies = {}
        # A delivery goes to those who are there.
        delivery = any(isinstance(request.work, Delivery) for request in requests.values())
        needed = 0 if delivery else self._config.federation.min_clients or len(contents)
        for client, content in self._ask(run, contents, needed).items():
            try:
                reply, account = content["reply"], decode_account(content["account"])
                if not isinstance(reply, bytes):
                    raise ValueError(f"its reply is of type {type(reply).__name__}")
            except Exception as error:
                logger.warning("client %d sent an unreadable answer (%s)", client, _quoted(error))
                continue
            self._note(client, account, requests.get(client))
            replies[client] = reply
        return replies

    def _note(self, client: int, claimed: Account, request: Request | None) -> None:
        """Store the account that a client claims. If it is impossible, all steps of the plan count instead.

        A client was charged for at least what it has replied to, and for at most its plan. A release without steps is a
        projection, which follows a release with steps.
        """
        most = self._plans[client].max_steps
        paid = self._paid.get(client, Account(0, 0))
        if request is not None and not isinstance(request.work, Delivery):
            steps = request.work.steps if isinstance(request.work, Training) else 0
            paid = Account(paid.steps + steps, paid.releases + 1)
        self._paid[client] = paid
        if paid.steps <= claimed.steps <= most and paid.releases <= claimed.releases <= 2 * most:
            self._accounts[client] = claimed
            return
        logger.warning(
            "client %d claims %d steps in %d releases, which is impossible: the server received %d steps in %d "
            "releases, and the plan has %d steps. All steps of the plan are counted instead",
            *(client, claimed.steps, claimed.releases, paid.steps, paid.releases, most),
        )
        self._accounts[client] = Account(most, paid.releases)

    def _ask(
        self, run: str, contents: Mapping[int, Mapping[str, str | bytes]], needed: int
    ) -> dict[int, Mapping[str, Any]]:
        """Send each client its message and wait for the answers, at most `flower.timeout` seconds.

        A node whose connection is lost, such as a suspended machine, is left out if enough others are there. Otherwise
        it gets the message again when it is back within `flower.wait` seconds; a repeated request is answered with the
        stored reply.

        Args:
            needed: number of answers without which the round cannot continue.
        """
        waiting = dict.fromkeys(contents, time.monotonic())
        sent: dict[str, int] = {}
        answers: dict[int, Mapping[str, Any]] = {}
        deadline = time.monotonic() + self._config.flower.timeout
        while (waiting or sent) and time.monotonic() < deadline:
            connected = set(self._grid.get_node_ids()) if waiting else set()
            for client, since in list(waiting.items()):
                if self._nodes.get(client) in connected:
                    message = self._message(run, self._nodes[client], MessageType.TRAIN, contents[client])
                    sent |= dict.fromkeys(self._grid.push_messages([message]), client)
                    del waiting[client]
                elif len(answers) + len(sent) >= needed or time.monotonic() > since + self._config.flower.wait:
                    logger.warning("client %d is not connected", client)
                    del waiting[client]
            for message in self._grid.pull_messages(list(sent)) if sent else []:
                client = sent.pop(message.metadata.reply_to_message_id)
                answer = _read_answer(message)
                if not isinstance(answer, str):
                    answers[client] = answer
                    continue
                logger.warning("client %d %s", client, answer)
                if message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE:
                    waiting[client] = time.monotonic()
            time.sleep(POLL_SECONDS if sent or waiting else 0)
        for client in (*sent.values(), *waiting):
            logger.warning("client %d has not answered within %g seconds", client, self._config.flower.timeout)
        return answers

    def _invite(self, run: str, declined: set[int]) -> None:
        """Send invitations to connected nodes that have not joined or been invited."""
        busy = {*self._nodes.values(), *self._invited.values(), *declined}
        for node in sorted(set(self._grid.get_node_ids()) - busy):
            message = self._message(run, node, MessageType.QUERY, {})
            self._invited |= dict.fromkeys(self._grid.push_messages([message]), node)

    def _collect_plans(self) -> set[int]:
        """Read the answers to invitations, and return the nodes that declined or were rejected.

        A node that lost its invitation, for example because it was restarted, is not among them.
        """
        declined: set[int] = set()
        if not self._invited:
            return declined
        connected = set(self._grid.get_node_ids())
        for message in self._grid.pull_messages(list(self._invited)):
            node = self._invited.pop(message.metadata.reply_to_message_id)
            answer = _read_answer(message)
            if isinstance(answer, str):
                if not message.has_error():
                    declined.add(node)
                if answer != self._declined.get(node):
                    logger.warning("node %d %s", node, answer)
                self._declined[node] = answer
                continue
            try:
                plan = decode_plan(answer["plan"])
                problem = self._check_plan(plan, connected)
            except Exception as error:
                problem = f"its answer is unreadable ({_quoted(error)})"
            if problem is not None:
                logger.warning("node %d was rejected: %s", node, problem)
                declined.add(node)
                continue
            self._nodes[plan.client], self._plans[plan.client] = node, plan
            logger.info("client %d has joined: ε = %.3f planned for this run", plan.client, plan.epsilon())
        self._invited = {message: node for message, node in self._invited.items() if node in connected}
        return declined

    def _check_plan(self, plan: ClientPlan, connected: set[int]) -> str | None:
        """Why the server rejects a plan; None if it accepts it. Only its client and records are taken on trust."""
        config = self._config
        if not 0 <= plan.client < config.federation.clients:
            return f"there is no client {plan.client}"
        if self._nodes.get(plan.client) in connected:
            return f"client {plan.client} is on another node"
        if plan.client in self._plans and plan != self._plans[plan.client]:
            return f"client {plan.client} agreed to a different plan before"
        if not 1 <= plan.records < LARGEST_COUNT:
            return f"it declares {plan.records} records"
        if config.privacy.private and config.federation.batch_size <= config.privacy.delta * plan.records:
            return f"with {plan.records} records its sampling rate is below privacy.delta = {config.privacy.delta:g}"
        try:
            own = plan_run(config, plan.client, plan.records)
        except UserError as error:
            return str(error)
        if not plan.agrees_with(own):
            return f"its plan is {plan}, but for {plan.records} records this experiment has {own}"
        return None

    def _message(self, run: str, node: int, kind: str, content: Mapping[str, str | bytes]) -> Message:
        invitation = Invitation(run, self._config.model_dump_json(), self._base).encode()
        record = ConfigRecord({"invitation": invitation, **content})
        wait, timeout = self._config.flower.wait, self._config.flower.timeout
        # A node reads its data before it answers an invitation, which may take longer than a reply.
        lifetime = max(wait, timeout) if kind == MessageType.QUERY else timeout
        return Message(RecordDict({RECORD: record}), node, kind, ttl=lifetime)


def _read_answer(message: Message) -> Mapping[str, Any] | str:
    """The content of a node's answer, or a text for the log if there is none."""
    try:
        if message.has_error():
            reason = f"Flower reports error {message.error.code} ({_quoted(message.error.reason)})"
            return f"did not answer: {reason}"
        content = message.content.get(RECORD)
        if not isinstance(content, ConfigRecord):
            return f"answered without a record {RECORD!r}"
        return f"refused: {_quoted(content['refused'])}" if "refused" in content else dict(content)
    except Exception as error:
        return f"sent an unreadable answer ({_quoted(error)})"


def _quoted(text: object) -> str:
    """Untrusted text for one line of the log: shortened, without line breaks and control characters."""
    words = f"{type(text).__name__}: {text}" if isinstance(text, Exception) else str(text)
    return "".join(letter if letter.isprintable() else " " for letter in words[:1000])
