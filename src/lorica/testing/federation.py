"""A tiny federation in this process, which keeps every request and reply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.names import Pair
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from lorica.config import MethodConfig, OptimizerConfig, PrivacyConfig, validate
from lorica.engines.local import LocalEngine
from lorica.local.optimizers import learning_rates
from lorica.messages import Request
from lorica.methods.base import Method, make_method
from lorica.methods.server import Server
from lorica.owner.client import Client
from lorica.privacy.home import Home
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import plan_client
from lorica.run.checkpoint import Checkpoint
from lorica.schedule import participation_schedule
from lorica.server.federation import Federation, Weighting
from lorica.testing.models import tiny_bert
from lorica.testing.records import TinyRecords

RUN = "run"
DATASET = "data"
STEPS, LEARNING_RATE = 2, 0.5
# A fixed noise multiplier: calibrating one takes a second, and nothing here depends on its value.
PRIVACY = PrivacyConfig(epsilon=None, noise_multiplier=1.0, delta=1e-3, clip_norm=1.0, noise="reproducible")
UNCLIPPED = PrivacyConfig(noise="none", clip_norm=None)


@dataclass(frozen=True)
class Adapter:
    """The server's adapter at one moment.

    Attributes:
        tensors: name -> value.
        merged: site name -> `(B, A)` merged into its frozen weight.
    """

    tensors: dict[str, Tensor]
    merged: dict[str, Pair]

    @classmethod
    def of(cls, model: AdapterState) -> Adapter:
        return cls(dict(model.tensors), dict(model.merged))


@dataclass(frozen=True)
class ClientModel:
    """A client right after its work of one exchange.

    Attributes:
        held: the server's adapter as the client has it.
        tensors: every trainable tensor of its model.
        weights: site name -> weight that the site computes with, `W0 + γ B A`, fp64.
    """

    held: Adapter
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]


class RecordingEngine(LocalEngine):
    """A local engine that keeps what passes, an entry an exchange.

    Attributes:
        models: the server's adapter before the exchange.
        requests, replies: client -> message.
        ends: client -> its model after the work.
    """

    def __init__(self, model: AdaptedModel, clients: Mapping[int, Client], server: Server) -> None:
        super().__init__(model, server.model, clients)
        self._server = server
        self.models: list[Adapter] = []
        self.requests: list[dict[int, Request]] = []
        self.replies: list[dict[int, dict[str, Tensor]]] = []
        self.ends: list[dict[int, ClientModel]] = []

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        self.models.append(Adapter.of(self._server.model))
        replies: dict[int, dict[str, Tensor]] = {}
        ends = {}
        for number in sorted(requests):
            replies |= super().exchange({number: requests[number]})
            client = self.clients[number]
            weights = {site.name: dense_weight(self._model, site) for site in self._model.sites}
            held = Adapter(dict(client.held), dict(client.merged))
            ends[number] = ClientModel(held, self._model.read(), weights)
        self.requests.append(dict(requests))
        self.replies.append(replies)
        self.ends.append(ends)
        return replies


def tiny_ledger(folder: Path) -> Ledger:
    """`ledger.sqlite` in a folder, with its index there too, so that tests leave nothing in the account's own."""
    return Ledger(folder / "ledger.sqlite", Home(folder / "home"))


