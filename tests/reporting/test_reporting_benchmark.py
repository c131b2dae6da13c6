"""What a benchmark says of its runs, on made-up scores."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from lorica.benchmark.suite import PlannedRun, Suite
from lorica.reporting.benchmark import Entry, best_rate, difference, interval, leader, plateau
from lorica.reporting.benchmark_figures import epsilon_figure, setting_figure
from lorica.reporting.benchmark_tables import benchmark_markdown, benchmark_rows, overview, ranked, setting_notes
from lorica.reporting.html import write_benchmark
from tests.benchmark.suites import CONTENT, finished, small_suite
from tests.reporting.test_reporting_pages import Page, check_self_contained

SWEEP = CONTENT["sweeps"][0]
SCORES = {
    ("as-lora", "rank 1, ε = 1"): [0.80, 0.82, 0.81, 0.83, 0.79],
    ("B only", "rank 1, ε = 1"): [0.79, 0.83, 0.80, 0.80, 0.79],
}


def score(planned: PlannedRun) -> float:
    """Rate 1 is best on the tuning seeds, and 0.3 within 2 points of it; 3 is far off."""
    if planned.purpose == "tuning":
        return {0.3: 0.79, 1.0: 0.8, 3.0: 0.6}[planned.rate]
    return SCORES.get((planned.method, planned.setting), [0.9] * 5)[planned.seed]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return small_suite(tmp_path, rates=[0.3, 1, 3], seeds=[0, 1, 2, 3, 4])


@pytest.fixture
def entries(suite: Suite) -> dict[tuple[str, str], Entry]:
    found = suite.with_results(finished(suite, score)).entries
    return {(entry.method, entry.setting): entry for entry in found}


def test_the_best_rate_is_that_of_the_best_mean() -> None:
    """0.1 has the best single run; of equal rates, the smaller one; where a run diverged, none."""
    assert best_rate({0.1: [0.9, 0.5], 0.3: [0.8, 0.75], 1.0: [0.8, 0.75]}) == 0.3
    assert best_rate({0.1: [0.6, 0.6], 0.3: [0.9, None]}) == 0.1
    assert best_rate({0.1: [None]}) is None


def test_the_plateau_counts_rates_within_two_points_of_the_best() -> None:
    assert plateau({0.1: [0.859], 0.3: [0.861], 1.0: [0.88], 3.0: [0.3]}) == 2
    assert plateau({0.1: [0.9, None], 0.3: [0.5, 0.5]}) == 1
    assert plateau({0.1: [None]}) == 0


def test_the_interval_is_that_of_all_resamples() -> None:
    """All 5⁵ resamples of five values, each as likely as any other."""
    values = [0.012, -0.004, 0.007, 0.021, 0.003]
    means = np.array([statistics.fmean(chosen) for chosen in itertools.product(values, repeat=5)])
    low, high = interval(values) or (np.nan, np.nan)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=2e-4)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=2e-4)
    assert interval(values) == (low, high)


def test_the_interval_of_equal_values_is_a_point_and_that_of_one_is_none() -> None:
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert interval([0.5]) is None


def test_differences_are_paired_by_seed(entries: dict[tuple[str, str], Entry]) -> None:
    mine, theirs = (entries[name, "rank 1, ε = 1"] for name in ("B only", "as-lora"))
    found = difference(mine, theirs)
    assert found is not None
    scores = (SCORES[name, "rank 1, ε = 1"] for name in ("B only", "as-lora"))
    pairs = [one - other for one, other in zip(*scores, strict=True)]
    assert found.mean == pytest.approx(statistics.fmean(pairs))
    assert found.interval == pytest.approx(interval(pairs))
    assert found.seeds == 5
    # Unpaired, the interval would be wider: both methods find the same seeds hard.
    reversed_runs = [run.model_copy(update={"seed": 4 - run.seed}) for run in mine.results]
    other = difference(Entry(**vars(mine) | {"results": reversed_runs}), theirs)
    assert other is not None
    assert other.mean == pytest.approx(found.mean)
    assert other.interval != pytest.approx(found.interval)


def test_only_common_seeds_are_compared(entries: dict[tuple[str, str], Entry]) -> None:
    mine, theirs = (entries[name, "rank 1, ε = 1"] for name in ("B only", "as-lora"))
    fewer = Entry(**vars(mine) | {"results": mine.results[1:2]})
    found = difference(fewer, theirs)
    assert found is not None
    assert (found.mean, found.interval, found.seeds) == (pytest.approx(0.01), None, 1)
    assert difference(Entry(**vars(mine) | {"results": []}), theirs) is None


def test_a_method_with_a_result_that_diverged_has_no_mean(suite: Suite) -> None:
    """The other seeds would flatter it."""

    def some_diverge(planned: PlannedRun) -> float | None:
        diverges = (planned.method, planned.purpose, planned.seed) == ("B only", "result", 3)
        return None if diverges else score(planned)

    found = suite.with_results(finished(suite, some_diverge))
    reference, other = found.by_setting()["rank 1, ε = 1"]
    assert (other.mean, other.std, difference(other, reference)) == (None, None, None)
    assert leader([other, reference]) is reference
    rows = benchmark_rows([reference, other], "as-lora")
    assert rows[1][:4] == ["B only", "diverged", "5 of 5", "–"]
    assert "1 of 8 runs of B only diverged." in setting_notes([reference, other])


def test_a_row_says_what_was_found(suite: Suite) -> None:
    found = suite.with_results(finished(suite, score))
    rows = benchmark_rows(found.by_setting()["rank 1, ε = 1"], "as-lora")
    assert rows[0][:2] == ["as-lora", "81.00 ± 1.58"]
    assert rows[0][2:] == ["5 of 5", "–", "1", "2 of 3", "1.00", "0.70", "2.00 MB", "3.00 MB", "20 s"]
    assert rows[1][0] == "B only"
    assert rows[1][1] == f"{100 * statistics.fmean(SCORES['B only', 'rank 1, ε = 1']):.2f} ± 1.64"
    assert rows[1][3].startswith("−0.80 (−")
    assert rows[1][7] == "–"


def test_a_rate_at_the_edge_of_the_grid_is_marked(suite: Suite) -> None:
    found = suite.with_results(finished(suite, lambda planned: planned.rate / 10))
    assert {row[4] for row in benchmark_rows(found.by_setting()["rank 4, ε = 3"], "as-lora")} == {"3 (edge)"}


@pytest.mark.parametrize("runs", [0, 1, 4, 8, 9, 20])
def test_partial_results_say_what_is_missing(suite: Suite, tmp_path: Path, runs: int) -> None:
    """Nothing, one tuning run, a tuned method, all methods of a setting tuned, one result, two settings."""
    found = suite.with_results(finished(suite, score, most=runs))
    assert (found.finished, found.planned) == (runs, 4 * 2 * (3 + 5))
    page = Page(write_benchmark(tmp_path / "pages", found))
    check_self_contained(page)
    text = " ".join(page.text.split())
    assert f"{runs} of 64 runs are finished; {64 - runs} are missing" in text
    markdown = (tmp_path / "pages/results.md").read_text()
    first = 16 - min(16, runs)
    assert (f"* {first} of 16 runs are missing." in markdown) == (first > 0 and runs > 0)
    assert markdown.count("| tuning |") == {0: 0, 1: 1, 4: 1, 8: 0, 9: 0, 20: 1}[runs]
    assert markdown.count("* Not started: B only.") == {0: 0, 1: 1, 4: 0, 8: 0, 9: 0, 20: 0}[runs]
    waiting = markdown.partition("## Not started")[2].strip().splitlines()
    names = ["* Rank 1, ε = 1", "* Rank 1, ε = 3", "* Rank 4, ε = 1", "* Rank 4, ε = 3"]
    assert waiting == names[math.ceil(runs / 16) :]
    assert all((name[2:] in text.partition("Not started")[2]) == (name in waiting) for name in names[1:])
    figures = {0: 0, 1: 1, 4: 1, 8: 1, 9: 1, 20: 2}[runs]
    assert len(list((tmp_path / "pages").glob("setting-*.png"))) == page.tags.count("svg") == figures


def test_the_overview_has_each_method_s_difference_in_each_setting(suite: Suite, tmp_path: Path) -> None:
    one_setting = suite.with_results(finished(suite, score, most=16))
    assert overview(one_setting) is None
    found = suite.with_results(finished(suite, score, most=3 * 16 - 5))
    table = overview(found)
    assert table is not None
    headings, rows = table
    # In the third setting, three seeds of one method are finished, and two of the other one.
    assert headings == ["Method", "Rank 1, ε = 1", "Rank 1, ε = 3", "Rank 4, ε = 1"]
    difference_of_means = 100 * statistics.fmean(
        theirs - ours
        for theirs, ours in zip(SCORES["B only", "rank 1, ε = 1"], SCORES["as-lora", "rank 1, ε = 1"], strict=True)
    )
    assert [row[0] for row in rows] == ["B only"]
    assert rows[0][1].startswith(f"{difference_of_means:+.2f} (".replace("-", "−"))
    assert rows[0][2:] == ["+0.00 (+0.00 to +0.00)"] * 2
    assert "| B only | " + " | ".join(rows[0][1:]) + " |" in benchmark_markdown(found)
    text = " ".join(Page(write_benchmark(tmp_path / "pages", found)).text.split())
    assert "All settings Difference to as-lora in points" in text


def test_the_page_shows_everything(suite: Suite, tmp_path: Path) -> None:
    found = suite.with_results(finished(suite, score))
    page = Page(write_benchmark(tmp_path / "pages", found))
    check_self_contained(page)
    # Four settings, and two ranks with two ε each.
    assert page.tags.count("svg") == 6
    text = " ".join(page.text.split())
    assert "64 of 64 runs are finished." in text
    assert f"lorica benchmark {tmp_path}/suite.yaml" in text
    assert re.search(r"0\.1\.0\s*abc\s*2\.13\.0\s*64", text)
    assert "tuning_seeds" in text
    assert "Not private releases" in text
    names = {path.name for path in (tmp_path / "pages").iterdir()}
    figures = {f"setting-{number}.png" for number in range(1, 5)} | {"epsilon-1.png", "epsilon-2.png"}
    assert names == {"benchmark.html", "results.md"} | figures


def test_plots_of_settings_that_are_gone_are_deleted(suite: Suite, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    write_benchmark(pages, suite.with_results(finished(suite, score)))
    (pages / "notes.png").touch()
    only = small_suite(tmp_path, sweeps=[SWEEP | {"settings": {"rank": {"rank 1": ["lora.r=1"]}}}])
    write_benchmark(pages, only.with_results(finished(only, lambda planned: 0.5)))
    assert {path.name for path in pages.iterdir()} == {"benchmark.html", "results.md", "setting-1.png", "notes.png"}


def test_a_name_is_not_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> | x"
    sweep = {"settings": {"axis": {evil: []}}, "methods": {"as-lora": "as-lora", evil: "ffa-lora"}}
    suite = small_suite(tmp_path, sweeps=[sweep])
    found = suite.with_results(finished(suite, lambda planned: 0.5))
    assert "script" not in Page(write_benchmark(tmp_path / "pages", found)).tags
    assert benchmark_markdown(found).count("\\<script\\>alert(1)\\</script\\> \\| x |") == 1
    assert "<script>" not in benchmark_markdown(found).replace("\\<script\\>", "")


def test_versions_that_are_mixed_are_told(suite: Suite, tmp_path: Path) -> None:
    runs = finished(suite, score, most=2)
    first = next(iter(runs))
    runs[first] = runs[first].model_copy(update={"git": "def"})
    found = suite.with_results(runs)
    assert found.versions() == [("0.1.0", "def", "2.13.0", 1), ("0.1.0", "abc", "2.13.0", 1)]
    assert "different versions" in Page(write_benchmark(tmp_path / "pages", found)).text


def test_the_figure_of_a_setting_draws_seeds_means_and_tuning(entries: dict[tuple[str, str], Entry]) -> None:
    rows = ranked([entries[name, "rank 1, ε = 1"] for name in ("as-lora", "B only")])
    results, tuning = setting_figure(rows, "as-lora").axes
    lines = {line.get_label(): np.column_stack(line.get_data()) for line in results.lines}
    for place, row in enumerate(rows):
        np.testing.assert_allclose(lines[f"_{row.method} seeds"][:, 0], [100 * value for value in row.scores])
        np.testing.assert_allclose(lines[row.method][:, 0], 100 * (row.mean or 0))
        assert abs(lines[row.method][:, 1].mean() - place) < 1e-9
    np.testing.assert_allclose(lines["_as-lora line"][:, 0], 81)
    np.testing.assert_allclose(lines["_start line"][:, 0], 50)
    texts = [text.get_text() for text in tuning.texts]
    assert texts == ["79.0", "80.0", "60.0"] * 2
    assert [text.get_text() for text in tuning.texts if text.get_weight() == "bold"] == ["80.0", "80.0"]
    assert [label.get_text() for label in tuning.get_xticklabels()] == ["0.3", "1", "3"]


def test_the_figure_against_epsilon_joins_the_means(entries: dict[tuple[str, str], Entry]) -> None:
    figure = epsilon_figure([entry for (_, setting), entry in entries.items() if "rank 1" in setting])
    assert figure is not None
    (panel,) = figure.axes
    lines = {line.get_label(): np.column_stack(line.get_data()) for line in panel.lines}
    np.testing.assert_allclose(lines["as-lora"][:, 1], [81, 90])
    np.testing.assert_allclose(lines["B only"][:, 1], [80.2, 90])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["ε = 1", "ε = 3"]


def test_the_figure_against_epsilon_leaves_out_what_has_one_point(entries: dict[tuple[str, str], Entry]) -> None:
    group = [entry for (_, setting), entry in entries.items() if "rank 1" in setting]
    figure = epsilon_figure([entry for entry in group if (entry.method, entry.target) != ("B only", 3.0)])
    assert figure is not None
    labels = {line.get_label() for line in figure.axes[0].lines}
    assert "as-lora" in labels
    assert "B only" not in labels
    assert epsilon_figure([entry for entry in group if entry.target == 1.0]) is None


def test_runs_without_privacy_stand_beside_all_epsilons(tmp_path: Path) -> None:
    methods = SWEEP["methods"] | {"no privacy": "as-lora:privacy.noise=none+federation.weights=uniform"}
    suite = small_suite(tmp_path, sweeps=[SWEEP | {"methods": methods}])
    found = suite.with_results(finished(suite, lambda planned: 0.7))
    figure = epsilon_figure(found.by_group()["rank 1"])
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["ε = 1", "ε = 3", "no privacy"]
    assert epsilon_figure([entry for entry in found.by_group()["rank 1"] if entry.target is None]) is None
    lines = {line.get_label(): np.column_stack(line.get_data()) for line in figure.axes[0].lines}
    assert len(lines["no privacy"]) == 1
    rows = benchmark_rows(found.by_setting()["rank 1, ε = 1"], "as-lora")
    assert {row[0]: row[6] for row in rows}["no privacy"] == "no DP"
