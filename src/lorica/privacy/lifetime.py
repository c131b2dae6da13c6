"""What an owner's data have cost over their whole life: ε of all that was ever released about them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lorica.privacy.accounting import Steps, epsilon, epsilon_above, epsilon_from_rdp, total_rdp
from lorica.privacy.ledger import Release
from lorica.privacy.unit import RECORD, PrivacyUnit


def lifetime_epsilon(
    releases: Iterable[Release],
    records: str | None,
    delta: float,
    planned: Steps | None = None,
    unit: PrivacyUnit = RECORD,
) -> float:
    """ε of everything ever released about one of `records`, at `delta`, with `planned` steps still to come.

    Releases with different units do not add up, and make it infinite: what protects single records does not protect a
    group, and a group that loses one record is another group rather than none, so that its clipped gradient may move
    by 2C.

    Releases of these very records compose by PLD. In a simulation, other runs may have split the same data set
    differently; one of these records then was with some client of that run, nobody knows which, and the bound takes at
    each Rényi order the most expensive client: `max_k RDP_k(α)`. Releases without noise, or with reproducible
    noise, are not private and are left out: `unprotected` counts them.

    Args:
        records: fingerprint of a client's records, where this process dealt the records to the clients. None where a
            server did: then no client's number says who has a record, and all releases compose by PLD.
    """
    own, foreign = _composed(releases, records, planned, unit)
    return epsilon_from_rdp(total_rdp(own) + foreign, delta) if np.any(foreign) else epsilon(own, delta)


def lifetime_above(
    limit: float,
    releases: Iterable[Release],
    records: str | None,
    delta: float,
    planned: Steps | None = None,
    unit: PrivacyUnit = RECORD,
) -> float | None:
    """`lifetime_epsilon` if it is above `limit`, else None; as cheap as `epsilon_above`."""
    own, foreign = _composed(releases, records, planned, unit)
    if not np.any(foreign):
        return epsilon_above(limit, own, delta)
    life = epsilon_from_rdp(total_rdp(own) + foreign, delta)
    return life if life > limit else None


def _composed(
    releases: Iterable[Release], records: str | None, planned: Steps | None, unit: PrivacyUnit
) -> tuple[list[Steps], np.ndarray]:
    """Steps that surely saw these records, and the RDP curve of other partitions' worst clients."""
    private = [release for release in releases if release.noise == "secure"]
    own = [release.cost for release in private if records in (None, release.records)]
    own_runs = {release.run for release in private if records in (None, release.records)}
    own += [planned] if planned else []
    foreign: dict[str, dict[int, list[Steps]]] = {}
    for release in private:
        if release.run not in own_runs:
            foreign.setdefault(release.run, {}).setdefault(release.client, []).append(release.cost)
    unlike = any(release.unit != unit for release in private)
    curve = total_rdp([]) + (float("inf") if unlike else 0.0)
    for clients in foreign.values():
        curve = curve + np.max([total_rdp(steps) for steps in clients.values()], axis=0)
    return own, curve


def unprotected(releases: Iterable[Release]) -> int:
    """Number of releases with seeded noise or none."""
    return sum(release.noise != "secure" for release in releases)
