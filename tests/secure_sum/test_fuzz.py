"""Mutated questions and answers of every stage: refusals, no crash, and no sum with a wrong value."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lorica.secure_sum.messages import DIGEST_BYTES
from lorica.secure_sum.quantisation import coordinates
from lorica.secure_sum.stages import add_up
from tests.secure_sum.crowd import SHAPES, Clients, agreed, check, expected
from tests.secure_sum.test_attacks import knowing
from tests.tiers import integration

STAGES = ["keys", "shares", "masked", "revealed"]
ODD = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.0, -0.0, 0.25, 1e-300, 1e300),
    *(float("nan"), float("inf"), float("-inf"), "", "0", "x", "keys", "one", "00" * 32, "ff" * 64, "\ud800", "é" * 9),
    *([], {}, [[]], [0, 1, 2], [[0, 0.5], [1, 0.5]], {"0": "00"}, {"0": {}}, [None] * 100, "[" * 2000),
]


def mutated_value(value: Any, draws: random.Random) -> Any:
    """One place of a JSON value changed."""
    if isinstance(value, dict) and value and draws.random() < 0.85:
        key = draws.choice(sorted(value))
        kind = draws.randrange(8)
        rest = {other: value[other] for other in value if other != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {draws.choice(["", "7", "-1", "00", "1.5", "x", str(2**70), key.upper()]): value[key]}
        if kind == 2:
            return value | {draws.choice(["more", "9", " 1"]): draws.choice(ODD)}
        if kind == 3:
            return value | {key: value[draws.choice(sorted(value))]}
        return value | {key: mutated_value(value[key], draws)}
    if isinstance(value, list) and value and draws.random() < 0.85:
        place = draws.randrange(len(value))
        kind = draws.randrange(6)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return [*value, value[place]]
        if kind == 2:
            return draws.sample(value, len(value))
        return [*value[:place], mutated_value(value[place], draws), *value[place + 1 :]]
    if isinstance(value, str) and value and draws.random() < 0.7:
        place = draws.randrange(len(value))
        return value[:place] + draws.choice(["", "0", "f", "g", " ", value[place] * 2, "\0"]) + value[place + 1 :]
    if isinstance(value, float) and draws.random() < 0.5:
        return value * draws.choice([1 + 2**-30, 0.5, 2.0, -1.0])
    if type(value) is int and draws.random() < 0.5:
        return value + draws.choice([-1, 1, 2**32])
    return draws.choice(ODD)


def mutated_bytes(content: bytes, draws: random.Random) -> bytes:
    place = draws.randrange(len(content) + 1)
    kind = draws.randrange(7)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content + draws.randbytes(draws.randrange(1, 70))
    if kind == 2:
        return content[:place] + draws.randbytes(draws.randrange(1, 40)) + content[place:]
    if kind == 3:
        return draws.randbytes(len(content))
    if kind == 4:
        return draws.choice([b"", b"{}", b"[]", b"null", b"\xff" * len(content), bytes(len(content)), b"[" * 100_000])
    if kind == 5:
        start = draws.randrange(max(len(content) - 32, 1))
        return content[:start] + content[place : place + 32] + content[start + 32 :]
    place = min(place, len(content) - 1)
    return content[:place] + bytes([content[place] ^ (1 << draws.randrange(8))]) + content[place + 1 :]


def mutated_question(question: str, draws: random.Random) -> str:
    if draws.random() < 0.8:
        return json.dumps(mutated_value(json.loads(question), draws))
    return mutated_bytes(question.encode(), draws).decode(errors="replace")


def mutated_answer(stage: str, answer: bytes, draws: random.Random) -> bytes:
    if stage == "shares" and draws.random() < 0.7:
        return json.dumps(mutated_value(json.loads(answer), draws)).encode()
    return mutated_bytes(answer, draws)


def words(reply: bytes) -> np.ndarray:
    return np.frombuffer(reply, np.uint32, offset=2 * DIGEST_BYTES).astype(np.int64)


def fuzz(stage: str, side: str, rounds: int) -> None:
    """`rounds` sums, each with client 2's question or answer of one stage changed."""
    draws = random.Random(f"{stage} {side}")
    finished = 0
    for number in range(rounds):
        # Half of them between clients that know each other: signatures are then part of what is changed.
        clients = knowing() if number % 2 else Clients()
        change = np.zeros(coordinates(SHAPES))

        def ask(asked: str, questions: Mapping[int, str], clients: Clients = clients) -> dict[int, bytes]:
            nonlocal change
            if asked != stage:
                return clients.ask(asked, questions)
            if side == "question":
                return clients.ask(asked, {**questions, 2: mutated_question(questions[2], draws)})
            answers = clients.ask(asked, questions)
            changed = mutated_answer(stage, answers[2], draws)
            if stage == "masked" and len(changed) == len(answers[2]):
                # What a client adds up is its own affair: it may as well have masked another input.
                change = words(changed) - words(answers[2])
            return {**answers, 2: changed}

        names, total = add_up(agreed(f"fuzz {number}"), ask)
        if not names:
            continue
        finished += 1
        assert set(names) <= {0, 1, 2, 3}
        if 2 not in names or not change.any():
            check(names, total)
        else:
            check_change(names, total, change)
    # Otherwise something else than the change stops every sum.
    assert finished > rounds // 20


def check_change(names: list[int], total: Mapping[str, Any], change: np.ndarray) -> None:
    """The sum moved, modulo 2³², by what client 2 changed, and by nothing else."""
    step = agreed().setup.step
    start = 0
    for name, reference in sorted(expected(names).items()):
        moved = total[name].double().numpy().reshape(-1) / step - reference.numpy().reshape(-1) / step
        wanted = change[start : start + len(moved)]
        off = (moved - wanted + 2**31) % 2**32 - 2**31
        # fp32 holds a sum of this size to about 2⁸ steps.
        assert np.abs(off).max() <= 2**9
        start += len(moved)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("side", ["question", *integration("answer")])
def test_mutated_messages_end_in_no_crash_and_no_wrong_sum(stage: str, side: str) -> None:
    fuzz(stage, side, 50)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("side", ["question", "answer"])
def test_many_mutated_messages_end_in_no_crash_and_no_wrong_sum(stage: str, side: str) -> None:
    fuzz(stage, side, 500)
