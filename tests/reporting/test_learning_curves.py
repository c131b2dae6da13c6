"""The script that draws runs with and without privacy side by side."""

import numpy as np

from lorica.reporting.run_folder import read_run
from tests.scripts import load_script
from tests.test_docs import SCRIPTS


def test_each_experiment_has_a_panel_with_its_runs_as_recorded(make_run):
    runs = [
        read_run(make_run(name="pairs", accuracies=[0.4, 0.9, 0.5], rounds=2, epsilon=3.0)),
        read_run(make_run(name="pairs", accuracies=[0.4, 0.5, 0.6], rounds=2, noise="none")),
        read_run(make_run(name="single", accuracies=[0.3, 0.0, 0.8], rounds=2, evaluate_every=2, epsilon=0.5)),
    ]
    pairs, single = load_script(SCRIPTS / "learning_curves.py").figure(runs).axes
    drawn = {line.get_label(): np.column_stack(line.get_data()) for line in pairs.lines}
    np.testing.assert_allclose(drawn["ε = 3"], [(0, 40), (1, 90), (2, 50)])
    np.testing.assert_allclose(drawn["no privacy"], [(0, 40), (1, 50), (2, 60)])
    assert {text.get_text() for text in pairs.texts} == {"ε = 3  50.0 %", "no privacy  60.0 %"}
    (line,) = single.lines
    np.testing.assert_allclose(np.column_stack(line.get_data()), [(0, 30), (2, 80)])
    assert [panel.get_title(loc="left") for panel in (pairs, single)] == ["pairs", "single"]
