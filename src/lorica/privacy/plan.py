"""The plan that an owner agrees to before a run: sampling rate, noise, number of steps, and the resulting ε."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lorica.config import ExperimentConfig, PrivacyConfig
from lorica.errors import UserError
from lorica.privacy.accounting import Steps, epsilon, epsilon_rdp
from lorica.privacy.calibration import calibrate, calibrate_many
from lorica.privacy.mechanism import Terms
from lorica.privacy.shared_noise import SharedNoise, check_shared
from lorica.privacy.unit import PrivacyUnit
from lorica.schedule import participation_counts

MOST_CALIBRATED = 50
"""Maximum number of clients of a run whose noise is calibrated one by one; beyond it, `calibrate_many` interpolates."""


class Refused(Exception):
    """An owner refuses a run or a request. The message is sent to the server: it contains public information only."""


@dataclass(frozen=True)
class ClientPlan:
    """One client's guarantee. Everything in it is public.

    Attributes:
        records: `n`, declared public.
        terms: `q = b/n`, `b`, `C`, `σ` of every step, with the `σ` of this client's own noise.
        max_steps: the largest number of steps that the schedule can request.
        delta: `δ`; None without privacy.
        noise: `secure`, `reproducible` or `none`.
        shared: how the noise is shared with the other members of a secure sum; None if each client's own noise gives
            the whole guarantee.
    """

    client: int
    records: int
    terms: Terms
    max_steps: int
    delta: float | None
    noise: Literal["secure", "reproducible", "none"]
    shared: SharedNoise | None = None

    @property
    def noise_multiplier(self) -> float:
        """The noise multiplier of the guarantee: that of the sum if the noise is shared, else the client's own."""
        return self.terms.noise_multiplier if self.shared is None else self.shared.noise_multiplier

    @property
    def noise_std(self) -> float:
        """`τ = σC/b` with the noise multiplier of the guarantee."""
        return replace(self.terms, noise_multiplier=self.noise_multiplier).noise_std

    def steps(self, count: int) -> Steps:
        return Steps(self.terms.sampling_rate, self.noise_multiplier, count)

    def own_steps(self, count: int) -> Steps:
        """As `steps`, against an adversary who sees this client's own reply."""
        return Steps(self.terms.sampling_rate, self.terms.noise_multiplier, count)

    def epsilon(self, count: int | None = None) -> float:
        """ε after `count` steps, by default after all of them; infinite without privacy."""
        if self.delta is None:
            return float("inf")
        return epsilon([self.steps(self.max_steps if count is None else count)], self.delta)

    def epsilon_own_noise(self, count: int | None = None) -> float:
        """As `epsilon`, against an adversary who sees this client's own reply."""
        if self.delta is None:
            return float("inf")
        return epsilon([self.own_steps(self.max_steps if count is None else count)], self.delta)

    def epsilon_rdp(self, count: int | None = None) -> float:
        """ε after `count` steps by RDP, as a cross-check."""
        if self.delta is None:
            return float("inf")
        return epsilon_rdp([self.steps(self.max_steps if count is None else count)], self.delta)

    def agrees_with(self, other: ClientPlan) -> bool:
        """Whether the plans are the same. Processors may differ in the last digits of a calibrated `σ`: 1e-9 of it."""
        alike = math.isclose(self.noise_multiplier, other.noise_multiplier, rel_tol=1e-9) and math.isclose(
            self.terms.noise_multiplier, other.terms.noise_multiplier, rel_tol=1e-9
        )
        shared = self.shared
        if shared is not None:
            shared = replace(shared, noise_multiplier=other.noise_multiplier)
        terms = replace(self.terms, noise_multiplier=other.terms.noise_multiplier)
        return alike and replace(self, terms=terms, shared=shared) == other

    @property
    def void_delta(self) -> bool:
        """Whether δ ≥ 1/n: publishing one random record would satisfy such a δ."""
        return self.delta is not None and self.delta >= 1 / self.records

    def check(self, proposed: Terms, steps_in_all: int) -> None:
        """Refuse terms or steps beyond the plan. Where the noise is shared, the own noise may be larger than planned.

        Args:
            proposed: the terms in the server's request.
            steps_in_all: steps already charged in this run plus the requested steps.

        Raises:
            Refused: terms that differ from the plan, or too many steps.
        """
        least = self.terms.noise_multiplier
        more = self.shared is not None and proposed.noise_multiplier > least
        if (replace(proposed, noise_multiplier=least) if more else proposed) != self.terms:
            raise Refused(
                f"client {self.client}: the server proposes {proposed}, but the agreed terms are {self.terms}"
            )
        if steps_in_all > self.max_steps:
            raise Refused(
                f"client {self.client}: {steps_in_all} steps in total exceed the {self.max_steps} steps of its plan"
            )


