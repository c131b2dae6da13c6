"""The four stages between a server and its clients: who is asked what, and who is left out on the way."""

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
"""The stage for which a client needs to know what it is to add up."""
Ask = Callable[[str, Mapping[int, str]], Mapping[int, bytes]]
"""A stage and client -> question, to client -> answer, of those that gave one."""
logger = logging.getLogger(__name__)


def add_up(setup: Setup, weights: Mapping[int, float], shapes: Shapes, ask: Ask) -> tuple[list[int], dict[str, Tensor]]:
    """The sum of `w_k` times the tensors of client k, over the clients that stayed to the end.

    A client that does not answer a stage, or whose answer is wrong, is left out from there on and logged.

    Args:
        weights: client -> `w_k`, public.
        shapes: name -> shape.

    Returns:
        The clients in the sum, and the sum. Both are empty if fewer than `setup.threshold` were left at some stage.
    """
    try:
        return _add_up(setup, weights, shapes, ask)
    except SummationError as error:
        logger.warning("%s", error)
        return [], {}


@dataclass(frozen=True)
class Part:
    """One client's part in summations, kept between their stages. Secret.

    Attributes:
        state: of the summation that is going on; None before the first.
        given: digest of the tensors that were masked for it, and their weight.
        shown: the same of the latest input that was in a sum, with the clients that it was added to: a second sum of
            the same input with others would show single inputs by difference.
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
            SummationError: not a part.
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
            raise SummationError("the stored part of this client is damaged") from None


def answer(part: Part, own: int, question: str, tensors: Callable[[], Mapping[str, Tensor]]) -> tuple[Part, bytes]:
    """One client's answer to the question of a stage.

    An input or a reveal that is asked for again, after an answer was lost, is the same again.

    Args:
        tensors: called at the stage of the masked input: what to add up, before weighting.

    Returns:
        What to store before the answer leaves, and the answer.

    Raises:
        SummationError: the question is none that a client answers in its state.
    """
    stage, summation, asked = _read(question)
    if stage == "keys":
        if part.state is not None and part.state.setup.summation == summation:
            raise SummationError("the server starts the same summation twice")
        state, keys = advertise(asked["setup"], own)
        return replace(part, state=state, given=None), keys
    if part.state is None or summation != part.state.setup.summation:
        raise SummationError("the server asks about a summation that this client has no part in")
    if stage == "shares":
        state, sealed = share(part.state, asked["keys"])
        return replace(part, state=state), json.dumps(_hex(sealed)).encode()
    if stage == INPUT:
        weight = asked["weight"]
        if not 0 <= weight <= 1:
            raise SummationError("the server asks for an input with a weight that is no share")
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
    """Stage, summation, and what else the stage's question holds."""
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
        raise SummationError("the server's question cannot be understood") from None
    raise SummationError("the server asks for a stage that there is not")


def _add_up(
    setup: Setup, weights: Mapping[int, float], shapes: Shapes, ask: Ask
) -> tuple[list[int], dict[str, Tensor]]:
    opening = json.dumps({"stage": "keys", "setup": asdict(setup)})
    keys = dict(ask("keys", dict.fromkeys(weights, opening)))
    _without_liars(lambda: check_keys(setup, keys), keys)

    asking = _question("shares", setup, keys=_hex(keys))
    sent = {}
    for client, content in ask("shares", dict.fromkeys(keys, asking)).items():
        try:
            sent[client] = _bytes(json.loads(content))
        except (ValueError, AttributeError, TypeError):
            logger.warning("client %d: its shares cannot be read", client)
    routed: dict[int, dict[int, bytes]] = _without_liars(lambda: route(setup, keys, sent), sent)
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
    total: dict[str, Tensor] = _without_liars(lambda: unmask(setup, keys, masked, revealed, shapes), revealed)
    return survivors, total


def _without_liars(check: Callable[[], Any], answers: dict[int, Any]) -> Any:
    """`check()`, again without each client that it names."""
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
