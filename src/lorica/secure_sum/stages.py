"""Run the four stages of a summation between a server and its clients, leaving out clients that fail."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from torch import Tensor

from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.client import State, advertise, mask, reveal, share
from lorica.secure_sum.messages import check_keys, check_threshold
from lorica.secure_sum.requirements import Requirements
from lorica.secure_sum.server import check_masked, route, unmask
from lorica.secure_sum.setup import SummationError

INPUT = "masked"
"""The stage in which a client sends its tensors, masked."""
VERSION = 2
# Hexadecimal digits that are kept of a digest: 128 bits.
DIGEST = 32
Ask = Callable[[str, Mapping[int, str]], Mapping[int, bytes]]
"""`ask(stage, client -> question)` returns client -> answer, for the clients that answered."""
logger = logging.getLogger(__name__)


def add_up(agreement: Agreement, ask: Ask) -> tuple[list[int], dict[str, Tensor]]:
    """The sum of `w_k` times the tensors of client k, over the members whose masked inputs arrived.

    A client that fails to answer a stage, or gives a wrong answer, is logged and takes no further part.

    Returns:
        The clients in the sum, and the sum; both empty if fewer clients than the threshold were left at a stage.
    """
    try:
        return _add_up(agreement, ask)
    except SummationError as error:
        logger.warning("%s", error)
        return [], {}


@dataclass(frozen=True)
class Input:
    """A client's input to a sum.

    Attributes:
        tensors: name -> released tensor, before weighting.
        derived: the tensors are a function of what the client released earlier in the same round.
    """

    tensors: Mapping[str, Tensor]
    derived: bool = False


@dataclass(frozen=True)
class Shown:
    """An input that became part of a sum.

    Attributes:
        content: digest of the input.
        limit: the value at which the input was clipped.
        others: digest of the clients in the sum and their relative weights.
        derived: as in `Input`.
    """

    content: str
    limit: float
    others: str
    derived: bool


@dataclass(frozen=True)
class Part:
    """What one client stores between the stages and summations of a run. Secret.

    Attributes:
        state: state of the current summation; None before the first.
        given: digest of the input masked in the current summation, and whether it is derived.
        shown: (round, exchange) -> the input that became part of a sum. A second sum of the same input, or of a
            function of it, over other clients or with other weights would reveal single inputs as the difference.
    """

    state: State | None = None
    given: tuple[str, bool] | None = None
    shown: Mapping[tuple[int, int], Shown] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        state = None if self.state is None else self.state.to_bytes().decode()
        shown = [[*place, *astuple(one)] for place, one in sorted(self.shown.items())]
        return json.dumps({"version": VERSION, "state": state, "given": self.given, "shown": shown}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Part:
        """The inverse of `to_bytes`.

        Raises:
            SummationError: the content is damaged, or another version of Lorica wrote it.
        """
        try:
            fields = json.loads(content)
            if fields.get("version") != VERSION and {"state", "given", "shown"} <= fields.keys():
                problem = "the stored state of this client was written by another version of Lorica"
                raise SummationError(f"{problem}; finish the run with that version, or start a new run")
            state, given = fields["state"], fields["given"]
            return cls(
                None if state is None else State.from_bytes(state.encode()),
                None if given is None else (given[0], given[1]),
                {(row[0], row[1]): Shown(*row[2:]) for row in fields["shown"]},
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise SummationError("the stored state of this client is damaged") from None


def run_client_stage(
    part: Part, required: Requirements, question: str, given: Callable[[Agreement], Input]
) -> tuple[Part, bytes]:
    """Answer the server's question of one stage as the client that `required` names.

    A repeated question in the last two stages gets the same answer, in case the first one was lost.

    Args:
        given: called in the stage of the masked input; returns the input for this agreement.

    Returns:
        The new `Part`, to be stored before the answer leaves, and the answer.

    Raises:
        SummationError: the question is malformed, not allowed in the client's state, or asks for a sum that does not
            meet the client's requirements.
    """
    stage, summation, asked = _read(question)
    if stage == "keys":
        if part.state is not None and part.state.agreement.setup.summation == summation:
            raise SummationError("the server starts the same summation twice")
        state, keys = advertise(asked["agreement"], required)
        return replace(part, state=state, given=None), keys
    if part.state is None or summation != part.state.agreement.setup.summation:
        raise SummationError("the server asks about a summation that this client has not joined")
    if stage == "shares":
        state, sealed = share(part.state, asked["keys"], required)
        return replace(part, state=state), json.dumps(_hex(sealed)).encode()
    if stage == INPUT:
        some = given(part.state.agreement)
        state, masked = mask(part.state, asked["shares"], some.tensors)
        return replace(part, state=state, given=(_content(some.tensors), some.derived)), masked
    state, shares = reveal(part.state, asked["survivors"], required)
    assert part.given is not None
    place = (state.agreement.round, state.agreement.exchange)
    limit = _rounded(state.agreement.setup.bound / state.agreement.weights[state.own])
    one = Shown(part.given[0], limit, _others(state), part.given[1])
    _check_shown(part.shown, place, one)
    return replace(part, state=state, shown={**part.shown, place: one}), shares


def _check_shown(shown: Mapping[tuple[int, int], Shown], place: tuple[int, int], one: Shown) -> None:
    """Refuse a sum that, together with an earlier one, would reveal single inputs."""
    if shown.get(place, one) != one or any(other.content == one.content and other != one for other in shown.values()):
        raise SummationError("the server asks for a second sum of the same input with other clients, weights or terms")
    for (round_number, exchange), other in shown.items():
        if round_number != place[0] or exchange == place[1] or not (one.derived or other.derived):
            continue
        if other.others != one.others:
            raise SummationError("the server asks for a function of what was summed, with other clients or weights")
        if one.derived and other.derived:
            # The server could choose the clipping of the second one by what the first one revealed.
            raise SummationError("the server asks for a second function of what was summed in this round")


def _read(question: str) -> tuple[str, str, dict[str, Any]]:
    """Stage, id of the summation, and the other content of a question."""
    try:
        asked = json.loads(question)
        stage = asked["stage"]
        if stage == "keys":
            agreement = Agreement.of(asked["agreement"])
            return stage, agreement.setup.summation, {"agreement": agreement}
        if stage == "shares":
            return stage, asked["summation"], {"keys": _bytes(asked["keys"])}
        if stage == INPUT:
            return stage, asked["summation"], {"shares": _bytes(asked["shares"])}
        if stage == "revealed":
            survivors = asked["survivors"]
            if not isinstance(survivors, list) or not all(type(client) is int for client in survivors):
                raise TypeError("survivors are a list of ids")
            return stage, asked["summation"], {"survivors": survivors}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SummationError("the server's question is malformed") from None
    raise SummationError("the server asks for an unknown stage")


def _add_up(agreement: Agreement, ask: Ask) -> tuple[list[int], dict[str, Tensor]]:
    opening = json.dumps({"stage": "keys", "agreement": agreement.plain()})
    keys = dict(ask("keys", dict.fromkeys(agreement.weights, opening)))
    _retry_without_faulty(lambda: check_keys(agreement, keys), keys)

    asking = _question("shares", agreement, keys=_hex(keys))
    sent = {}
    for client, content in ask("shares", dict.fromkeys(keys, asking)).items():
        try:
            sent[client] = _bytes(json.loads(content))
        except (ValueError, AttributeError, TypeError, RecursionError):
            logger.warning("client %d sent unreadable shares", client)
    routed: dict[int, dict[int, bytes]] = _retry_without_faulty(lambda: route(agreement, keys, sent), sent)
    keys = {client: keys[client] for client in routed}

    questions = {client: _question(INPUT, agreement, shares=_hex(routed[client])) for client in routed}
    masked = {}
    for client, reply in ask(INPUT, questions).items():
        try:
            check_masked(agreement, keys, client, reply)
            masked[client] = reply
        except SummationError as error:
            logger.warning("%s", error)

    check_threshold(agreement, len(masked), "sent a masked input")
    survivors = sorted(masked)
    asking = _question("revealed", agreement, survivors=survivors)
    revealed = dict(ask("revealed", dict.fromkeys(survivors, asking)))
    total: dict[str, Tensor] = _retry_without_faulty(lambda: unmask(agreement, keys, masked, revealed), revealed)
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


def _question(stage: str, agreement: Agreement, **content: Any) -> str:
    return json.dumps({"stage": stage, "summation": agreement.setup.summation} | content)


def _content(tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(json.dumps([name, list(tensors[name].shape)]).encode())
        content.update(tensors[name].contiguous().numpy().tobytes())
    return content.hexdigest()[:DIGEST]


def _others(state: State) -> str:
    """Digest of the survivors and their relative weights, since a constant factor reveals nothing new.

    Weights count as equal if they agree to about 12 digits, which is finer than the quantisation step.
    """
    weights = state.agreement.weights
    total = math.fsum(weights[client] for client in state.survivors)
    shares = [[client, _rounded(weights[client] / total)] for client in state.survivors]
    return hashlib.sha256(json.dumps(shares).encode()).hexdigest()[:DIGEST]


def _rounded(value: float) -> float:
    """`value` to 40 significant bits, so that sums in another order give the same number."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**40), exponent - 40)


def _hex(values: Mapping[int, bytes]) -> dict[int, str]:
    return {client: value.hex() for client, value in values.items()}


def _bytes(values: Mapping[str, str]) -> dict[int, bytes]:
    return {int(client): bytes.fromhex(value) for client, value in values.items()}
