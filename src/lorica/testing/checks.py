"""What must hold for every method, whoever wrote it, read off one short run of a tiny federation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.names import (
    ENERGY,
    SKETCH,
    Pair,
    factor_a,
    factor_b,
    flat_pairs,
    is_a,
    is_b,
    is_factor,
    is_middle,
    middle,
    other_factor,
    site_of,
)
from lorica.adapters.state import AdapterState, leading
from lorica.config import PrivacyConfig
from lorica.errors import UserError
from lorica.local.sketches import sketch_matrix
from lorica.local.step import LocalStep
from lorica.messages import Projection, Reply, Request, Training
from lorica.methods.base import Method, Round, Server
from lorica.privacy.accounting import Steps
from lorica.privacy.plan import ClientPlan, Refused
from lorica.privacy.released import Released
from lorica.run.checkpoint import load_checkpoint, save_checkpoint
from lorica.server.federation import Federation
from lorica.tasks.records import Batch
from lorica.testing.federation import (
    DATASET,
    PRIVACY,
    RUN,
    UNCLIPPED,
    Adapter,
    ClientModel,
    RecordingEngine,
    checkpoint_of,
    dense,
    dense_weight,
    resume,
    run_rounds,
    tiny_federation,
    tiny_ledger,
)
from lorica.testing.models import mean_gradient, tiny_bert

Value = TypeVar("Value")
CLIENTS, PARTICIPANTS = 4, 3
"""Some sit out each round, and three is the least that a secure sum takes."""
ALONE = 20
"""Records of client 0, the only one where a client is compared with centralised training."""
ROUNDS, STOP = 3, 2
"""Rounds of a run, and those before it is stopped and resumed."""


@dataclass(frozen=True)
class Recording:
    """One run of a method, and where it was on the way.

    Attributes:
        kind: the method's class.
        options: keys beside `method.name`.
        participants: clients a round.
        folder: of the ledger. `stopped` in it has the checkpoint and the ledger as they were after `STOP` rounds.
        federation: after the last round. Its engine holds every request and reply.
        adapters: before the first round and after each.
        exchanges: of each round: the places of its exchanges in the engine's lists.
        replies: as they were before they were encoded.
    """

    kind: type[Method]
    options: Mapping[str, Any]
    participants: int
    folder: Path
    federation: Federation
    adapters: list[Adapter]
    exchanges: list[range]
    replies: list[Reply]

    @property
    def engine(self) -> RecordingEngine:
        assert isinstance(self.federation.engine, RecordingEngine)
        return self.federation.engine

    @cached_property
    def alone(self) -> Federation:
        """Client 0 alone, after all rounds: all records in every batch, and no noise."""
        with TemporaryDirectory() as folder:
            return run_rounds(
                tiny_federation(
                    self.kind,
                    Path(folder),
                    self.options,
                    clients=1,
                    privacy=UNCLIPPED,
                    batch_size=ALONE,
                    rounds=ROUNDS,
                )
            )

    def again(self, folder: Path) -> Federation:
        """The same federation, before its first round."""
        return _federation(self.kind, self.options, self.participants, folder)

    def require(self, holds: bool, problem: str) -> None:
        """Raise AssertionError with the method's name unless something holds."""
        if not holds:
            raise AssertionError(f"{self.kind.name}: {problem}")


def check_method(method: str | type[Method], options: Mapping[str, Any] | None = None) -> None:
    """Check what must hold for every method: run it on a tiny federation, and compare with what was asked for.

    Four clients, of which three take part in a round, train a random BERT of two layers for three rounds of two steps.
    Takes about a second.

    * A run that starts from another adapter (`lora.start`) starts with its products.
    * Names and shapes of the adapter's tensors stay, values are finite, and some site's weight moves.
    * A client sends exactly what it was asked for, and what nobody trains stays put.
    * A client starts from the server's adapter and changes nothing that it was not to train.
    * Only `Released` tensors leave a client, and all of them carry noise.
    * The ledger is charged with the steps that were asked for, on the planned terms.
    * The order in which clients are listed does not matter.
    * A run that is resumed from a checkpoint ends as one that never stopped, bit for bit.
    * If `about.exact`: every site's new weight is `Σ_k w_k` of the clients' weights, by dense algebra.
    * Without noise, plain steps of one client are those of gradient descent by autograd.
    * Secure sums give the model that single replies give, unless the method refuses them.

    Args:
        method: name of a registered method, or a class, which need not be registered.
        options: keys beside `method.name`.

    Raises:
        AssertionError: names the method and what does not hold.
        UserError: no such method, or an option that it does not have.

    >>> check_method("ffa-lora")
    """
    with TemporaryDirectory() as folder:
        recording = record(method, Path(folder), options)
        for check in CHECKS.values():
            check(recording)