def tiny_federation(
    method: str | type[Method],
    folder: Path,
    options: Mapping[str, Any] | None = None,
    clients: int = 3,
    participants: int | None = None,
    seed: int = 0,
    privacy: PrivacyConfig = PRIVACY,
    batch_size: int = 8,
    rounds: int = 4,
    steps: int = STEPS,
    rank: int = 2,
    weighting: Weighting = "uniform",
    optimizer: OptimizerConfig | None = None,
    secure_sum: bool = False,
    min_clients: int | None = None,
    **server: Any,
) -> Federation:
    """A federation of clients with `20 + 5 k` random texts each, before its first round; its engine records.

    Args:
        method: name of a registered method, or a class, which need not be registered.
        folder: of the ledger, `ledger.sqlite`.
        options: keys beside `method.name`.
        participants: clients a round; None for all.
        server: further fields of `lorica.methods.base.Server`, such as a server optimiser.

    Raises:
        UserError: no such method, or an option that it does not have.
    """
    model, start = _shared_model(seed, rank)
    state = AdapterState(model.sites, start, model.frozen_weight)
    made = _make(method, dict(options or {}), model.sites)
    made.start(state, seed)
    schedule = participation_schedule(clients, rounds, clients if participants is None else participants, seed)
    records = {number: 20 + 5 * number for number in range(clients)}
    plans = {
        number: plan_client(
            number, count, batch_size, steps * sum(number in who for who in schedule), privacy, min_clients
        )
        for number, count in records.items()
    }
    optimizer = optimizer or OptimizerConfig(lr=LEARNING_RATE)
    ledger = tiny_ledger(folder)
    members = {
        number: Client(number, TinyRecords.texts(count, number), plans[number], ledger, DATASET, seed, 1024)
        for number, count in records.items()
    }
    driven = Server(
        model=state,
        rounds=rounds,
        terms={number: plan.terms for number, plan in plans.items()},
        optimizer=optimizer,
        local_steps=steps,
        full_rates=learning_rates(optimizer, list(state.tensors)),
        seed=seed,
        **server,
    )
    engine = RecordingEngine(model, members, driven)
    return Federation(RUN, made, driven, engine, plans, schedule, weighting, min_clients, secure_sum)


@lru_cache(maxsize=4)
def _shared_model(seed: int, rank: int) -> tuple[AdaptedModel, dict[str, Tensor]]:
    """One model for all federations of a process, as for all clients of one: whoever works writes all of its tensors.

    Returns:
        The model, and its trainable tensors before anybody trained them.
    """
    model = tiny_bert(seed, rank)
    return model, model.read()


def _make(method: str | type[Method], options: dict[str, Any], sites: list[Site]) -> Method:
    if isinstance(method, str):
        return make_method(MethodConfig(name=method, **options), sites)
    return method(validate(method.Options, options, prefix="method"), sites)


def run_rounds(some: Federation, rounds: int | None = None) -> Federation:
    """The same federation, so many rounds later; by default after its last one."""
    for _ in range(some.server.rounds - some.server.round if rounds is None else rounds):
        some.round()
    return some


def checkpoint_of(some: Federation) -> Checkpoint:
    """What a run writes after a round."""
    server = some.server
    model, method = server.model, some.method
    return Checkpoint(server.round, dict(model.tensors), dict(model.merged), method.state_dict(), server.state_dict())


def resume(some: Federation, checkpoint: Checkpoint) -> Federation:
    """A new federation, set to where another one stopped."""
    some.server.round = checkpoint.round
    some.server.model.assign(checkpoint.adapter)
    some.server.model.merged = dict(checkpoint.merged)
    some.server.load_state_dict(checkpoint.server)
    some.method.load_state_dict(checkpoint.method)
    return some


def dense(adapter: Adapter | AdapterState, site: Site) -> Tensor:
    """What a site adds to its original weight, over `γ`: `B_merged A_merged + B R A`, by dense algebra, fp64."""
    tensors, merged = adapter.tensors, adapter.merged.get(site.name)
    b, a = tensors[site.b].double(), tensors[site.a].double()
    middle = tensors.get(site.r, torch.eye(site.rank)).double()
    total = b @ middle @ a
    return total if merged is None else total + merged[0].double() @ merged[1].double()


def dense_weight(model: AdaptedModel, site: Site) -> Tensor:
    """The site's weight as the model computes with it: frozen weight plus `γ B A`, fp64."""
    layer = model.peft_model.base_model.model.get_submodule(site.name)
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    total: Tensor = layer.get_base_layer().weight.detach().double() + site.scale * (b.double() @ a.double()).detach()
    return total
