import io
import json

import numpy as np
import pytest
from rich.console import Console

from lorica.errors import UserError
from lorica.reporting.comparison import ComparedRun
from lorica.reporting.html import write_report
from lorica.reporting.run_folder import read_run
from lorica.reporting.style import duration
from lorica.reporting.tables import comparison_markdown, comparison_table, human_bytes, run_table


def printed(renderable, width=140):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_sizes_are_decimal_with_three_digits():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.00 kB", 12_345: "12.3 kB", 999_499: "999 kB", 999_600: "1.00 MB"}
    sizes |= {123_456_789: "123 MB", 5e9: "5.00 GB", 2e15: "2000 TB"}
    assert {size: human_bytes(size) for size in sizes} == sizes


def test_times_have_a_unit_that_fits():
    assert [duration(value) for value in (0.05, 4.2, 42, 210, 7560, None)] == [
        "0.05 s",
        "4.2 s",
        "42 s",
        "3.5 min",
        "2.1 h",
        "–",
    ]


def test_a_run_shows_its_last_round_not_its_best(make_run):
    text = printed(run_table(read_run(make_run(rounds=3, accuracies=[0.5, 0.6, 0.95, 0.7]))))
    assert "50.0 % → 70.0 % (+20.0 points, round 3)" in text
    assert "95.0" not in text


def test_a_run_shows_cost_traffic_and_places(make_run):
    folder = make_run(rounds=4, clients=2, bytes_up=1000, bytes_down=2_000_000)
    (folder / "adapter").mkdir()
    text = printed(run_table(read_run(folder)), width=300)
    assert "ε = 2.97, δ = 1e-5 (largest of 2 clients)" in text
    assert "8.00 kB up, 16.0 MB down" in text
    assert str(folder / "adapter") in text
    assert "not written" in text
    assert "Not a private release" not in text


def test_clients_that_were_left_out_are_named_with_their_rounds(make_run):
    folder = make_run(rounds=3, clients=2)
    assert "Left out" not in printed(run_table(read_run(folder)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["missing"] = {2: [1], 3: [0, 1]}.get(line["round"], [])
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    text = "client 0 in round 3; client 1 in rounds 2, 3"
    assert text in printed(run_table(read_run(folder)))
    assert text in write_report(folder).read_text(encoding="utf-8")


def test_clients_have_rows_up_to_ten(make_run):
    assert "Steps" in printed(run_table(read_run(make_run("ten", clients=10))))
    assert "Steps" not in printed(run_table(read_run(make_run("eleven", clients=11))))


@pytest.mark.parametrize("noise", ["reproducible", "none"])
def test_a_run_that_is_not_private_says_so(make_run, noise):
    assert "Not a private release" in printed(run_table(read_run(make_run(noise=noise))))


def test_factors_are_letters_per_layer_with_shares(make_run):
    run = read_run(make_run(rounds=4, layers=2, factors=lambda number, layer, site: "BA"[(number + layer) % 2]))
    rows = [line.split() for line in printed(run_table(run)).splitlines() if "layer " in line]
    assert rows == [["layer", "0", "ABAB", "50", "%", "50", "%"], ["layer", "1", "BABA", "50", "%", "50", "%"]]


def test_layers_with_the_same_history_share_a_row_and_long_histories_are_cut(make_run):
    text = printed(run_table(read_run(make_run(rounds=100, layers=24, factors=lambda *_: "AB"))))
    assert "layer 0 to layer 23" in text
    assert "+" * 31 + "…" + "+" * 8 + " " in text
    assert "100 %" in text


def test_names_are_not_markup(make_run, make_metrics):
    assert "[red]x" in printed(run_table(read_run(make_run(method="[red]x"))))
    assert "[red]x" in printed(comparison_table([ComparedRun("[red]x", 1, make_metrics([0.5, 0.6]))]))


def test_a_comparison_shows_the_mean_and_deviation_of_the_last_rounds(make_metrics):
    finals = [0.61, 0.72, 0.68]
    results = [
        ComparedRun("m", seed, make_metrics([0.5, 0.99, final], epsilon=2.5)) for seed, final in enumerate(finals)
    ]
    results += [ComparedRun("other", seed, make_metrics([0.5, 0.6, 0.9])) for seed in range(3)]
    header, ruler, first, second = comparison_markdown(results).splitlines()
    assert "Seed 0, 1, 2 (%)" in header
    assert ruler.count("---:") == header.count("|") - 2
    assert first.startswith("| other | 90.00 ± 0.00 | 90.00, 90.00, 90.00 | 50.00 | 2 | no DP |")
    mean, deviation = 100 * np.mean(finals), 100 * np.std(finals, ddof=1)
    assert second.startswith(f"| m | {mean:.2f} ± {deviation:.2f} | 61.00, 72.00, 68.00 | 50.00 | 2 | 2.50 |")
    assert "| 3.00 kB | 6.00 kB | 2.0 s |" in second
    assert "99.00" not in first + second
    text = printed(comparison_table(results))
    assert f"{mean:.2f} ± {deviation:.2f}" in text


def test_a_method_may_miss_seeds(make_metrics):
    results = [ComparedRun("m", seed, make_metrics([0.5, 0.6 + seed / 100])) for seed in (1, 2)]
    results += [ComparedRun("alone", 2, make_metrics([0.5, 0.7, 0.8]))]
    text = comparison_markdown(results)
    assert "| alone | 80.00 | 2:\u00a080.00 | 50.00 | 2 |" in text
    assert "1:\u00a061.00, 2:\u00a062.00" in text


def test_seeds_that_end_in_different_rounds_are_visible(make_metrics):
    results = [ComparedRun("m", 1, make_metrics([0.5, 0.6])), ComparedRun("m", 2, make_metrics([0.5, 0.6, 0.7]))]
    assert "| 1 to 2 |" in comparison_markdown(results)


def test_a_bar_in_a_name_does_not_break_the_table(make_metrics):
    text = comparison_markdown([ComparedRun("a|b\nc", 1, make_metrics([0.5, 0.6]))])
    assert "| a\\|b c |" in text


def test_what_cannot_be_compared_is_an_error(make_metrics):
    metrics = make_metrics([0.5, 0.6])
    for results, problem in (
        ([], "nothing to compare"),
        ([ComparedRun("m", 1, metrics), ComparedRun("m", 1, metrics)], "twice"),
        ([ComparedRun("m", 1, metrics[:1])], "no round was evaluated"),
    ):
        with pytest.raises(UserError, match=problem):
            comparison_table(results)
