import json
from itertools import pairwise

import matplotlib
import numpy as np
import pytest

from lorica.errors import UserError
from lorica.reporting.comparison import ComparedRun, summarise
from lorica.reporting.plots import (
    accuracy_figure,
    choices_figure,
    clients_figure,
    comparison_figure,
    factors_figure,
    final_figure,
)
from lorica.reporting.run_folder import read_run
from lorica.reporting.style import _FIXED_PLACES, looks, rounded_up, shortened, spread


def lines(panel):
    return {line.get_label(): np.column_stack(line.get_data()) for line in panel.lines}


def test_accuracy_and_epsilon_are_drawn_as_recorded(make_run):
    run = read_run(make_run(rounds=6, evaluate_every=2))
    top, bottom = accuracy_figure(run).axes
    evaluated = [row for row in run.metrics if "accuracy" in row]
    expected = [(row["round"], 100 * row["accuracy"]) for row in evaluated]
    np.testing.assert_allclose(lines(top)["as-lora"], expected)
    np.testing.assert_allclose(lines(top)["start"][:, 1], 73.0)
    spent = [(row["round"], row["epsilon"]) for row in run.metrics[1:]]
    np.testing.assert_allclose(lines(bottom)["epsilon"], spent)
    np.testing.assert_allclose(lines(bottom)["target"][:, 1], 3.0)
    assert top.get_xlim() == bottom.get_xlim()
    assert "%" in top.get_ylabel()
    assert "ε" in bottom.get_ylabel()
    assert bottom.get_ylim()[0] == 0


def test_without_dp_there_is_no_epsilon_panel(make_run):
    assert len(accuracy_figure(read_run(make_run(noise="none"))).axes) == 1


def test_the_label_is_the_last_round_not_the_best(make_run):
    run = read_run(make_run(rounds=3, accuracies=[0.5, 0.95, 0.7, 0.61]))
    texts = [text.get_text() for text in accuracy_figure(run).axes[0].texts]
    assert texts == ["61.0 %", "start 50.0 %"]


def test_every_choice_is_a_cell_of_its_colour(make_run):
    choices = ["A", "B", "AB", ""]
    run = read_run(make_run(rounds=5, layers=3, factors=lambda number, layer, site: choices[(number + layer) % 4]))
    panel = factors_figure(run).axes[0]
    names = {"A": "A", "B": "B", "AB": "A and B", "": "neither"}
    patches = {patch.get_label(): patch.get_path() for patch in panel.patches}
    for number in range(1, 6):
        for layer in range(3):
            inside = {name for name, path in patches.items() if path.contains_point((number, layer))}
            assert inside == {names[choices[(number + layer) % 4]]}
    assert [label.get_text() for label in panel.get_yticklabels()] == ["layer 0", "layer 1", "layer 2"]
    assert panel.get_ylim()[0] > panel.get_ylim()[1]


def test_the_map_labels_the_shares(make_run):
    run = read_run(make_run(rounds=4, layers=1, factors=lambda number, layer, site: "A" if number == 1 else "B"))
    texts = [text.get_text() for text in factors_figure(run).axes[0].texts]
    assert "25 %" in texts
    assert "75 %" in texts


def test_the_certainty_of_the_choices_is_the_median_over_layers(make_run):
    """The warm-up of two rounds records none, and the second layer has none in round 3."""

    def ratios(number, layer):
        return None if number <= 2 or (number, layer) == (3, 1) else [0.2, 4.0, 0.5][layer] * number

    panel = choices_figure(read_run(make_run(rounds=5, layers=3, ratios=ratios))).axes[0]
    np.testing.assert_allclose(lines(panel)["ratio"], [(3, 1.05), (4, 2.0), (5, 2.5)])
    np.testing.assert_allclose(lines(panel)["one"][:, 1], 1.0)
    assert panel.get_ylim()[0] == 0
    assert panel.get_ylim()[1] > 2.5


@pytest.mark.parametrize("clients", [1, 6, 200])
def test_bars_are_the_clients_records_and_noise(make_run, clients):
    run = read_run(make_run(clients=clients))
    records, noise = clients_figure(run).axes
    assert [bar.get_width() for bar in records.patches] == [client["records"] for client in run.clients]
    assert [bar.get_width() for bar in noise.patches] == [client["noise_multiplier"] for client in run.clients]
    assert records.get_xlim()[0] == 0


def test_figures_that_have_nothing_to_draw_are_errors(make_run):
    folder = make_run(noise="none")
    (folder / "decisions.jsonl").unlink()
    run = read_run(folder)
    with pytest.raises(UserError, match="no client"):
        clients_figure(run)
    with pytest.raises(UserError, match=r"decisions\.jsonl"):
        factors_figure(run)
    with pytest.raises(UserError, match="no signal-to-noise ratios"):
        choices_figure(run)
    (folder / "metrics.jsonl").write_text(json.dumps({"round": 1, "loss": 1.0}))
    with pytest.raises(UserError, match="no round was evaluated"):
        accuracy_figure(read_run(folder))


def test_a_comparison_draws_the_mean_and_the_range_of_the_seeds(make_metrics):
    curves = np.random.default_rng(0).uniform(0.5, 0.9, (3, 6))
    results = [ComparedRun("as-lora", seed, make_metrics(list(curve))) for seed, curve in enumerate(curves)]
    results += [ComparedRun("ffa-lora", 0, make_metrics([0.5] * 6))]
    panel = comparison_figure(results).axes[0]
    np.testing.assert_allclose(lines(panel)["as-lora"][:, 1], 100 * curves.mean(axis=0))
    np.testing.assert_allclose(lines(panel)["as-lora"][:, 0], range(6))
    (band,) = panel.collections
    corners = band.get_paths()[0].vertices
    for number in range(6):
        heights = corners[corners[:, 0] == number, 1]
        np.testing.assert_allclose(
            (heights.min(), heights.max()), 100 * np.array([curves.min(0), curves.max(0)])[:, number]
        )


