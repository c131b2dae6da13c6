"""The audit of the installed mechanism, without data: every method's exchanges through the code that owners run.

For each method, a federation runs three rounds on made-up canaries with orthogonal gradients, three times: with the
noise of a claim, with nearly none as a control, and with nearly none and a small sampling rate. What leaves the owners
is read back (`lorica.audit.reading`) and compared with what it has to be. Where the owners of a method can share the
noise, their secure sums are audited as well, for a server that colludes with one of them. Where a method offers
client-level DP, so are the means that a trusted server releases (`lorica.audit.cohort`): the canaries are clients then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.names import ENERGY, SKETCH, factor_a, factor_b
from lorica.adapters.state import AdapterState
from lorica.audit import exact
from lorica.audit.attack import Fit, Ridge, fit
from lorica.audit.canaries import Canaries, toss
from lorica.audit.cohort import WatchedCohort, read_mean, watched_cohort
from lorica.audit.estimators import CONFIDENCE, Scores, best_plans, fdp_refutes_any, trade_off_inverse
from lorica.audit.exact import Outcome
from lorica.audit.findings import findings, nearly_without_noise
from lorica.audit.linear_model import Gradients, linear_model
from lorica.audit.reading import Reading, Unreadable, read, read_sum, with_factors
from lorica.audit.watching import Seen, WatchedClient, WatchedEngine
from lorica.config import MethodConfig, OptimizerConfig, PrivacyConfig
from lorica.errors import UserError
from lorica.files import throwaway_folder
from lorica.local.optimizers import learning_rates
from lorica.local.sketches import sketch_matrix
from lorica.messages import Projection, Training
from lorica.methods.base import Method, Server, make_method, registry
from lorica.privacy.home import Home
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import ClientPlan, plan_client
from lorica.registry import current_method_name, remedy_for_unknown
from lorica.schedule import participation_schedule
from lorica.server.federation import Federation

RUN, SEED, ROUNDS = "audit", 0, 3
"""Three rounds have every kind of exchange of every method in Lorica."""
OWNERS, CANARIES_EACH, CANARIES_IN_SUM = 4, 256, 384
SAMPLING_RATE = 0.25
CLIP_NORM = 1.0
COLLUDING = 1
DELTA = 1e-5
FDP_LEVEL = exact.FALSE_ALARM / 1000
OPTIMIZER = OptimizerConfig(lr=0.5)


@dataclass(frozen=True)
class Setting:
    """How a federation of canaries runs.

    Attributes:
        owners, canaries: number of owners, and of canaries of each.
        rate: sampling rate.
        privacy: terms; `noise_against` says whether the owners share the noise.
        tossed: whether coins decide which canaries are included; otherwise all are.
        of_clients: client-level DP: an owner is a cohort, whose clients are the canaries.
    """

    owners: int
    canaries: int
    rate: float
    privacy: PrivacyConfig
    tossed: bool
    of_clients: bool = False

    @property
    def shared(self) -> bool:
        return self.privacy.noise_against == "sums"

    @property
    def width(self) -> int:
        """Number of unit vectors: canaries of different owners share them, unless their replies are summed."""
        return self.canaries * (self.owners if self.shared else 1)


@dataclass(frozen=True)
class Observation:
    """What left the owners of one federation.

    Attributes:
        gradients: owner -> the gradients of its canaries.
        coins: owner -> (n,) bool, which of its canaries were included.
        refused: why the server refused a reply, which ended the federation; None if it did not.
    """

    plans: Mapping[int, ClientPlan]
    clients: Mapping[int, WatchedClient]
    engine: WatchedEngine
    gradients: Mapping[int, Gradients]
    coins: Mapping[int, np.ndarray]
    refused: str | None

    @cached_property
    def readings(self) -> list[tuple[int, Reading]]:
        """Owner and reading of each of its releases, in order; `Unreadable` as `read`."""
        found = []
        for number, client in self.clients.items():
            for seen in client.seen:
                if isinstance(client, WatchedCohort):
                    found.append((number, read_mean(seen, self.gradients[number], client)))
                elif isinstance(seen.request.work, Training):
                    found.append((number, read(with_factors(seen), self.gradients[number], SEED)))
        return found


class Auditor:
    """Audits methods; they share the models, which are the same for all.

    Args:
        epsilon: the claim, at `DELTA`.
        canaries: number of canaries whose coins the attacks guess.
    """

    def __init__(self, epsilon: float, canaries: int) -> None:
        owners = max(OWNERS, math.ceil(canaries / CANARIES_EACH))
        self._claimed = PrivacyConfig(epsilon=epsilon, delta=DELTA, clip_norm=CLIP_NORM)
        self._own = Setting(owners, math.ceil(canaries / owners), 1.0, self._claimed, True)
        shared = self._claimed.model_copy(update={"noise_against": "sums", "colluding": COLLUDING})
        in_sum = min(canaries, CANARIES_IN_SUM)
        self._sums = replace(self._own, owners=OWNERS, canaries=in_sum // OWNERS, privacy=shared)
        # Each client trains by itself, which takes longer than a record in a batch.
        self._cohort = replace(self._own, owners=1, canaries=max(64, canaries // 8), of_clients=True)
        self._models: dict[int, tuple[AdaptedModel, dict[str, Tensor]]] = {}

    def own_noise(self, method: type[Method]) -> dict[str, Any]:
        """Audit a method whose owners each add all of the noise."""
        return self._one_by_one(method, "own", self._own)

    def client_level(self, method: type[Method]) -> dict[str, Any] | None:
        """Audit a method with `privacy.unit: client`; None if it does not offer that."""
        if not method.client_level:
            return None
        return self._one_by_one(method, "client-level", self._cohort)

    def _one_by_one(self, method: type[Method], noise: str, setting: Setting) -> dict[str, Any]:
        """A row from the releases of each owner alone: with noise, nearly without, and with a small sampling rate."""
        control = replace(setting, privacy=nearly_without_noise(self._claimed))
        sampled = replace(control, owners=OWNERS, rate=SAMPLING_RATE, tossed=False)
        try:
            seen = [self.observe(method, each) for each in (setting, control, sampled)]
            tests = [
                *_noise_tests(_own_noises(seen[0])),
                *_contribution_tests(seen[1]),
                *_sampling_tests(seen[2]),
                *_derived_tests(seen[0]),
            ]
            return _row(method, noise, seen, tests, _scores(seen[0]), _scores(seen[1]))
        except Unreadable as reason:
            return {"method": method.name, "noise": noise, "not_audited": str(reason)}

    def shared_noise(self, method: type[Method]) -> dict[str, Any] | None:
        """Audit a method whose owners share the noise; None if it does not offer that."""
        if {"shared_noise", "secure_sum"} & method.refuses.keys():
            return None
        control = replace(self._sums, privacy=nearly_without_noise(self._sums.privacy))
        try:
            seen = [self.observe(method, setting) for setting in (self._sums, control)]
            sums = [list(_read_sums(one)) for one in seen]
            of_the_sum = [reading.noise(coins) for reading, coins in sums[0]]
            tests = [
                *(
                    replace(one, promise=f"{one.promise}, of an owner's part")
                    for one in _noise_tests(_own_noises(seen[0]))
                ),
                *(replace(one, promise=f"{one.promise}, of the sum") for one in _noise_tests(of_the_sum)),
                *_contribution_tests(seen[1]),
            ]
            return _row(method, "shared", seen, tests, *map(_sum_scores, sums))
        except Unreadable as reason:
            return {"method": method.name, "noise": "shared", "not_audited": str(reason)}

    def observe(self, method: type[Method], setting: Setting) -> Observation:
        """Run the federation of a method and a setting, with ledgers of its own that are deleted afterwards."""
        model, start = self._model(setting.width)
        state = AdapterState(model.sites, start, model.frozen_weight)
        made = make_method(MethodConfig(name=method.name), model.sites)
        steps = _local_steps(made, setting)
        made.start(state, SEED)
        owners, canaries = range(setting.owners), setting.canaries
        batch_size = round(setting.rate * canaries)
        noisy_steps = ROUNDS * (made.client_level if setting.of_clients else steps)
        plans = {
            owner: plan_client(owner, canaries, batch_size, noisy_steps, setting.privacy, setting.owners)
            for owner in owners
        }
        gradients = {
            owner: Gradients(
                model.sites, np.arange(canaries) + (owner * canaries if setting.shared else 0), setting.width
            )
            for owner in owners
        }
        coins = {owner: toss(canaries) if setting.tossed else np.ones(canaries, dtype=bool) for owner in owners}
        with throwaway_folder() as folder:
            ledger = Ledger(folder / "ledger.sqlite", Home(folder / "home"))
            made_of = watched_cohort if setting.of_clients else WatchedClient
            clients = {
                owner: made_of(
                    number=owner,
                    records=Canaries.of(gradients[owner].records(owner), coins[owner]),
                    plan=plans[owner],
                    ledger=ledger,
                    dataset=RUN,
                    seed=SEED,
                    micro_batch_tokens=4 * CANARIES_EACH,
                )
                for owner in owners
            }
            optimizer = _optimizer(setting)
            engine = WatchedEngine(model, state, clients)
            federation = Federation(
                run=RUN,
                method=made,
                server=Server(
                    model=state,
                    rounds=ROUNDS,
                    terms={owner: plan.terms for owner, plan in plans.items()},
                    optimizer=optimizer,
                    local_steps=steps,
                    full_rates=learning_rates(optimizer, list(state.tensors)),
                    seed=SEED,
                ),
                engine=engine,
                plans=plans,
                schedule=participation_schedule(setting.owners, ROUNDS, setting.owners, SEED),
                weighting="uniform",
                min_clients=setting.owners if setting.shared else None,
                secure_sum=setting.shared,
                trusted=setting.of_clients,
            )
            refused = None
            try:
                for _ in range(ROUNDS):
                    federation.round()
            except UserError as error:
                refused = str(error)
        return Observation(plans, clients, engine, gradients, coins, refused)

    def _model(self, width: int) -> tuple[AdaptedModel, dict[str, Tensor]]:
        if width not in self._models:
            model = linear_model(width, SEED)
            self._models[width] = model, model.read()
        return self._models[width]


def audit_mechanism(
    names: Sequence[str] | None = None,
    epsilon: float = 3.0,
    canaries: int = 1024,
    on_method: Callable[[str, int, int], None] = lambda name, done, count: None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Audit the installed mechanism, for every kind of exchange of the methods. No data is read, nothing is kept.

    Args:
        names: of methods; all registered ones by default.
        epsilon: the claim to attack, at δ = 1e-5.
        canaries: number of canaries. More give larger lower bounds; exact tests see an error of 10 % with 1,024.
        on_method: called before each method with its name, the number of those that are done, and that of all.
        executor: audits methods in other processes, one in each at a time. None: in this one.

    Returns:
        JSON-able: the terms, a row for each method and kind of noise, and whether anything was refuted.

    Raises:
        UserError: no such method, or a number out of range.
    """
    known = registry()
    chosen = [current_method_name(name) for name in names or known]
    for name in chosen:
        if name not in known:
            raise UserError("--methods", name, "no such method", remedy_for_unknown(name, known))
    if not 64 <= canaries <= 100_000:
        raise UserError("--canaries", canaries, "not between 64 and 100,000", "choose 1024 or more")
    if not 0.1 <= epsilon <= 10:
        raise UserError("--epsilon", epsilon, "not between 0.1 and 10", "choose a claim that you would make")
    audits = (map if executor is None else executor.map)(partial(_audit_method, epsilon, canaries), chosen)
    rows = []
    for done, name in enumerate(chosen):
        on_method(name, done, len(chosen))
        rows += next(audits)
    return judged(rows) | {"epsilon": epsilon, "delta": DELTA, "confidence": CONFIDENCE}


