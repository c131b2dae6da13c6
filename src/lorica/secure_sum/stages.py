"""Run the four stages of a summation between a server and its clients, leaving out clients that fail."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from lorica.errors import UserError
from lorica.secure_sum.client import State, advertise, mask, reveal, share
from lorica.secure_sum.messages import check_keys, check_threshold
from lorica.secure_sum.quantisation import Shapes
from lorica.secure_sum.server import check_masked, route, unmask
from lorica.secure_sum.setup import Setup, SummationError

INPUT = "masked"
"""The stage in which a client sends its tensors, masked."""
Ask = Callable[[str, Mapping[int, str]], Mapping[int, bytes]]
"""`ask(stage, client -> question)` returns client -> answer, for the clients that answered."""
logger = logging.getLogger(__name__)


def add_up(setup: Setup, weights: Mapping[int, float], shapes: Shapes, ask: Ask) -> tuple[list[int], dict[str, Tensor]]:
    """The sum of `w_k` times the tensors of client k, over the clients whose masked inputs arrived.

    A client that fails to answer a stage, or gives a wrong answer, is logged and takes no further part.

    Args:
        weights: client -> `w_k`, public.
        shapes: name -> shape.

    Returns:
        The clients in the sum, and the sum; both empty if fewer than `setup.threshold` clients were left at a stage.
    """
    try:
        return _add_up(setup, weights, shapes, ask)
    except SummationError as error:
        logger.warning("%s", error)
        return [], {}


@dataclass(frozen=True)
class Part:
    """What one client stores between stages and summations. Secret.

    Attributes:
        state: state of the current summation; None before the first.
        given: digest and weight of the tensors masked in the current summation.
        shown: digest and weight of the last input that became part of a sum, and the clients in that sum. A second sum
            of the same input over other clients would reveal single inputs as the difference.
    """

    state: State | None = None
    given: tuple[str, float] | None = None
    shown: tuple[str, float, tuple[int, ...]] | None = None

    def to_bytes(self) -> bytes:
        state = None if self.state is None else self.state.to_bytes().decode()
        return json.dumps({"state": state, "given": self.given, "shown": self.shown}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Part:
        """The inverse of `to_bytes`.

        Raises:
            SummationError: the content is damaged.
        """
        try:
            fields = json.loads(content)
            state, given, shown = fields["state"], fields["given"], fields["shown"]
            return cls(
                None if state is None else State.from_bytes(state.encode()),
                None if given is None else (given[0], given[1]),
                None if shown is None else (shown[0], shown[1], tuple(shown[2])),
            )
        except (ValueError, TypeError, KeyError, IndexError):
            raise SummationError("the stored state of this client is damaged") from None


def run_client_stage(
    part: Part, own: int, question: str, tensors: Callable[[], Mapping[str, Tensor]]
) -> tuple[Part, bytes]:
    """Answer the server's question of one stage as client `own`.

    A repeated question in the last two stages gets the same answer, in case the first one was lost.

    Args:
        tensors: called in the stage of the masked input; returns the tensors to sum, before weighting.

    Returns:
        The new `Part`, to be stored before the answer leaves, and the answer.

    Raises:
        SummationError: the question is malformed, or not allowed in the client's state.
    """
    stage, summation, asked = _read(question)
    if stage == "keys":
        if part.state is not None and part.state.setup.summation == summation:
            raise SummationError("the server starts the same summation twice")
        state, keys = advertise(asked["setup"], own)
        return replace(part, state=state, given=None), keys
    if part.state is None or summation != part.state.setup.summation:
        raise SummationError("the server asks about a summation that this client has not joined")
    if stage == "shares":
        state, sealed = share(part.state, asked["keys"])
        return replace(part, state=state), json.dumps(_hex(sealed)).encode()
    if stage == INPUT:
        weight = asked["weight"]
        if not 0 <= weight <= 1:
            raise SummationError("the server gives a weight that is not between 0 and 1")
        values = tensors()
        state, masked = mask(part.state, asked["shares"], {key: weight * values[key] for key in values})
        return replace(part, state=state, given=(_digest(values), weight)), masked
    state, shares = reveal(part.state, asked["survivors"])
    assert part.given is not None
    shown = (*part.given, state.survivors)
    if part.shown is not None and part.shown[0] == shown[0] and part.shown != shown:
        raise SummationError("the server asks for a second sum of the same input with other clients or weights")
    return replace(part, state=state, shown=shown), shares


def _read(question: str) -> tuple[str, str, dict[str, Any]]:
    """Stage, id of the summation, and the other content of a question."""
    try:
        asked = json.loads(question)
        stage = asked["stage"]
        if stage == "keys":
            setup = Setup(**asked["setup"])
            return stage, setup.summation, {"setup": setup}
        if stage == "shares":
            return stage, asked["summation"], {"keys": _bytes(asked["keys"])}
        if stage == INPUT:
            content = {"shares": _bytes(asked["shares"]), "weight": float(asked["weight"])}
            return stage, asked["summation"], content
        if stage == "revealed":
            return stage, asked["summation"], {"survivors": [int(client) for client in asked["survivors"]]}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, UserError):
        raise SummationError("the server's question is malformed") from None
    raise SummationError("the server asks for an unknown stage")


def _add_up(
    setup: Setup, weights: Mapping[int, float], shapes: Shapes, ask: Ask
) -> tuple[list[int], dict[str, Tensor]]:
    opening = json.dumps({"stage": "keys", "setup": asdict(setup)})
    keys = dict(ask("keys", dict.fromkeys(weights, opening)))
    _retry_without_faulty(lambda: check_keys(setup, keys), keys)

    asking = _question("shares", setup, keys=_hex(keys))
    sent = {}
    for client, content in ask("shares", dict.fromkeys(keys, asking)).items():
        try:
            sent[client] = _bytes(json.loads(content))
        except (ValueError, AttributeError, TypeError):
            logger.warning("client %d sent unreadable shares", client)
    routed: dict[int, dict[int, bytes]] = _retry_without_faulty(lambda: route(setup, keys, sent), sent)
    keys = {client: keys[client] for client in routed}

    questions = {
        client: _question(INPUT, setup, shares=_hex(routed[client]), weight=weights[client]) for client in routed
    }
    masked = {}
    for client, reply in ask(INPUT, questions).items():
        try:
            check_masked(setup, keys, client, reply, shapes)
            masked[client] = reply
        except SummationError as error:
            logger.warning("%s", error)

    check_threshold(setup, len(masked), "sent a masked input")
    survivors = sorted(masked)
    asking = _question("revealed", setup, survivors=survivors)
    revealed = dict(ask("revealed", dict.fromkeys(survivors, asking)))
    total: dict[str, Tensor] = _retry_without_faulty(lambda: unmask(setup, keys, masked, revealed, shapes), revealed)
    return survivors, total


def _retry_without_faulty(check: Callable[[], Any], answers: dict[int, Any]) -> Any:
    """`check()`, repeated without the answers of each client that it reports as faulty."""
    while True:
        try:
            return check()
        except SummationError as error:
            if error.client is None or error.client not in answers:
                raise
            logger.warning("%s", error)
            del answers[error.client]


def _question(stage: str, setup: Setup, **content: Any) -> str:
    return json.dumps({"stage": stage, "summation": setup.summation} | content)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(json.dumps([name, list(tensors[name].shape)]).encode())
        content.update(tensors[name].contiguous().numpy().tobytes())
    return content.hexdigest()


def _hex(values: Mapping[int, bytes]) -> dict[int, str]:
    return {client: value.hex() for client, value in values.items()}


def _bytes(values: Mapping[str, str]) -> dict[int, bytes]:
    return {int(client): bytes.fromhex(value) for client, value in values.items()}
