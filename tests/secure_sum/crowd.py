"""Four clients that answer the stages in one process, each with its part stored as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.requirements import Requirements
from lorica.secure_sum.setup import Setup, SummationError
from lorica.secure_sum.stages import Input, Part, add_up, run_client_stage

RUN = "run-7"
SHAPES = {"a": (3, 4), "b": (5,)}
WEIGHTS = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
BOUND = 5.0


def inputs(client: int, place: tuple[int, int] = (1, 1)) -> dict[str, Tensor]:
    """What a client releases in a round's exchange."""
    draws = torch.Generator().manual_seed(client + 100 * place[0] + 10 * place[1])
    return {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}


def agreed(
    name: str = "one",
    place: tuple[int, int] = (1, 1),
    weights: Mapping[int, float] = WEIGHTS,
    threshold: int | None = None,
    bound: float = BOUND,
) -> Agreement:
    setup = Setup(name, len(weights), threshold or len(weights) // 2 + 1, 32, bound)
    return Agreement(setup, RUN, *place, weights, SHAPES)


def requirements(own: int, **changes: Any) -> Requirements:
    return replace(Requirements(RUN, own, max_share=0.6), **changes)


class Clients:
    """Clients that refuse in silence.

    Attributes:
        silent: (stage, client) pairs that give no answer.
        garbled: those that lie.
        derived: exchanges of which the input is a function of the exchange before.
        required: client -> what it insists on.
        refusals: what clients have refused, in order.
    """

    def __init__(
        self, silent: Collection[tuple[str, int]] = (), garbled: Collection[tuple[str, int]] = (), **changes: Any
    ) -> None:
        self.silent, self.garbled = silent, garbled
        self.required: Callable[[int], Requirements] = lambda own: requirements(own, **changes)
        self.derived: set[tuple[int, int]] = set()
        self.stored: dict[int, bytes] = {}
        self.asked: list[str] = []
        self.refusals: list[str] = []

    def part(self, client: int) -> Part:
        return Part.from_bytes(self.stored[client]) if client in self.stored else Part()

    def given(self, client: int) -> Callable[[Agreement], Input]:
        def given(agreement: Agreement) -> Input:
            place = (agreement.round, agreement.exchange)
            return Input(inputs(client, place), place in self.derived)

        return given

    def answered(self, client: int, question: Mapping[str, Any] | str) -> tuple[Part, bytes]:
        """A client's answer, without storing anything."""
        text = question if isinstance(question, str) else json.dumps(question)
        return run_client_stage(self.part(client), self.required(client), text, self.given(client))

    def ask(self, stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
        answers = {}
        for client, question in questions.items():
            self.asked.append(stage)
            if (stage, client) in self.silent:
                continue
            try:
                part, content = self.answered(client, question)
            except SummationError as error:
                self.refusals.append(f"{client}: {error}")
                continue
            self.stored[client] = part.to_bytes()
            answers[client] = b"\x07" * len(content) if (stage, client) in self.garbled else content
        return answers

    def masked_once(self, agreement: Agreement, stop: Collection[int] = ()) -> dict[int, dict[str, Any]]:
        """Make a sum; returns every client's question of the stage of the masked input, which `stop` do not get."""
        questions: dict[int, dict[str, Any]] = {}

        def ask(stage: str, asked: Mapping[int, str]) -> dict[int, bytes]:
            if stage == "masked":
                questions.update({client: json.loads(question) for client, question in asked.items()})
                asked = {client: question for client, question in asked.items() if client not in stop}
            return self.ask(stage, asked)

        add_up(agreement, ask)
        return questions


def expected(
    clients: Collection[int], weights: Mapping[int, float] = WEIGHTS, place: tuple[int, int] = (1, 1)
) -> dict[str, Tensor]:
    terms = {client: inputs(client, place) for client in clients}
    return {name: sum(weights[one] * terms[one][name].double() for one in clients) for name in SHAPES}  # type: ignore[misc]


def check(clients: Collection[int], total: Mapping[str, Tensor], **which: Any) -> None:
    """The sum over these clients, to the quantisation."""
    reference = expected(clients, **which)
    assert total.keys() == reference.keys()
    for name, value in total.items():
        assert (value.double() - reference[name]).abs().max() <= len(clients) * agreed().setup.step / 2 + 1e-6
