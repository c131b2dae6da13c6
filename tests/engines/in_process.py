"""A Flower `Grid` without Flower's processes: messages go through its own serialisation to the `ClientApp` and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message  # noqa: F401
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from lorica.engines.flower.client import app


class InProcessGrid(Grid):
    """Node `k + 1` has the k-th node configuration. A node that raises answers with an error, as under Flower."""

    def __init__(self, node_configs: list[dict[str, Any]]) -> None:
        # What Flower sets in the processes that it starts.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.contexts = {
            number + 1: Context(1, number + 1, config, RecordDict(), {}) for number, config in enumerate(node_configs)
        }
        self.replies: dict[str, Message] = {}
        self.sent: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for number, message in enumerate(messages, start=len(self.sent) + 1):
            identity = f"message-{number}"
            message.metadata.__dict__["_message_id"] = identity
            self.sent.append(message)
            pushed.append(identity)
            self.replies[identity] = self.answer(message_from_proto(message_to_proto(message)))
        return pushed

    def answer(self, message: Message) -> Message:
        try:
            reply = app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            reply = Message(Error(2, str(error)), reply_to=message)
        return message_from_proto(message_to_proto(reply))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(identity) for identity in message_ids if identity in self.replies]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
