"""The report while a run goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import lorica
from lorica.reporting.html import UNFINISHED, report_is_missing, write_report
from lorica.run import progress
from tests.small import SMALLEST

SMALL = [*SMALLEST, "federation.rounds=3"]
pytestmark = pytest.mark.usefixtures("checked_once")


def experiment(folder: Path, some_digits: list[str], *overrides: str) -> lorica.Experiment:
    places = [f"output={folder}", f"privacy.ledger={folder}/ledger.sqlite"]
    return lorica.Experiment.load(overrides=[*SMALL, *some_digits, *places, *overrides])


def refreshes(page: str) -> bool:
    return '<meta http-equiv="refresh"' in page


@pytest.mark.integration
def test_the_report_is_there_from_the_first_round_and_loads_itself_again_until_the_end(
    tmp_path: Path, some_digits: list[str]
) -> None:
    run = experiment(tmp_path, some_digits)
    page = run.config.folder / "report.html"
    seen: dict[int, str | None] = {}

    def look(row: dict[str, Any]) -> None:
        seen[row["round"]] = page.read_text(encoding="utf-8") if page.is_file() else None
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(on_round=look)
    assert seen[0] is None
    first = seen[1]
    assert first is not None
    assert refreshes(first)
    assert str(UNFINISHED) in first
    assert "largest client, so far" in first
    assert "Not a private release" not in first, "the noise is known, only the statement is not written yet"
    # A stopped run's page does not load itself again for ever.
    stopped = page.read_text(encoding="utf-8")
    assert not refreshes(stopped)
    assert "The run stopped after 2 of 3 rounds" in stopped
    run.run()
    finished = page.read_text(encoding="utf-8")
    assert not refreshes(finished)
    assert str(UNFINISHED) not in finished


@pytest.mark.integration
def test_a_report_of_an_unfinished_run_does_not_stand_for_the_last_one(tmp_path: Path, some_digits: list[str]) -> None:
    """As if the run had been killed before it wrote its report."""
    run = experiment(tmp_path, some_digits)
    folder = run.run().folder
    final = (folder / "report.html").read_bytes()
    assert not report_is_missing(folder)
    write_report(folder, live=True)
    assert report_is_missing(folder)
    run.run()
    assert (folder / "report.html").read_bytes() == final


@pytest.mark.integration
@pytest.mark.parametrize(
    ("privacy", "said", "banner"),
    [
        (["privacy.noise=none"], "no differential privacy; gradients clipped to norm 1", True),
        (["privacy.noise=reproducible"], "so far; not a guarantee", True),
        (["privacy.unit=client", "method.name=fed-avg", "federation.weights=uniform"], "each client, so far", False),
    ],
)
def test_a_live_report_says_what_is_known_of_the_noise(
    tmp_path: Path, some_digits: list[str], monkeypatch: pytest.MonkeyPatch, privacy: list[str], said: str, banner: bool
) -> None:
    pages = []

    def write(folder: Path, live: bool = False) -> None:
        pages.append(write_report(folder, live).read_text(encoding="utf-8"))

    monkeypatch.setattr(progress, "write_report", write)
    monkeypatch.setattr("lorica.run.rounds.write_report", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        experiment(tmp_path, some_digits, "federation.rounds=1", *privacy).run(on_round=stop_after_one)
    assert said in pages[0]
    assert ("Not a private release" in pages[0]) == banner
    assert ("Sent by the clients" in pages[0]) == ("privacy.unit=client" not in privacy)


def stop_after_one(row: dict[str, Any]) -> None:
    if row["round"] == 1:
        raise KeyboardInterrupt


def test_drawing_takes_no_more_than_its_share_of_the_time(
    tmp_path: Path, some_digits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of its own: a round takes a second, a report three."""
    now, drawn = 0.0, []
    rounds = 200

    def draw(folder: Path, live: bool = False) -> None:
        nonlocal now
        now += 3.0
        drawn.append(now)

    prepared = lorica.engines.local.prepare_local(experiment(tmp_path, some_digits).config)[0]
    monkeypatch.setattr(progress, "write_report", draw)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shown = progress.Progress(prepared)
    shown.open("run", -1)
    for number in range(1, rounds + 1):
        now += 1.0
        shown.round({"round": number})
    assert drawn[0] == 4.0, "after the first round"
    assert len(drawn) > 2
    assert 3.0 * len(drawn) <= progress.SHARE * now + 3.0
