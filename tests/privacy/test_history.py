"""The budget of a record follows it into any file, order, ledger and machine; ε is that of all that it was in."""

from __future__ import annotations

import hashlib
import shutil
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorica.errors import UserError
from lorica.privacy import lifetime
from lorica.privacy.accounting import Steps, epsilon, epsilon_from_rdp, total_rdp
from lorica.privacy.exposures import Exposure
from lorica.privacy.home import Home
from lorica.privacy.ledger import Ledger, Release
from lorica.privacy.ledger_file import accept_ledger, release_reservation
from lorica.privacy.lifetime import History, history
from lorica.privacy.unit import RECORD, PrivacyUnit
from tests.ledgers import write

DELTA = 1e-3
Q, SIGMA, STEPS = 0.2, 1.1, 4


def digests(values: Iterable[object]) -> np.ndarray:
    return np.stack([np.frombuffer(hashlib.sha256(str(value).encode()).digest(), np.uint8) for value in values])


def name(values: Iterable[object]) -> str:
    return hashlib.sha256(digests(values).tobytes()).hexdigest()


def release(values: Sequence[object], run: str, **changes: Any) -> Release:
    row = Release(
        dataset="data",
        records=name(values),
        run=run,
        client=0,
        round=1,
        sampling_rate=Q,
        noise_multiplier=SIGMA,
        clip_norm=1.0,
        steps=STEPS,
        noise="secure",
        request="",
    )
    return replace(row, **changes)


def introduce(ledger: Ledger, values: Sequence[object]) -> str:
    ledger.introduce({name(values): lambda: (digests(values), np.ones(len(values), dtype=np.int64))})
    return name(values)


def spend(ledger: Ledger, values: Sequence[object], run: str, **changes: Any) -> None:
    introduce(ledger, values)
    write(ledger, release(values, run, **changes))


def of(ledger: Ledger, values: Sequence[object], dataset: str = "another file") -> History:
    return history(ledger, dataset, introduce(ledger, values))


PEOPLE = [f"person {number}" for number in range(20)]
ONE_RUN = epsilon([Steps(Q, SIGMA, STEPS)], DELTA)


@pytest.mark.parametrize(
    "again",
    [
        PEOPLE,
        [*PEOPLE, "one more"],
        PEOPLE[1:],
        PEOPLE[::-1],
        [*PEOPLE[10:], *PEOPLE[:10], "one more"],
        [PEOPLE[7], "all others", "are new"],
    ],
    ids=["copied", "appended", "removed", "turned round", "shuffled", "one of them"],
)
def test_a_record_that_comes_again_in_another_file_has_spent_its_budget(tmp_path: Path, again: list[str]) -> None:
    spend(Ledger(tmp_path / "one.sqlite"), PEOPLE, "first")
    elsewhere = Ledger(tmp_path / "copy" / "other.sqlite")
    found = of(elsewhere, again)
    assert found.epsilon(DELTA) == ONE_RUN
    both = epsilon([Steps(Q, SIGMA, 2 * STEPS)], DELTA)
    assert found.epsilon(DELTA, planned=Steps(Q, SIGMA, STEPS)) == both
    assert found.above(both * 0.999, DELTA, planned=Steps(Q, SIGMA, STEPS)) == both
    assert found.above(both, DELTA, planned=Steps(Q, SIGMA, STEPS)) is None
    # The policy of a node asks what its own ledger does not hold.
    assert [(one.run, one.steps) for one in elsewhere.elsewhere(name(again))] == [("first", STEPS)]


def test_other_records_have_spent_nothing(tmp_path: Path) -> None:
    spend(Ledger(tmp_path / "one.sqlite"), PEOPLE, "first")
    ledger = Ledger(tmp_path / "other.sqlite")
    strangers = [f"stranger {number}" for number in range(20)]
    assert of(ledger, strangers).epsilon(DELTA) == 0.0
    assert ledger.elsewhere(introduce(ledger, strangers)) == []


@pytest.mark.integration
def test_the_worst_record_is_found_exactly(tmp_path: Path) -> None:
    """Against every record's own composition, one by one."""
    draws = np.random.default_rng(0)
    ledgers = [Ledger(tmp_path / f"{index}.sqlite") for index in range(2)]
    spent: dict[str, list[Steps]] = {person: [] for person in PEOPLE}
    for run in range(5):
        order = draws.permutation(PEOPLE)
        for client, part in enumerate(np.split(order, [int(draws.integers(3, 17))])):
            chosen = [str(person) for person in part]
            terms = {"sampling_rate": float(draws.choice([0.1, 0.3])), "steps": int(draws.integers(1, 9))}
            terms["noise_multiplier"] = float(draws.choice([0.9, 1.4]))
            spend(ledgers[run % 2], chosen, f"run {run}", client=client, **terms)
            for person in chosen:
                cost = (terms["sampling_rate"], terms["noise_multiplier"], terms["steps"])
                spent[person].append(Steps(*cost))
    for mine in (PEOPLE, PEOPLE[:7], PEOPLE[11:13]):
        exact = max(epsilon(spent[person], DELTA) for person in mine)
        assert of(ledgers[0], mine).epsilon(DELTA) == pytest.approx(exact, rel=1e-12)
        assert of(ledgers[1], mine).epsilon(DELTA) == pytest.approx(exact, rel=1e-12)