def record(
    method: str | type[Method],
    folder: Path,
    options: Mapping[str, Any] | None = None,
    participants: int = PARTICIPANTS,
) -> Recording:
    """Run a method once, for all checks to read.

    Args:
        folder: empty.
        participants: clients a round, of `CLIENTS`.

    Raises:
        AssertionError: a client or the server refused what the method asked for, or its state cannot be saved.
        UserError: no such method, or an option that it does not have.
    """
    some = _federation(method, options or {}, participants, folder)
    # The class: looking a name up takes longer than a step.
    recording = Recording(
        type(some.method), options or {}, participants, folder, some, [Adapter.of(some.server.model)], [], []
    )
    encode = Reply.encode

    def keep(reply: Reply) -> bytes:
        recording.replies.append(reply)
        return encode(reply)

    with mock.patch.object(Reply, "encode", keep):
        for number in range(1, ROUNDS + 1):
            first = len(recording.engine.requests)
            try:
                some.round()
            except (Refused, UserError) as error:
                raise AssertionError(f"{recording.kind.name}: round {number} fails: {error}") from error
            recording.exchanges.append(range(first, len(recording.engine.requests)))
            recording.adapters.append(Adapter.of(some.server.model))
            if number == STOP:
                try:
                    save_checkpoint(folder / "stopped", checkpoint_of(some))
                except (TypeError, ValueError) as error:
                    problem = f"state_dict gives what a checkpoint cannot hold: {error}"
                    raise AssertionError(f"{recording.kind.name}: {problem}") from error
                shutil.copy(folder / "ledger.sqlite", folder / "stopped")
    return recording


def check_shapes(recording: Recording) -> None:
    """Names and shapes of the adapter's tensors stay, values are finite, and some site's weight moves.

    No site need move where each client has its own model, or where the method needs a trained head.
    """
    before, after = recording.adapters[0].tensors, recording.adapters[-1].tensors
    odd = sorted(before.keys() ^ after.keys())
    recording.require(not odd, f"tensors came or went during the rounds: {', '.join(odd)}")
    for name, value in after.items():
        shapes = tuple(before[name].shape), tuple(value.shape)
        recording.require(shapes[0] == shapes[1], f"{name} had shape {shapes[0]} and has {shapes[1]}")
        recording.require(bool(torch.isfinite(value).all()), f"{name} is not finite")
    resting = recording.kind.personal or "frozen_head" in recording.kind.refuses
    recording.require(bool(moved_sites(recording)) or resting, "no site's weight moved in any round")


def moved_sites(recording: Recording) -> set[str]:
    """Sites whose weight is not what it was before the first round."""
    before, after = recording.adapters[0], recording.adapters[-1]
    sites = recording.federation.server.model.sites
    return {site.name for site in sites if not torch.equal(dense(before, site), dense(after, site))}


def check_messages(recording: Recording) -> None:
    """A client sends exactly what it was asked for, and what nobody trains stays put."""
    moves_by_mean = "server_optimizer" not in recording.federation.method.refuses and not recording.kind.personal
    for number, exchanges in enumerate(recording.exchanges, start=1):
        trained: set[str] = set()
        for index in exchanges:
            for client, request in recording.engine.requests[index].items():
                odd = sorted(recording.engine.replies[index][client].keys() ^ _asked(request))
                recording.require(not odd, f"in round {number} a reply is not what was asked for: {', '.join(odd)}")
                trained |= set(request.work.trained) if isinstance(request.work, Training) else set()
        before = recording.adapters[number - 1].tensors
        for name, value in recording.adapters[number].tensors.items():
            recording.require(
                name in trained or not moves_by_mean or torch.equal(value, before[name]),
                f"{name} moved in round {number}, and no client trained it; a method that changes such tensors itself "
                "refuses server_optimizer (lorica.methods.components.NEW_BASIS)",
            )


def _asked(request: Request) -> set[str]:
    """Names of the tensors of a reply, but for the energies."""
    work = request.work
    if isinstance(work, Projection):
        return {f"{SKETCH}{site}" for site in work.bases}
    assert isinstance(work, Training)
    sent = set(work.trained) - set(work.personal)
    if work.sketch_columns is not None:
        sent = {f"{SKETCH}{site_of(name)}" if is_factor(name) else name for name in sent}
    return sent | ({f"{ENERGY}{name}" for name in work.trained} if work.last_step_energy else set())


