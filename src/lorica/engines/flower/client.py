"""The `ClientApp`: hands a message to the owner's node, in this process or in one that stays."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lorica.engines.flower.warm import ask

RECORD = "lorica"
app = ClientApp()


@app.query()
def join(message: Message, context: Context) -> Message:
    """An invitation: the plan that the owner agrees to, or a refusal."""
    return _answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A request: the reply and what the run has cost so far, or a refusal."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    record = message.content.get(RECORD, ConfigRecord())
    invitation, request, question = (record.get(key) for key in ("invitation", "request", "question"))
    answer = ask(
        context.node_config,
        str(invitation),
        request if isinstance(request, bytes) else None,
        question if isinstance(question, str) else None,
    )
    return Message(RecordDict({RECORD: ConfigRecord({**answer})}), reply_to=message)