def _audit_method(epsilon: float, canaries: int, name: str) -> list[dict[str, Any]]:
    # The models are so small that threads would only wait for each other.
    with threadpool_limits(1):
        auditor, method = Auditor(epsilon, canaries), registry()[name]
        audits = (auditor.own_noise, auditor.shared_noise, auditor.client_level)
        return [row for audit in audits if (row := audit(method)) is not None]


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with the promises that are refuted in each, corrected for the number of all tests."""
    count = sum(len(row.get("tests", [])) for row in rows)
    done = [
        row | {"refuted": [one.promise for one in exact.refuted([Outcome(**test) for test in row["tests"]], count)]}
        if "tests" in row
        else row
        for row in rows
    ]
    any_refuted = any(row.get("refuted") for row in done)
    return {"rows": done, "number_of_tests": count, "false_alarm": exact.FALSE_ALARM, "refuted": any_refuted}


def _row(
    method: type[Method], noise: str, seen: list[Observation], tests: list[Outcome], scores: Scores, control: Scores
) -> dict[str, Any]:
    plan = seen[0].plans[0]
    steps, claimed = plan.steps(plan.max_steps), plan.epsilon()
    found = findings(scores, control, claimed, steps, DELTA)
    # With δ, the one-run bound has no p-value below δ times the number of canaries, so it is no test here.
    _, plan_of_guesses = best_plans(len(scores), steps, DELTA)
    refuted = fdp_refutes_any(scores, trade_off_inverse(steps), FDP_LEVEL, plan_of_guesses)
    refusals = [observation.refused for observation in seen if observation.refused is not None]
    tests = [
        *tests,
        Outcome("f-DP bound", FDP_LEVEL if refuted else 1.0, f"ε is at least {found['epsilon_fdp']:.2f}"),
        exact.accounting(claimed, steps, DELTA),
        Outcome("replies that the server accepts", 0.0 if refusals else 1.0, " ".join(refusals)),
    ]
    return {
        "method": method.name,
        "noise": noise,
        "claimed_epsilon": claimed,
        "noise_multiplier": plan.noise_multiplier,
        "steps": plan.max_steps,
        "canaries": len(scores),
        **found,
        "tests": [vars(test) for test in tests],
    }


def _own_noises(observation: Observation) -> list[dict[str, np.ndarray]]:
    """The noise of each release: with a sampling rate of 1, the included canaries are in every batch."""
    return [
        reading.noise(np.tile(observation.coins[number], reading.steps)) for number, reading in observation.readings
    ]


def _noise_tests(releases: list[dict[str, np.ndarray]]) -> Iterator[Outcome]:
    by_tensor: dict[str, list[np.ndarray]] = {}
    for noise in releases:
        for name, values in noise.items():
            by_tensor.setdefault(name, []).append(values)
    stacked = {name: np.stack(values) for name, values in by_tensor.items()}
    yield exact.noise_variance(stacked)
    yield exact.noise_of_each_coordinate(stacked)
    yield exact.normality(np.concatenate([values.ravel() for values in stacked.values()]))
    yield exact.noise_of_releases(stacked)
    yield exact.noise_of_tensors([list(noise.values()) for noise in releases])


def _contribution_tests(observation: Observation) -> Iterator[Outcome]:
    yield from _of_contributions([fit(*reading.whitened()) for _, reading in observation.readings])


def _sampling_tests(observation: Observation) -> Iterator[Outcome]:
    owners: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    fits: list[Fit] = []
    for number, reading in observation.readings:
        one = fit(*reading.whitened())
        fits.append(one)
        drawn = np.zeros(len(one.visible), dtype=bool)
        drawn[one.visible] = one.values > 0.5
        shape = (reading.steps, -1)
        owners.setdefault(number, []).append((one.visible.reshape(shape), drawn.reshape(shape)))
    for test in _of_contributions(fits):
        yield replace(test, promise=f"{test.promise}, in Poisson batches")
    memberships = [
        exact.Memberships(*(np.concatenate(parts) for parts in zip(*own, strict=True))) for own in owners.values()
    ]
    yield exact.sampling_rate(memberships, SAMPLING_RATE)
    yield exact.batch_sizes(memberships, SAMPLING_RATE)
    yield exact.independent_batches(memberships)


def _of_contributions(fits: list[Fit]) -> Iterator[Outcome]:
    values, deviations = (np.concatenate([getattr(one, key) for one in fits]) for key in ("values", "deviations"))
    yield from exact.contributions(values, deviations)
    yield exact.nothing_else(sum(one.energy for one in fits), sum(one.left for one in fits))


def _derived_tests(observation: Observation) -> Iterator[Outcome]:
    """Sketches, projections and energies are functions of noisy factors, so that they cost nothing."""
    sketches, energies = [], []
    for client in observation.clients.values():
        if isinstance(client, WatchedCohort):
            # Its sketches have noise of their own.
            continue
        for seen in client.seen:
            sketches += list(_sketch_differences(seen))
            if isinstance(seen.request.work, Training):
                energies += list(_energy_differences(seen, seen.request.work))
    if sketches:
        yield exact.derived("sketches are functions of noisy factors", sketches)
    if energies:
        yield exact.derived("energies are functions of releases", energies)


def _sketch_differences(seen: Seen) -> Iterator[float]:
    """Of `B (A Ω)` or `Aᵀ (Bᵀ Q)` with the factors that the owner keeps, where they were trained."""
    work, factors = seen.request.work, seen.start | dict(seen.sketched)
    for name, found in seen.tensors.items():
        if not name.startswith(SKETCH):
            continue
        site = name.removeprefix(SKETCH)
        b, a = factors[factor_b(site)].double(), factors[factor_a(site)].double()
        if isinstance(work, Projection):
            expected = a.T @ (b.T @ work.bases[site].double())
        else:
            omega = sketch_matrix(SEED, seen.request.round, site, a.shape[1], found.shape[1])
            expected = b @ (a @ omega.double())
        yield float((found.double() - expected).norm() / expected.norm())


def _energy_differences(seen: Seen, work: Training) -> Iterator[float]:
    for name, rate in work.rates.items():
        energy = seen.tensors.get(f"{ENERGY}{name}")
        if energy is not None and work.steps == 1:
            expected = float((seen.tensors[name].double() / rate).square().sum())
            yield abs(float(energy) - expected) / expected


def _scores(observation: Observation) -> Scores:
    """The scores of all canaries. Each owner's mechanism acts on its canaries alone."""
    attacks = {number: Ridge(len(coins)) for number, coins in observation.coins.items()}
    for number, reading in observation.readings:
        values, shares = reading.whitened()
        attacks[number].add(values, shares.reshape(reading.steps, -1, shares.shape[1]).sum(axis=0))
    scores = np.concatenate([attack.scores() for attack in attacks.values()])
    return Scores(scores, np.concatenate([observation.coins[number] for number in attacks]))