def check_clients(recording: Recording) -> None:
    """A client starts from the server's adapter and changes nothing that it was not to train."""
    engine = recording.engine
    for model, requests, ends in zip(engine.models, engine.requests, engine.ends, strict=True):
        for client, request in requests.items():
            if not isinstance(request.work, Training):
                continue
            rank, held = request.work.rank, ends[client].held
            where = f"client {client} in round {request.round}"
            sent = {name: leading(name, value, rank) for name, value in model.tensors.items()}
            recording.require(_same(held.tensors, sent), f"{where} starts from other tensors than the server's")
            recording.require(_same_pairs(held.merged, model.merged), f"{where} lacks some of what was merged")
            for name in untrained(request, ends[client]):
                between = sent.get(middle(site_of(name))) if is_b(name) else None
                start = sent[name] if between is None else sent[name] @ between
                kept = torch.equal(leading(name, ends[client].tensors[name], rank), start)
                recording.require(kept, f"{where} changed {name}, which it was not to train")


def untrained(request: Request, end: ClientModel) -> set[str]:
    """Trainable tensors of a client's model that a request leaves alone."""
    assert isinstance(request.work, Training)
    # `B R` takes the place of B in the model.
    return end.tensors.keys() - {factor_b(site_of(name)) if is_middle(name) else name for name in request.work.trained}


def check_released(recording: Recording) -> None:
    """Only `Released` tensors leave a client, and all of them carry noise."""
    recording.require(bool(recording.replies), "no client replied")
    for reply in recording.replies:
        for name, value in reply.tensors.items():
            recording.require(isinstance(value, Released), f"{name} left client {reply.client} without a mechanism")
    with TemporaryDirectory() as folder:
        louder = PRIVACY.model_copy(update={"noise_multiplier": 2.0})
        other = _federation(recording.kind, recording.options, recording.participants, Path(folder), louder)
        # Batches are the same ones, and so the first step differs by its noise alone.
        other.round()
        assert isinstance(other.engine, RecordingEngine)
        for client, sent in other.engine.replies[0].items():
            for name, noisy in sent.items():
                same = torch.equal(noisy, recording.engine.replies[0][client].get(name, torch.zeros(())))
                recording.require(not same, f"{name} does not depend on the noise")


def check_ledger(recording: Recording) -> None:
    """The ledger is charged with the steps that were asked for, on the planned terms."""
    releases = tiny_ledger(recording.folder).releases(DATASET)
    asked = [
        (request.client, request.round, request.work.steps if isinstance(request.work, Training) else 0)
        for requests in recording.engine.requests
        for _, request in sorted(requests.items())
    ]
    charged = [(release.client, release.round, release.steps) for release in releases]
    recording.require(
        charged == asked, f"(client, round, steps) of the ledger's rows are {charged}, and {asked} were asked for"
    )
    for number, plan in recording.federation.plans.items():
        own = [release for release in releases if release.client == number]
        for release in own:
            terms = Steps(plan.terms.sampling_rate, plan.terms.noise_multiplier, release.steps)
            recording.require(release.cost == terms, f"client {number} was charged {release.cost}, planned was {terms}")
        steps = sum(release.steps for release in own)
        problem = f"client {number} was charged for {steps} steps, and its budget covers {plan.max_steps}"
        recording.require(steps <= plan.max_steps, problem)


def check_order(recording: Recording) -> None:
    """The order in which clients are listed does not matter, to the last bit."""
    with TemporaryDirectory() as folder:
        some = recording.again(Path(folder))
        some.method = _Reversed(some.method)  # type: ignore[assignment]
        some.engine = _Replay(recording)  # type: ignore[assignment]
        for number in range(1, ROUNDS + 1):
            some.round()
            same = _same_adapter(Adapter.of(some.server.model), recording.adapters[number])
            recording.require(
                same,
                f"the adapter after round {number} depends on the order in which clients are listed; go through them "
                "by number, as in sorted(replies.updates)",
            )


