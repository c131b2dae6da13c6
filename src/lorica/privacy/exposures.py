"""Exposures of records: the charged and reserved steps of one client in one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lorica.privacy.accounting import Steps
from lorica.privacy.unit import PrivacyUnit


@dataclass(frozen=True)
class Exposure:
    """Steps with the same terms that one client of a run took, or may still take, on one set of records.

    Attributes:
        ledger: id of the ledger to which they are charged.
        records: fingerprint of the client's records.
        steps: charged so far.
        planned: steps reserved for the whole run; 0 without a reservation.
        releases: number of rows in the ledger.
        own_noise_multiplier: the smallest noise multiplier of the client's own noise; `noise_multiplier`, unless the
            noise is shared.
    """

    ledger: str
    run: str
    client: int
    records: str
    unit: PrivacyUnit
    noise: str
    sampling_rate: float
    noise_multiplier: float
    steps: int
    planned: int
    releases: int
    own_noise_multiplier: float

    @property
    def outstanding(self) -> int:
        """Steps that are reserved but not charged yet."""
        return max(self.planned - self.steps, 0)

    def cost(self, reserved: bool) -> Steps:
        """The charged steps and, with `reserved`, the outstanding ones."""
        steps = self.steps + (self.outstanding if reserved else 0)
        return Steps(self.sampling_rate, self.noise_multiplier, steps)


def merged(exposures: Iterable[Exposure]) -> list[Exposure]:
    """Merge records of the same exposure from several files by taking the maximum of each count."""
    found: dict[Exposure, Exposure] = {}
    for one in exposures:
        key = terms_of(one)
        known = found.get(key, one)
        found[key] = replace(
            known,
            steps=max(known.steps, one.steps),
            planned=max(known.planned, one.planned),
            releases=max(known.releases, one.releases),
            own_noise_multiplier=min(known.own_noise_multiplier, one.own_noise_multiplier),
        )
    return list(found.values())


def terms_of(exposure: Exposure) -> Exposure:
    """What identifies an exposure: all but its counts and the own noise."""
    return replace(exposure, steps=0, planned=0, releases=0, own_noise_multiplier=0.0)
