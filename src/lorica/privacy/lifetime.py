"""The cost of an owner's data over its lifetime: ε of everything ever released about it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from lorica.privacy.accounting import (
    RDP_ORDERS,
    Steps,
    epsilon,
    epsilon_above,
    epsilon_from_rdp,
    epsilons_from_rdp,
    merged_steps,
    rdp_curve,
    total_rdp,
)
from lorica.privacy.exposures import Exposure
from lorica.privacy.ledger import Ledger, Release
from lorica.privacy.ledger_file import Book
from lorica.privacy.unit import RECORD, PrivacyUnit

MOST_EXACT = 8
"""Maximum number of compositions computed by PLD; the others are bounded by RDP."""


@dataclass(frozen=True)
class History:
    """All exposures of a client's records, in whatever file, order or ledger the records were used.

    Attributes:
        records: fingerprint of the client's records.
        exposures: the exposures of any of the records.
        members: fingerprint -> (n,) bool: which of the n records are in another set.
        unindexed: releases by versions of Lorica without an index of records.
    """

    records: str
    exposures: list[Exposure]
    members: dict[str, np.ndarray]
    unindexed: list[Release]

    def epsilon(
        self,
        delta: float,
        client: tuple[str, int] | None = None,
        planned: Steps | None = None,
        unit: PrivacyUnit = RECORD,
        reserved: bool = False,
    ) -> float:
        """ε at `delta` of the most exposed record.

        A record's ε is that of the composition of all its exposures. Records with the same exposures form one case.
        Cases are computed in descending order of their RDP bounds until no remaining bound exceeds the largest ε found.
        After `MOST_EXACT` cases the RDP bound of the next case is returned, so the result is never too small.

        If several clients of a run hold equal records, it is unknown which client used a given record. The most
        expensive client counts at each Rényi order, as for releases without an index.

        Args:
            client: run and number of this client. Clients of the same run hold different records, even if they look
                equal.
            planned: future steps.
            unit: unit of privacy of the future steps. Releases with other units do not compose and make ε infinite.
            reserved: also count reservations of other runs.
        """
        alike = self._same_for_all(client, planned, unit, reserved)
        if alike is not None:
            return epsilon(alike, delta)
        cases = self._cases(client, planned, unit, reserved)
        bounds = cases.bounds(delta)
        largest = 0.0
        for number, case in enumerate(np.argsort(-bounds)):
            if bounds[case] <= largest:
                break
            steps = cases.steps(int(case))
            if steps is None or number == MOST_EXACT:
                return float(bounds[case])
            largest = max(largest, epsilon(steps, delta))
        return largest

    def above(
        self,
        limit: float,
        delta: float,
        client: tuple[str, int] | None = None,
        planned: Steps | None = None,
        unit: PrivacyUnit = RECORD,
    ) -> float | None:
        """`epsilon`, including reservations of other runs, if it exceeds `limit`, else None.

        Fast if the RDP bound is below the limit.
        """
        alike = self._same_for_all(client, planned, unit, reserved=True)
        if alike is not None:
            return epsilon_above(limit, alike, delta)
        if self._cases(client, planned, unit, reserved=True).bounds(delta).max() <= limit:
            return None
        life = self.epsilon(delta, client, planned, unit, reserved=True)
        return life if life > limit else None

    @property
    def unprotected(self) -> int:
        """Number of releases of any of the records with seeded noise or none."""
        bare = sum(one.releases for one in self.exposures if one.noise != "secure")
        return bare + unprotected(self.unindexed)

    def holders(self, run: str) -> list[Exposure]:
        """Exposures with unused reservations of other runs."""
        return [one for one in self.exposures if one.outstanding and one.run != run and one.noise == "secure"]

    def _same_for_all(
        self, client: tuple[str, int] | None, planned: Steps | None, unit: PrivacyUnit, reserved: bool
    ) -> list[Steps] | None:
        """The composition of every record, if all were always used together, by one client of a run and with this unit:
        the usual case, and the only one whose cost does not grow with the number of records. Otherwise None."""
        private = [one for one in self.exposures if one.noise == "secure"]
        clients = {(one.ledger, one.run, one.client) for one in private}
        together = not self.unindexed and self.members.keys() == {self.records}
        if not together or len({key[:2] for key in clients}) < len(clients) or any(one.unit != unit for one in private):
            return None
        runs = _by_run(private, self.records, client, reserved)
        costs = [cost for of_run in runs for steps in of_run.values() for _, cost in steps]
        return [*costs, *([] if planned is None else [planned])]

    def _cases(
        self, client: tuple[str, int] | None, planned: Steps | None, unit: PrivacyUnit, reserved: bool
    ) -> _Cases:
        own, foreign = _composed(self.unindexed, self.records, planned, unit)
        private = [one for one in self.exposures if one.noise == "secure"]
        kinds = sorted(
            {(one.sampling_rate, one.noise_multiplier) for one in [*(p.cost(reserved) for p in private), *own]}
        )
        counts = np.zeros((len(next(iter(self.members.values()), [None])), len(kinds)), dtype=np.int64)
        for step in own:
            counts[:, kinds.index((step.sampling_rate, step.noise_multiplier))] += step.count
        mixed = np.zeros(len(counts), dtype=np.int64)
        for one in private:
            mixed |= self.members[one.records] & (one.unit != unit)
        columns, curves = [mixed], [np.stack([np.zeros(len(RDP_ORDERS)), np.full(len(RDP_ORDERS), np.inf)])]
        for costs in _by_run(private, self.records, client, reserved):
            inside = {
                number: np.logical_or.reduce([self.members[name] for name, _ in steps])
                for number, steps in costs.items()
            }
            several = np.sum(list(inside.values()), axis=0) > 1
            for steps in costs.values():
                for name, cost in steps:
                    kind = kinds.index((cost.sampling_rate, cost.noise_multiplier))
                    counts[self.members[name] & ~several, kind] += cost.count
            if several.any():
                column, of_run = self._alternatives(costs, several, counts, kinds)
                columns.append(column)
                curves.append(of_run)
        rows = np.unique(np.column_stack([counts, *columns]), axis=0)
        return _Cases(kinds, rows, curves, foreign)

    def _alternatives(
        self,
        costs: dict[int, list[tuple[str, Steps]]],
        several: np.ndarray,
        counts: np.ndarray,
        kinds: list[tuple[float, float]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """For records held by several clients of a run: a number for each record, and the RDP curve of each number.

        If these clients took the same steps, the steps are added to `counts` and the number is 0.
        """
        column, curves = np.zeros(len(several), dtype=np.int64), [np.zeros(len(RDP_ORDERS))]
        names = sorted({name for steps in costs.values() for name, _ in steps})
        patterns = np.stack([self.members[name] for name in names], axis=1)[several]
        distinct, which = np.unique(patterns, axis=0, return_inverse=True)
        for number, pattern in enumerate(distinct):
            present = {name for name, inside in zip(names, pattern, strict=True) if inside}
            done = {merged_steps(cost for name, cost in steps if name in present) for steps in costs.values()} - {()}
            records = np.flatnonzero(several)[which.reshape(-1) == number]
            if len(done) > 1:
                column[records] = len(curves)
                curves.append(np.max([total_rdp(steps) for steps in done], axis=0))
            for cost in next(iter(done)) if len(done) == 1 else ():
                counts[records, kinds.index((cost.sampling_rate, cost.noise_multiplier))] += cost.count
        return column, np.stack(curves)


@dataclass(frozen=True)
class _Cases:
    """The distinct compositions of a client's records.

    Attributes:
        kinds: (q, σ) of each kind of step.
        rows: (cases, kinds + len(curves)): number of steps of each kind, then an index into each of `curves`.
        curves: RDP curves, each (places, orders), for exposures that are not plain steps.
        foreign: RDP curve of releases that may have used any record.
    """

    kinds: list[tuple[float, float]]
    rows: np.ndarray
    curves: list[np.ndarray]
    foreign: np.ndarray

    def bounds(self, delta: float) -> np.ndarray:
        """(cases,): RDP bound on ε."""
        total = np.tile(self.foreign, (len(self.rows), 1))
        for kind, (rate, noise_multiplier) in enumerate(self.kinds):
            steps = self.rows[:, kind]
            total[steps > 0] += steps[steps > 0, None] * rdp_curve(Steps(rate, noise_multiplier, 1))
        for place, curve in enumerate(self.curves, len(self.kinds)):
            total += curve[self.rows[:, place]]
        return epsilons_from_rdp(total, delta)

    def steps(self, case: int) -> list[Steps] | None:
        """The steps of one case; None if it includes RDP curves."""
        row = self.rows[case]
        places = zip(self.curves, row[len(self.kinds) :], strict=True)
        if np.any(self.foreign) or any(np.any(curve[place]) for curve, place in places):
            return None
        return [Steps(*kind, int(count)) for kind, count in zip(self.kinds, row, strict=False) if count]


def history(ledger: Ledger | Book, dataset: str, records: str) -> History:
    """The history of one client's records: `histories`."""
    return histories(ledger, dataset, [records])[records]


