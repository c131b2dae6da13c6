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
"""The stage for which a client needs to know what it is to add up."""
VERSION = 2
# Hexadecimal digits that are kept of a digest: 128 bits.
DIGEST = 32
Ask = Callable[[str, Mapping[int, str]], Mapping[int, bytes]]
"""`ask(stage, client -> question)` returns client -> answer, for the clients that answered."""
logger = logging.getLogger(__name__)


def add_up(agreement: Agreement, ask: Ask) -> tuple[list[int], dict[str, Tensor]]:
    """The sum of `w_k` times the tensors of client k, over the members that stayed to the end.

    A client that fails to answer a stage, or gives a wrong answer, is logged and takes no further part.

    Returns:
        The clients in the sum, and the sum. Both are empty if fewer than the threshold were left at some stage.
    """
    try:
        return _add_up(agreement, ask)
    except SummationError as error:
        logger.warning("%s", error)
        return [], {}


@dataclass(frozen=True)
class Input:
    """What a client is to add up.

    Attributes:
        tensors: released, before weighting.
        derived: they are a function of what the client released earlier in the same round, and no release of their own.
    """

    tensors: Mapping[str, Tensor]
    derived: bool = False


@dataclass(frozen=True)
class Shown:
    """What a sum that the server got was made of.

    Attributes:
        content: digest of the input.
        limit: where it was clipped: sums of the same input, clipped elsewhere, differ too.
        others: digest of the clients in the sum and their relative shares.
        derived: as in `Input`.
    """

    content: str
    limit: float
    others: str
    derived: bool


@dataclass(frozen=True)
class Part:
    """One client's part in the sums of a run, kept between their stages. Secret.

    Attributes:
        state: of the summation that is going on; None before the first.
        given: digest of the input that was masked for it, and whether it is derived.
        shown: (round, exchange) -> its input that was in a sum. Two sums of one input, or of an input and a function of
            it, over other clients or at other shares, would show single inputs by difference.
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
            SummationError: not a part, or one that an earlier version of Lorica wrote.
        """
        try:
            fields = json.loads(content)
            if fields.get("version") != VERSION and {"state", "given", "shown"} <= fields.keys():
                problem = "the stored part of this client is of another version of Lorica; finish the run with that one"
                raise SummationError(f"{problem}, or start a new run")
            state, given = fields["state"], fields["given"]
            return cls(
                None if state is None else State.from_bytes(state.encode()),
                None if given is None else (given[0], given[1]),
                {(row[0], row[1]): Shown(*row[2:]) for row in fields["shown"]},
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise SummationError("the stored part of this client is damaged") from None


def answer(
    part: Part, required: Requirements, question: str, given: Callable[[Agreement], Input]
) -> tuple[Part, bytes]:
    """One client's answer to the question of a stage.

    A repeated question in the last two stages gets the same answer, in case the first one was lost.

    Args:
        given: called at the stage of the masked input: what to add up under this agreement.

    Returns:
        The new `Part`, to be stored before the answer leaves, and the answer.

    Raises:
        SummationError: the question is none that a client answers in its state, or the sum none that it takes part in.
    """
    stage, summation, asked = _read(question)
    if stage == "keys":
        if part.state is not None and part.state.agreement.setup.summation == summation:
            raise SummationError("the server starts the same summation twice")
        state, keys = advertise(asked["agreement"], required)
        return replace(part, state=state, given=None), keys
    if part.state is None or summation != part.state.agreement.setup.summation:
        raise SummationError("the server asks about a summation that this client has no part in")
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
    """Refuse a sum that would show single inputs together with an earlier one."""
    if shown.get(place, one) != one or any(other.content == one.content and other != one for other in shown.values()):
        raise SummationError("the server asks for a second sum of the same input with other clients, weights or terms")
    for (round_number, exchange), other in shown.items():
        if round_number != place[0] or exchange == place[1] or not (one.derived or other.derived):
            continue
        if other.others != one.others:
            raise SummationError("the server asks for a function of what was summed, with other clients or weights")
        if one.derived and other.derived:
            # Of a second one the clipping could be chosen by what the first one has shown.
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
        raise SummationError("the server's question cannot be understood") from None
    raise SummationError("the server asks for a stage that there is not")


def _add_up(agreement: Agreement, ask: Ask) -> tuple[list[int], dict[str, Tensor]]:
    opening = json.dumps({"stage": "keys", "agreement": agreement.plain()})
    keys = dict(ask("keys", dict.fromkeys(agreement.weights, opening)))
    _without_liars(lambda: check_keys(agreement, keys), keys)

    asking = _question("shares", agreement, keys=_hex(keys))
    sent = {}
    for client, content in ask("shares", dict.fromkeys(keys, asking)).items():
        try:
            sent[client] = _bytes(json.loads(content))
        except (ValueError, AttributeError, TypeError, RecursionError):
            logger.warning("client %d: its shares cannot be read", client)
    routed: dict[int, dict[int, bytes]] = _without_liars(lambda: route(agreement, keys, sent), sent)
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
    total: dict[str, Tensor] = _without_liars(lambda: unmask(agreement, keys, masked, revealed), revealed)
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
    """Digest of the survivors and of their shares, relative to their sum: a constant factor shows nothing new.

    Shares count as equal if they agree to about 12 digits, finer than any quantisation step.
    """
    weights = state.agreement.weights
    total = math.fsum(weights[client] for client in state.survivors)
    shares = [[client, _rounded(weights[client] / total)] for client in state.survivors]
    return hashlib.sha256(json.dumps(shares).encode()).hexdigest()[:DIGEST]


def _rounded(value: float) -> float:
    """To 40 bits: the same number as other sums of the same values round it to."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**40), exponent - 40)


def _hex(values: Mapping[int, bytes]) -> dict[int, str]:
    return {client: value.hex() for client, value in values.items()}


def _bytes(values: Mapping[str, str]) -> dict[int, bytes]:
    return {int(client): bytes.fromhex(value) for client, value in values.items()}