class _Reversed:
    """A method that is given its clients in descending order."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def round(self, server: Server) -> Round:
        steps = self.method.round(server)
        asked = next(steps)
        while True:
            replies = yield asked
            try:
                asked = steps.send(
                    replace(
                        replies,
                        updates=_turned(replies.updates),
                        weights=_turned(replies.weights),
                        energies=_turned(replies.energies),
                        sketches=_turned(replies.sketches),
                    )
                )
            except StopIteration:
                return


def _turned(values: Mapping[int, Value]) -> dict[int, Value]:
    return dict(reversed(list(values.items())))


class _Replay:
    """An engine that gives a recording's replies again, for the same requests."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.exchanges = iter(zip(recording.engine.requests, recording.engine.replies, strict=True))

    def join(self, run: str) -> Mapping[int, ClientPlan]:
        return self.recording.federation.plans

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        before, replies = next(self.exchanges)
        for client, request in requests.items():
            same = client in before and request.encode() == before[client].encode()
            problem = f"what it asks of client {client} in round {request.round} depends on the order of other clients"
            self.recording.require(same, problem)
        return dict(reversed(replies.items()))


def check_resume(recording: Recording) -> None:
    """A run that is resumed from a checkpoint ends as one that never stopped, bit for bit."""
    with TemporaryDirectory() as folder:
        some = _resumed(recording, Path(folder))
        try:
            some.round()
        except (Refused, UserError) as error:
            raise AssertionError(f"{recording.kind.name}: resumed after round {STOP}, it fails: {error}") from error
        recording.require(
            _same_adapter(Adapter.of(some.server.model), recording.adapters[STOP + 1]),
            f"resumed after round {STOP}, it has another adapter after the next one; state_dict and load_state_dict "
            "carry what its rounds depend on",
        )
        own, other = (each.engine.personal(RUN, each.server.round) for each in (recording.federation, some))
    same = all(_same(own[client], other[client]) for client in own)
    recording.require(same, "resumed, clients end with other tensors of their own")


def _resumed(recording: Recording, folder: Path) -> Federation:
    """A new federation after `STOP` rounds, with the ledger as it was then."""
    shutil.copy(recording.folder / "stopped" / "ledger.sqlite", folder)
    found = load_checkpoint(recording.folder / "stopped")
    assert found is not None
    return resume(recording.again(folder), found)


def check_exactness(recording: Recording) -> None:
    """If `about.exact`: every site's new weight is `Σ_k w_k` of the clients' weights, by dense algebra."""
    if not recording.kind.about.exact:
        return
    some, engine = recording.federation, recording.engine
    base = tiny_bert(some.server.seed)
    for number, exchanges in enumerate(recording.exchanges, start=1):
        ends: dict[int, ClientModel] = {}
        for index in exchanges:
            requests = engine.requests[index]
            ends |= {c: engine.ends[index][c] for c, request in requests.items() if isinstance(request.work, Training)}
        total = sum(some.plans[client].records for client in ends)
        for site in some.server.model.sites:
            mean = sum(some.plans[client].records / total * end.weights[site.name] for client, end in ends.items())
            found = dense_weight(base, site) + site.scale * dense(recording.adapters[number], site)
            close = torch.allclose(found, torch.as_tensor(mean), rtol=1e-5, atol=1e-5)
            problem = f"about.exact is set, and after round {number} the weight of {site.name} is not the clients' mean"
            recording.require(close, problem)


def check_centralised(recording: Recording) -> None:
    """Without noise, plain steps of one client are those of gradient descent by autograd."""
    for name, update, expected in centralised_updates(recording):
        close = torch.allclose(update, expected, rtol=1e-4, atol=1e-6)
        recording.require(close, f"without noise, a client's {name} is not what gradient descent gives")


def centralised_updates(recording: Recording) -> list[tuple[str, Tensor, Tensor]]:
    """Name, reply and what autograd makes of it, of `Recording.alone`.

    Left out are projections, and steps that do more to a gradient than scaled gradient descent does (`LocalStep`).
    """
    some = recording.alone
    engine, found = some.engine, []
    assert isinstance(engine, RecordingEngine)
    reference, examples = tiny_bert(some.server.seed), engine.clients[0].records.batch(np.arange(ALONE))
    own: dict[str, Tensor] = {}
    for model, requests, replies in zip(engine.models, engine.requests, engine.replies, strict=True):
        request = requests[0]
        work = request.work
        if not isinstance(work, Training):
            continue
        if replace(work.local, alternate=False, kept=1.0, damping=None) != LocalStep():
            continue
        start = {name: leading(name, value, work.rank) for name, value in model.tensors.items()} | own
        reference.merge(model.merged)
        end = _descend(reference, work, start, examples)
        own |= {name: end[name] for name in work.personal}
        for name, update in replies[0].items():
            if name.startswith(SKETCH):
                site = name.removeprefix(SKETCH)
                b, a = end[factor_b(site)], end[factor_a(site)]
                omega = sketch_matrix(some.server.seed, request.round, site, a.shape[1], update.shape[1])
                found.append((name, update, b @ (a @ omega)))
            elif name in end:
                found.append((name, update, end[name] - start[name]))
    return found