def test_too_many_cases_are_bounded_from_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    for index, person in enumerate(PEOPLE[:6]):
        spend(ledger, [person], f"run {index}", steps=100 + index)
    exact = of(ledger, PEOPLE[:6]).epsilon(DELTA)
    assert exact == epsilon([Steps(Q, SIGMA, 105)], DELTA)
    monkeypatch.setattr(lifetime, "MOST_EXACT", 1)
    bound = of(ledger, PEOPLE[:6]).epsilon(DELTA)
    assert exact <= bound <= epsilon_from_rdp(total_rdp([Steps(Q, SIGMA, 105)]), DELTA)


def test_equal_records_of_one_run_are_two_people(tmp_path: Path) -> None:
    """Within a run clients hold different records; of an earlier run, nobody knows which of the two it was."""
    ledger = Ledger(tmp_path / "l.sqlite")
    spend(ledger, ["a", "same"], "first", client=0)
    spend(ledger, ["b", "same"], "first", client=1)
    assert of(ledger, ["a", "same"]).epsilon(DELTA, ("first", 0)) == ONE_RUN
    assert of(ledger, ["a", "same"]).epsilon(DELTA) == ONE_RUN
    assert of(ledger, ["same", "new"]).epsilon(DELTA) == ONE_RUN
    spend(ledger, ["c", "same"], "first", client=2, steps=2, noise_multiplier=0.7)
    options = [Steps(Q, SIGMA, STEPS), Steps(Q, 0.7, 2)]
    curve = np.max([total_rdp([option]) for option in options], axis=0)
    found = of(ledger, ["same", "new"]).epsilon(DELTA)
    assert found == pytest.approx(epsilon_from_rdp(curve, DELTA))
    assert found >= max(epsilon([option], DELTA) for option in options)


def test_other_units_do_not_add_up_and_bare_noise_is_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    spend(ledger, PEOPLE[:3], "first", noise="reproducible")
    spend(ledger, PEOPLE[5:7], "second", noise="none", round=1)
    spend(ledger, PEOPLE[5:7], "second", noise="none", round=2)
    elsewhere = Ledger(tmp_path / "other.sqlite")
    assert of(elsewhere, PEOPLE).unprotected == 3
    assert of(elsewhere, PEOPLE[:2]).unprotected == 1
    assert of(elsewhere, PEOPLE[3:5]).unprotected == 0
    assert of(elsewhere, PEOPLE).epsilon(DELTA) == 0.0
    spend(ledger, PEOPLE[9:], "third", unit=PrivacyUnit("patient", 4))
    assert of(elsewhere, PEOPLE).epsilon(DELTA) == float("inf")
    assert of(elsewhere, PEOPLE[:9]).epsilon(DELTA) == 0.0
    assert of(elsewhere, PEOPLE[9:]).epsilon(DELTA, unit=PrivacyUnit("patient", 4)) == ONE_RUN


def test_a_ledger_on_another_machine_brings_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spend(Ledger(tmp_path / "l.sqlite"), PEOPLE, "first")
    (tmp_path / "machine").mkdir()
    shutil.copy(tmp_path / "l.sqlite", tmp_path / "machine" / "l.sqlite")
    monkeypatch.setenv("LORICA_HOME", str(tmp_path / "machine" / "home"))
    moved = Ledger(tmp_path / "machine" / "l.sqlite")
    assert of(moved, [*PEOPLE[3:], "one more"]).epsilon(DELTA) == ONE_RUN