def test_a_line_covers_the_rounds_that_all_seeds_evaluated(make_metrics):
    results = [
        ComparedRun("m", 1, make_metrics([0.1, 0.2, 0.3])),
        ComparedRun("m", 2, make_metrics([0.3, 0.4, 0.5, 0.9])),
    ]
    np.testing.assert_allclose(lines(comparison_figure(results).axes[0])["m"], [(0, 20), (1, 30), (2, 40)])


def test_final_accuracies_are_the_last_rounds_of_the_seeds(make_metrics):
    finals = [0.6, 0.8, 0.7]
    results = [ComparedRun("m", seed, make_metrics([0.5, 0.99, final])) for seed, final in enumerate(finals)]
    results += [ComparedRun("alone", 0, make_metrics([0.5, 0.99, 0.65]))]
    panel = final_figure(results).axes[0]
    drawn = lines(panel)
    np.testing.assert_allclose(drawn["_m seeds"][:, 0], 100 * np.array(finals))
    np.testing.assert_allclose(drawn["m"][:, 0], 100 * np.mean(finals))
    deviation = 100 * np.std(finals, ddof=1)
    np.testing.assert_allclose(drawn["_m std"][:, 0], [70 - deviation, 70 + deviation])
    np.testing.assert_allclose(drawn["start"][:, 0], 50)
    assert "_alone std" not in drawn
    assert [label.get_text() for label in panel.get_yticklabels()] == ["m", "alone"]


def test_labels_at_the_ends_do_not_overlap(make_metrics):
    results = [ComparedRun(f"method {i}", 1, make_metrics([0.5, 0.8 + 0.0001 * i])) for i in range(12)]
    figure = comparison_figure(results)
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 12
    assert all(lower.y1 <= upper.y0 + 0.5 for lower, upper in pairwise(boxes))
    assert max(box.x1 for box in boxes) <= figure.bbox.width


def test_a_method_has_one_colour_in_every_figure(make_run, make_metrics):
    results = [ComparedRun(method, 1, make_metrics([0.5, 0.6])) for method in ("ro-lora", "as-lora", "zzz")]
    run = read_run(make_run(method="as-lora"))

    def colour(panel):
        return next(line.get_color() for line in panel.lines if line.get_label() == "as-lora")

    seen = {colour(f.axes[0]) for f in (accuracy_figure(run), comparison_figure(results), final_figure(results))}
    assert seen == {looks(["as-lora"])["as-lora"].colour}


def test_up_to_28_methods_look_different():
    names = [*_FIXED_PLACES, *(f"new {i}" for i in range(28 - len(_FIXED_PLACES)))]
    assert len({(look.colour, look.dashes) for look in looks(names).values()}) == 28
    assert len(looks(f"m{i}" for i in range(30))) == 30


def test_no_global_state_changes(make_run):
    before = dict(matplotlib.rcParams)
    accuracy_figure(read_run(make_run()))
    assert dict(matplotlib.rcParams) == before


def test_a_name_with_formula_signs_is_drawn_as_text(make_metrics, tmp_path):
    figure = comparison_figure([ComparedRun(r"cost $\undefined{$", 1, make_metrics([0.5, 0.6]))])
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("seed", range(5))
def test_spread_positions_keep_order_gap_and_bounds(seed):
    random = np.random.default_rng(seed)
    values = list(random.uniform(0, 10, 8))
    positions = spread(values, gap=0.9, low=0, high=10)
    ordered = np.array(positions)[np.argsort(values)]
    assert (np.diff(ordered) >= 0.9 - 1e-9).all()
    assert ordered[0] >= 0
    assert ordered[-1] <= 10 + 1e-9


def test_spread_leaves_what_does_not_overlap():
    assert spread([5.0, 1.0, 3.0], gap=1, low=0, high=10) == [5.0, 1.0, 3.0]
    assert spread([4.0, 4.0], gap=1, low=0, high=10) == [3.5, 4.5]


def test_costs_are_never_rounded_down():
    cases = {2.991: "3.00", 3.0: "3.00", 3.0000001: "3.01", 1e-5: "1e-5", 1.234e-6: "1.3e-6", 0.05: "0.05", 0.0: "0.00"}
    assert {value: rounded_up(value) for value in cases} == cases
    assert rounded_up(None) == "–"
    assert rounded_up(float("inf")) == "∞"


def test_long_names_are_shortened_in_the_middle():
    assert shortened("short") == "short"
    assert shortened("a" * 20 + "b" * 20) == "a" * 15 + "…" + "b" * 14


def test_summaries_use_sample_deviation_over_seeds(make_metrics):
    results = [
        ComparedRun("m", seed, make_metrics([0.5, 0.9, last], epsilon=seed)) for seed, last in ((1, 0.6), (2, 0.7))
    ]
    (summary,) = summarise(results)
    assert summary.mean == pytest.approx(0.65)
    assert summary.std == pytest.approx(np.std([0.6, 0.7], ddof=1))
    assert summary.epsilon == 2
    assert (summary.bytes_up, summary.bytes_down) == (3000, 6000)