def _descend(model: AdaptedModel, work: Training, start: Mapping[str, Tensor], examples: Batch) -> dict[str, Tensor]:
    """Gradient descent on the mean loss, on what each step trains."""
    values = dict(start)
    for step in range(work.steps):
        model.write(values)
        gradients, moved = mean_gradient(model, examples), {}
        for name in work.local.active(work.trained, step):
            if is_middle(name):
                b = factor_b(site_of(name))
                gradient = start[b].T @ gradients[b]
            else:
                gradient = leading(name, gradients[name], work.rank)
            if work.local.damping is not None and is_factor(name):
                gradient = _scaled(name, gradient, values, work.local.damping)
            moved[name] = values[name] - work.rates[name] * gradient
        values |= moved
    return values


def _scaled(name: str, gradient: Tensor, values: Mapping[str, Tensor], damping: float) -> Tensor:
    """`(BᵀB + δI)⁻¹ G` of a factor A, `G (AAᵀ + δI)⁻¹` of a factor B."""
    other = values[other_factor(name)]
    gram = other.T @ other if is_a(name) else other @ other.T
    inverse = torch.linalg.inv(gram + damping * torch.eye(len(gram)))
    scaled: Tensor = inverse @ gradient if is_a(name) else gradient @ inverse
    return scaled


def check_sums(recording: Recording) -> None:
    """Secure sums give the model that single replies give, to the quantisation, unless the method refuses them.

    Factors of a product are not compared: those of an SVD may turn.
    """
    if "secure_sum" in recording.federation.method.refuses:
        return
    with TemporaryDirectory() as folder:
        some = _resumed(recording, Path(folder))
        some.secure_sum = True
        try:
            some.round()
        except Exception as error:
            problem = (
                f"fails under secure sums with {type(error).__name__}: {error}; a method that needs single replies "
                "refuses secure_sum (lorica.methods.components.SINGLE_REPLIES)"
            )
            raise AssertionError(f"{recording.kind.name}: {problem}") from error
    assert isinstance(some.engine, RecordingEngine)
    recording.require(not some.engine.requests, "single replies were asked for under secure sums")
    model, plain = some.server.model, recording.adapters[STOP + 1]
    pairs = [(site.name, dense(model, site), dense(plain, site)) for site in model.sites]
    pairs += [(name, model.tensors[name], plain.tensors[name]) for name in model.head]
    for name, summed, single in pairs:
        close = torch.allclose(summed, single, rtol=0, atol=1e-4 * float(single.abs().max()) + 1e-6)
        recording.require(close, f"under secure sums {name} is not what single replies give")


def check_start(recording: Recording) -> None:
    """A run that starts from another adapter (`lora.start`) starts with its products `B A`."""
    method, sites = recording.federation.method, recording.federation.server.model.sites
    draws = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in recording.adapters[0].tensors.items() if not is_middle(name)}
    given = Adapter({name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}, {})
    model = AdapterState(sites, given.tensors)
    type(method)(method.options, sites).start(model, 0)
    for site in sites:
        kept = torch.allclose(dense(model, site), dense(given, site), rtol=0, atol=1e-4)
        recording.require(kept, f"start changes the product B A of {site.name}, which lora.start gave")


CHECKS: dict[str, Callable[[Recording], None]] = {
    "shapes": check_shapes,
    "messages": check_messages,
    "clients": check_clients,
    "released": check_released,
    "ledger": check_ledger,
    "order": check_order,
    "resume": check_resume,
    "exactness": check_exactness,
    "centralised": check_centralised,
    "sums": check_sums,
    "start": check_start,
}
"""What `check_method` checks, one by one."""


def _federation(
    method: str | type[Method],
    options: Mapping[str, Any],
    participants: int,
    folder: Path,
    privacy: PrivacyConfig = PRIVACY,
) -> Federation:
    return tiny_federation(
        method, folder, options, CLIENTS, participants, privacy=privacy, rounds=ROUNDS, weighting="records"
    )


def _same_adapter(one: Adapter, other: Adapter) -> bool:
    return _same(one.tensors, other.tensors) and _same_pairs(one.merged, other.merged)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _same_pairs(one: Mapping[str, Pair], other: Mapping[str, Pair]) -> bool:
    return _same(flat_pairs(one, "B:", "A:"), flat_pairs(other, "B:", "A:"))
