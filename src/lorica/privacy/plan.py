"""The plan that an owner agrees to before a run: sampling rate, noise, number of steps, and the resulting ε."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorica.config import PrivacyConfig
from lorica.errors import UserError
from lorica.privacy.accounting import Steps, calibrate, epsilon, epsilon_rdp
from lorica.privacy.mechanism import Terms


class Refused(Exception):
    """An owner refuses a run or a request. The message is sent to the server: it contains public information only."""


@dataclass(frozen=True)
class ClientPlan:
    """One client's guarantee. Everything in it is public.

    Attributes:
        records: `n`, declared public.
        terms: `q = b/n`, `b`, `C`, `σ` of every step.
        max_steps: the largest number of steps that the schedule can request.
        delta: `δ`; None without privacy.
        noise: `secure`, `reproducible` or `none`.
    """

    client: int
    records: int
    terms: Terms
    max_steps: int
    delta: float | None
    noise: Literal["secure", "reproducible", "none"]

    def steps(self, count: int) -> Steps:
        return Steps(self.terms.sampling_rate, self.terms.noise_multiplier, count)

    def epsilon(self, count: int | None = None) -> float:
        """ε after `count` steps, by default after all of them; infinite without privacy."""
        if self.delta is None:
            return float("inf")
        return epsilon([self.steps(self.max_steps if count is None else count)], self.delta)

    def epsilon_rdp(self, count: int | None = None) -> float:
        """ε after `count` steps by RDP, as a cross-check."""
        if self.delta is None:
            return float("inf")
        return epsilon_rdp([self.steps(self.max_steps if count is None else count)], self.delta)

    def check(self, proposed: Terms, steps_in_all: int) -> None:
        """Refuse terms or steps beyond the plan.

        Args:
            proposed: the terms in the server's request.
            steps_in_all: steps already charged in this run plus the requested steps.

        Raises:
            Refused: terms that differ from the plan, or too many steps.
        """
        if proposed != self.terms:
            raise Refused(
                f"client {self.client}: the server proposes {proposed}, but the agreed terms are {self.terms}"
            )
        if steps_in_all > self.max_steps:
            raise Refused(
                f"client {self.client}: {steps_in_all} steps in total exceed the {self.max_steps} steps of its plan"
            )


def plan_client(
    client: int, records: int, batch_size: int, max_steps: int, privacy: PrivacyConfig | Literal["none"]
) -> ClientPlan:
    """Compute one client's terms; the noise multiplier is calibrated to `max_steps` at the true sampling rate.

    `q = batch_size / records` exactly, as in the sampler; it is not rounded to a whole number of batches.

    Raises:
        UserError: the batch size exceeds the client's records.
    """
    if batch_size > records:
        raise UserError(
            "federation.batch_size",
            batch_size,
            f"client {client} has only {records} records",
            f"choose at most {records}, reduce the number of clients, or set federation.min_records to {batch_size}",
        )
    rate = batch_size / records
    if privacy == "none":
        terms = Terms(rate, batch_size, float("inf"), 0.0)
        return ClientPlan(client, records, terms, max_steps, None, "none")
    if privacy.noise_multiplier is not None:
        noise_multiplier = privacy.noise_multiplier
    else:
        assert privacy.epsilon is not None
        noise_multiplier = calibrate(rate, max_steps, privacy.epsilon, privacy.delta) if max_steps else 1.0
    terms = Terms(rate, batch_size, privacy.clip_norm, noise_multiplier)
    return ClientPlan(client, records, terms, max_steps, privacy.delta, privacy.noise)
