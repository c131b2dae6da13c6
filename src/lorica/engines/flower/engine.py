"""Send requests and receive replies as Flower messages over a `Grid`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from safetensors import SafetensorError
from torch import Tensor

from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.messages import Invitation, Request, decode, decode_account, decode_plan
from lorica.privacy.plan import ClientPlan
from lorica.privacy.statement import Account
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.stages import INPUT, add_up

RECORD = "lorica"
POLL_SECONDS = 0.2
logger = logging.getLogger(__name__)


class FlowerEngine:
    """Sends each client's requests to its node. Replies are not trusted: a malformed one is dropped and logged.

    Args:
        config: the experiment as sent to the nodes.
        base: hash of the server's base model.
    """

    ledger = "with each owner"

    def __init__(self, grid: Grid, config: ExperimentConfig, base: str) -> None:
        self._grid, self._config, self._base = grid, config, base
        self._nodes: dict[int, int] = {}
        self._plans: dict[int, ClientPlan] = {}
        self._accounts: dict[int, Account] = {}
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
        answers = self._replies(run, {client: {"request": requests[client].encode()} for client in sorted(requests)})
        for client, content in answers.items():
            try:
                replies[client] = decode(content)
            except (ValueError, SafetensorError) as error:
                logger.warning("client %d sent an unreadable reply (%s)", client, type(error).__name__)
        return replies

    def sum(self, requests: Mapping[int, Request], agreement: Agreement) -> tuple[list[int], dict[str, Tensor]]:
        """As `exchange`, but in the four stages of a secure sum."""
        run = next(iter(requests.values())).run

        def ask(stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
            contents: dict[int, dict[str, str | bytes]] = {}
            for client, question in sorted(questions.items()):
                request = {"request": requests[client].encode()} if stage == INPUT else {}
                contents[client] = {"question": question, **request}
            return self._replies(run, contents)

        return add_up(agreement, ask)

    def accounts(self, run: str) -> dict[int, Account]:
        """The accounts of this run as reported by the clients."""
        return {client: self._accounts.get(client, Account(0, 0)) for client in self._plans}

    def spent(self) -> dict[int, float]:
        """Client -> ε of this run, as reported by the client."""
        return {
            client: plan.epsilon(self._accounts[client].steps)
            for client, plan in sorted(self._plans.items())
            if client in self._accounts
        }

    def personal(self, run: str) -> dict[int, dict[str, Tensor]]:
        """Empty: personal tensors stay with the owners."""
        return {}

    def _replies(self, run: str, contents: Mapping[int, Mapping[str, str | bytes]]) -> dict[int, bytes]:
        """Send messages, keep the accounts that come back, and return the replies. Malformed answers are dropped."""
        replies = {}
        for client, content in self._ask(run, contents).items():
            try:
                self._accounts[client] = decode_account(str(content["account"]))
                replies[client] = bytes(content["reply"])
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("client %d sent an unreadable answer (%s)", client, type(error).__name__)
        return replies

    def _ask(self, run: str, contents: Mapping[int, Mapping[str, str | bytes]]) -> dict[int, Mapping[str, Any]]:
        """Send each client its message and wait for the answers, at most `flower.timeout` seconds."""
        connected = set(self._grid.get_node_ids())
        sent: dict[str, int] = {}
        for client, content in contents.items():
            if self._nodes.get(client) not in connected:
                logger.warning("client %d is not connected", client)
                continue
            message = self._message(run, self._nodes[client], MessageType.TRAIN, content)
            sent |= dict.fromkeys(self._grid.push_messages([message]), client)
        answers = {}
        deadline = time.monotonic() + self._config.flower.timeout
        while sent and time.monotonic() < deadline:
            for message in self._grid.pull_messages(list(sent)):
                client = sent.pop(message.metadata.reply_to_message_id)
                answer = _read_answer(message)
                if isinstance(answer, str):
                    logger.warning("client %d %s", client, answer)
                else:
                    answers[client] = answer
            time.sleep(POLL_SECONDS if sent else 0)
        for client in sent.values():
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
                plan = decode_plan(str(answer["plan"]))
                problem = self._check_plan(plan, connected)
            except (KeyError, ValueError):
                problem = "its answer is unreadable"
            if problem is not None:
                logger.warning("node %d was rejected: %s", node, problem)
                declined.add(node)
                continue
            self._nodes[plan.client], self._plans[plan.client] = node, plan
            logger.info("client %d has joined: ε = %.3f planned for this run", plan.client, plan.epsilon())
        self._invited = {message: node for message, node in self._invited.items() if node in connected}
        return declined

    def _check_plan(self, plan: ClientPlan, connected: set[int]) -> str | None:
        """Why the server rejects a plan; None if it accepts it."""
        config = self._config
        clip_norm = float("inf") if config.privacy == "none" else config.privacy.clip_norm
        noise = "none" if config.privacy == "none" else config.privacy.noise
        if not 0 <= plan.client < config.federation.clients:
            return f"there is no client {plan.client}"
        if self._nodes.get(plan.client) in connected:
            return f"client {plan.client} is on another node"
        asked = (config.federation.batch_size, clip_norm, noise)
        if (plan.terms.batch_size, plan.terms.clip_norm, plan.noise) != asked:
            return "its plan is for another batch size, clip norm or kind of noise"
        if plan.records < 1 or plan.terms.sampling_rate != plan.terms.batch_size / plan.records:
            return "its plan is inconsistent"
        if plan.client in self._plans and plan != self._plans[plan.client]:
            return f"client {plan.client} agreed to a different plan before"
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
    if message.has_error():
        return f"did not answer: Flower reports error {message.error.code} ({message.error.reason})"
    content = message.content.get(RECORD)
    if not isinstance(content, ConfigRecord):
        return f"answered without a record {RECORD!r}"
    return f"refused: {content['refused']!s}" if "refused" in content else dict(content)
