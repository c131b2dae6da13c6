"""What records were exposed to: the steps of one client in one run, done and planned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lorica.privacy.accounting import Steps
from lorica.privacy.unit import PrivacyUnit


@dataclass(frozen=True)
class Exposure:
    """Steps of one kind that one client of one run did, or may still do, with one set of records.

    Attributes:
        ledger: identity of the ledger that they are charged to.
        records: fingerprint of the client's records.
        steps: charged so far.
        planned: reserved for all of the run; 0 if nothing is, or no longer.
        releases: rows of the ledger.
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

    @property
    def outstanding(self) -> int:
        """Steps that are reserved and not charged yet."""
        return max(self.planned - self.steps, 0)

    def cost(self, reserved: bool) -> Steps:
        """What was charged, and what is reserved beyond it if that counts."""
        steps = self.steps + (self.outstanding if reserved else 0)
        return Steps(self.sampling_rate, self.noise_multiplier, steps)


def merged(exposures: Iterable[Exposure]) -> list[Exposure]:
    """What several books say of the same exposure as one: the most that any of them says."""
    found: dict[Exposure, Exposure] = {}
    for one in exposures:
        key = replace(one, steps=0, planned=0, releases=0)
        known = found.get(key, key)
        found[key] = replace(
            known,
            steps=max(known.steps, one.steps),
            planned=max(known.planned, one.planned),
            releases=max(known.releases, one.releases),
        )
    return list(found.values())
