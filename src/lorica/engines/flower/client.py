"""The `ClientApp`: passes each message to the owner's node, in this process or in a worker process."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lorica.engines.flower.warm import ask

RECORD = "lorica"
app = ClientApp()


@app.query()
def join(message: Message, context: Context) -> Message:
    """Handle an invitation: answer with the owner's plan, or with a refusal."""
    return _handle(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Handle a request: answer with the reply and the cost of the run so far, or with a refusal."""
    return _handle(message, context)


def _handle(message: Message, context: Context) -> Message:
    record = message.content.get(RECORD, ConfigRecord())
    invitation, request, question = (record.get(key) for key in ("invitation", "request", "question"))
    answer = ask(
        context.node_config,
        str(invitation),
        request if isinstance(request, bytes) else None,
        question if isinstance(question, str) else None,
    )
    return Message(RecordDict({RECORD: ConfigRecord({**answer})}), reply_to=message)