def histories(ledger: Ledger | Book, dataset: str, records: Collection[str]) -> dict[str, History]:
    """The history of each client's records, from their ledger and the index in Lorica's home folder, read once.

    Args:
        dataset: fingerprint of the whole training data, by which old releases are found.
        records: fingerprints of the clients' records.
    """
    known, exposures, unindexed = ledger.members(records), _by_records(ledger.exposures()), ledger.unindexed(dataset)
    found = {}
    for name in records:
        # Records that were never stored are known at least as a whole.
        members = known.get(name) or {name: np.ones(1, dtype=bool)}
        own_runs = {one.run for one in exposures.get(name, ())}
        found[name] = History(
            name,
            [one for other in members for one in exposures.get(other, ())],
            members,
            [one for one in unindexed if one.records not in members and one.run not in own_runs],
        )
    return found


def _by_records(exposures: Iterable[Exposure]) -> dict[str, list[Exposure]]:
    found: dict[str, list[Exposure]] = {}
    for one in exposures:
        found.setdefault(one.records, []).append(one)
    return found


def _by_run(
    exposures: list[Exposure], records: str, client: tuple[str, int] | None, reserved: bool
) -> list[dict[int, list[tuple[str, Steps]]]]:
    """For each run: client -> sets of records and its steps on them.

    Limited to this client in the current run, and to clients with exactly these records in other runs, if any.
    """
    runs: dict[tuple[str, str], list[Exposure]] = {}
    for one in exposures:
        runs.setdefault((one.ledger, one.run), []).append(one)
    found = []
    for (_, run), inside in runs.items():
        current = client is not None and client[0] == run
        own = {one.client for one in inside if one.records == records}
        if client is not None and current:
            own = {client[1]}
        costs: dict[int, list[tuple[str, Steps]]] = {}
        for one in inside:
            cost = one.cost(reserved and not current)
            if cost.count and (one.client in own or not (own or current)):
                costs.setdefault(one.client, []).append((one.records, cost))
        if costs:
            found.append(costs)
    return found


def lifetime_epsilon(
    releases: Iterable[Release],
    records: str | None,
    delta: float,
    planned: Steps | None = None,
    unit: PrivacyUnit = RECORD,
) -> float:
    """ε at `delta` of everything ever released about any one of `records`, plus `planned` future steps.

    Infinite if releases have different units of privacy, because they do not compose: protecting single records does
    not protect a group, and removing one record from a group changes the group rather than removing it, so that its
    clipped gradient can move by 2C.

    Releases of exactly these records compose by PLD. In a simulation, other runs may have divided the same data set
    differently. It is then unknown which client of such a run had a given record, so the bound uses the most expensive
    client at each Rényi order: `max_k RDP_k(α)`. Releases with seeded noise or none are not private and are left out;
    `unprotected` counts them.

    Args:
        records: fingerprint of a client's records, if this process divided the data among the clients. None at a node,
            where the server chooses the client numbers: then all releases compose by PLD.
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
    """Steps on exactly these records, and the summed RDP curves of the worst client in each differently divided run."""
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