def _read_sums(observation: Observation) -> Iterator[tuple[Reading, np.ndarray]]:
    """Each secure sum less the replies of the owners that collude with the server, and the coins of the others."""
    for index, summed in enumerate(observation.engine.sums):
        members = sorted(summed.members)
        honest, colluding = members[: len(members) - COLLUDING], members[len(members) - COLLUDING :]
        known = {member: observation.clients[member].seen[index] for member in members}
        tensors = {
            name: value - sum(summed.members[member] * known[member].tensors[name] for member in colluding)
            for name, value in summed.tensors.items()
        }
        noise_std = {member: observation.plans[member].terms.noise_std for member in honest}
        reading = read_sum(
            replace(summed, tensors=tensors),
            {member: (known[member], observation.gradients[member]) for member in honest},
            noise_std,
        )
        yield reading, np.concatenate([observation.coins[member] for member in honest])


def _sum_scores(sums: list[tuple[Reading, np.ndarray]]) -> Scores:
    coins = sums[0][1]
    attack = Ridge(len(coins))
    for reading, _ in sums:
        attack.add(*reading.whitened())
    return Scores(attack.scores(), coins)


def _optimizer(setting: Setting) -> OptimizerConfig:
    """As the server sees it: a mean of clients' updates is a step of rate 1."""
    return OptimizerConfig(lr=1.0) if setting.of_clients else OPTIMIZER


def _local_steps(method: Method, setting: Setting) -> int:
    """One step, whose noise can be read exactly, or the two that some methods need.

    Raises:
        Unreadable: the method needs something else.
    """
    for steps in (1,) if setting.of_clients else (1, 2):
        try:
            method.check(_optimizer(setting), 1 if setting.shared else setting.owners, steps)
        except UserError as error:
            problem = str(error)
        else:
            return steps
    raise Unreadable(problem)