def plan_client(
    client: int,
    records: int,
    batch_size: int,
    max_steps: int,
    privacy: PrivacyConfig,
    min_clients: int | None = None,
    calibration: Callable[[float, int, float, float], float] = calibrate,
) -> ClientPlan:
    """Compute one client's terms; the noise multiplier is calibrated to `max_steps` at the true sampling rate.

    `q = batch_size / records` exactly, as in the sampler; it is not rounded to a whole number of batches.

    Args:
        min_clients: minimum number of members of a secure sum, for shared noise.
        calibration: gives the noise multiplier for (q, steps, ε, δ).

    Raises:
        UserError: the batch size exceeds the client's records; secure noise with δ ≥ 1/records; no noise multiplier
            meets the target ε.
    """
    if batch_size > records:
        raise UserError(
            "federation.batch_size",
            batch_size,
            f"client {client} has only {records} records",
            f"choose at most {records}, reduce the number of clients, or set federation.min_records to {batch_size}",
        )
    rate = batch_size / records
    if not privacy.private:
        terms = Terms(rate, batch_size, privacy.largest_norm, 0.0)
        return ClientPlan(client, records, terms, max_steps, None, "none")
    noun = PrivacyUnit.of(privacy).noun
    of = "" if noun == "client" else f" of client {client}"
    if privacy.noise == "secure" and privacy.delta >= 1 / records:
        raise UserError(
            "privacy.delta",
            privacy.delta,
            f"not below 1/{records}, one over the number of {noun}s{of}: publishing one random {noun} would satisfy it",
            f"choose at most {0.1 / records:.0e}",
        )
    if privacy.noise_multiplier is not None:
        noise_multiplier = privacy.noise_multiplier
    else:
        assert privacy.epsilon is not None
        noise_multiplier = calibration(rate, max_steps, privacy.epsilon, privacy.delta) if max_steps else 1.0
    terms = Terms(rate, batch_size, privacy.largest_norm, noise_multiplier)
    shared = None
    if privacy.noise_against == "sums":
        assert min_clients is not None
        shared = SharedNoise(noise_multiplier, min_clients, privacy.colluding)
        terms = replace(terms, noise_multiplier=shared.own_noise_multiplier)
    return ClientPlan(client, records, terms, max_steps, privacy.delta, privacy.noise, shared)


def plan_run(config: ExperimentConfig, client: int, records: int) -> ClientPlan:
    """One client's plan for a whole run, with noise calibrated to the steps that the schedule assigns to it.

    A function of the experiment and of the declared number of records, so the server computes it too and accepts no
    other plan.

    Args:
        records: `n`, declared public; the number of groups if the unit of privacy is a group.

    Raises:
        UserError: more records than `federation.max_records`, or fewer than a batch; noise that cannot be shared.
    """
    federation = config.federation
    check_shared(config)
    most = federation.most_records(client)
    if most is not None and records > most:
        raise UserError(
            "federation.max_records",
            federation.max_records,
            f"client {client} declares {records} records, but the limit is {most}",
            "raise federation.max_records, or ask the owner to declare fewer (records in its policy)",
        )
    steps = planned_steps(config, client)
    # A public number decides, so that servers and owners compute the same plan.
    calibration = calibrate if federation.clients <= MOST_CALIBRATED else calibrate_many
    return plan_client(
        client, records, federation.batch_size, steps, config.privacy, federation.min_clients, calibration
    )


def plan_cohort(config: ExperimentConfig, exchanges: int = 1) -> ClientPlan:
    """The plan of a run with `privacy.unit: client`: all clients as one owner whose records are clients.

    Each exchange is one step with `q = K₀/N`, where `K₀` is the expected number of the N clients in it.

    Args:
        exchanges: of a round, each of which has its own sample of clients.

    Raises:
        UserError: as `plan_client`.
    """
    federation = config.federation
    steps = federation.rounds * exchanges
    return plan_client(0, federation.clients, federation.participants, steps, config.privacy)


def planned_steps(config: ExperimentConfig, client: int) -> int:
    """Number of noisy steps that the schedule assigns to a client."""
    federation = config.federation
    counts = participation_counts(federation.clients, federation.rounds, federation.participants, config.seed)
    return federation.local_steps * counts[client]