def test_what_an_accepted_loss_held_still_counts(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    spend(Ledger(path), PEOPLE, "first")
    before = path.read_bytes()
    spend(Ledger(path), PEOPLE, "second")
    path.write_bytes(before)
    accept_ledger(path)
    two = epsilon([Steps(Q, SIGMA, 2 * STEPS)], DELTA)
    assert of(Ledger(path), PEOPLE).epsilon(DELTA) == two
    assert [one.run for one in Ledger(path).elsewhere(name(PEOPLE))] == ["second"]
    path.unlink()
    accept_ledger(path)
    assert of(Ledger(path), [*PEOPLE, "one more"]).epsilon(DELTA) == two


def test_a_charge_that_crashed_before_the_index_was_written_is_written_by_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    introduce(ledger, PEOPLE)
    with monkeypatch.context() as patched:
        patched.setattr(Home, "remember", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            ledger.charge(release(PEOPLE, "first"))
    ledger.charge(release(PEOPLE, "first"))
    assert of(Ledger(tmp_path / "other.sqlite"), PEOPLE[::-1]).epsilon(DELTA) == ONE_RUN


def test_the_index_holds_no_digest_that_can_be_guessed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    spend(ledger, ["patient Jane Doe, HIV positive"], "first")
    guess = digests(["patient Jane Doe, HIV positive"])[0].tobytes()
    for path in (ledger.path, Home().path):
        assert guess not in path.read_bytes()
        assert guess[:8] not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_rows_of_an_earlier_version_count_as_they_did(tmp_path: Path) -> None:
    """Without an index only whole sets are known; another partition counts its worst client."""
    ledger = Ledger(tmp_path / "l.sqlite")
    write(ledger, release(PEOPLE, "first"))
    write(ledger, release(["others"], "first", client=1, noise_multiplier=0.6))
    assert history(ledger, "data", name(PEOPLE)).epsilon(DELTA) == ONE_RUN
    write(ledger, release(["somebody"], "second", steps=3))
    write(ledger, release(["anybody"], "second", client=1, steps=2))
    curve = total_rdp([Steps(Q, SIGMA, STEPS)]) + total_rdp([Steps(Q, SIGMA, 3)])
    expected = epsilon_from_rdp(curve, DELTA)
    assert history(ledger, "data", name(PEOPLE)).epsilon(DELTA) == pytest.approx(expected)
    # The next run with the same records makes them known one by one.
    assert of(ledger, PEOPLE, "data").epsilon(DELTA) == pytest.approx(expected)
    assert of(Ledger(tmp_path / "other.sqlite"), PEOPLE[4:]).epsilon(DELTA) == ONE_RUN


def test_a_hundred_thousand_records_take_about_a_second(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    tags = draws.integers(0, 256, (100_000, 32), dtype=np.uint8)
    ones = np.ones(len(tags), dtype=np.int64)
    ledger = Ledger(tmp_path / "l.sqlite")
    start = time.process_time()
    ledger.introduce({"all": lambda: (tags, ones)})
    write(ledger, replace(release(PEOPLE, "first"), records="all"))
    assert history(ledger, "data", "all").epsilon(DELTA) == ONE_RUN
    # Generous: the machine that runs the tests may be slow.
    assert time.process_time() - start < 5.0


def planned(ledger: Ledger, values: Sequence[object], run: str, steps: int) -> Exposure:
    return Exposure(ledger.identity, run, 0, introduce(ledger, values), RECORD, "secure", Q, SIGMA, 0, steps, 0, SIGMA)


def test_what_a_run_has_reserved_counts_until_it_ends(tmp_path: Path) -> None:
    ledger, other = Ledger(tmp_path / "l.sqlite"), Ledger(tmp_path / "other.sqlite")
    ledger.reserve([planned(ledger, PEOPLE, "first", 10)])
    write(ledger, release(PEOPLE, "first"))
    for where in (ledger, other):
        found = of(where, [*PEOPLE, "one more"])
        assert [(one.run, one.outstanding) for one in found.holders("second")] == [("first", 10 - STEPS)]
        assert found.epsilon(DELTA) == ONE_RUN
        both = epsilon([Steps(Q, SIGMA, 10 + STEPS)], DELTA)
        assert found.above(both - 0.01, DELTA, ("second", 0), Steps(Q, SIGMA, STEPS)) == both
        # Its own reservation does not count beside the steps that it plans.
        whole = epsilon([Steps(Q, SIGMA, 10)], DELTA)
        assert found.above(whole, DELTA, ("first", 0), Steps(Q, SIGMA, 10 - STEPS)) is None
    seen: list[list[tuple[str, int]]] = []
    ledger.reserve(
        [planned(ledger, PEOPLE, "second", 3)], lambda held: seen.append([(one.run, one.steps) for one in held])
    )
    assert seen == [[("first", 10 - STEPS)]]
    ledger.end("first", 0)
    assert [one.run for one in of(other, PEOPLE).holders("third")] == ["second"]
    assert of(other, PEOPLE).epsilon(DELTA) == ONE_RUN


def test_nothing_is_reserved_for_a_run_that_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")

    def refuse(_: list[Release]) -> None:
        raise UserError("privacy.max_lifetime_epsilon", 1.0, "too much", "less")

    with pytest.raises(UserError, match="too much"):
        ledger.reserve([planned(ledger, PEOPLE, "first", 10)], refuse)
    assert of(ledger, PEOPLE).holders("second") == []


def test_the_owner_gives_back_what_an_abandoned_run_holds(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    for run in ("abandoned", "absent-minded"):
        ledger.reserve([planned(ledger, PEOPLE, run, 10)])
    with pytest.raises(UserError, match="several runs"):
        release_reservation(ledger.path, "ab")
    with pytest.raises(UserError, match="no such run has a reservation"):
        release_reservation(ledger.path, "finished")
    release_reservation(ledger.path, "aban")
    assert [one.run for one in of(ledger, PEOPLE).holders("next")] == ["absent-minded"]
