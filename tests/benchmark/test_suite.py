"""From a suite file to runs: which, in which order, and what identifies them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorica.benchmark.suite import PlannedRun, digest_of, load_suite
from lorica.config import load
from lorica.errors import UserError
from lorica.methods.base import registry
from tests.benchmark.suites import CONTENT, cells, finished, result, small_suite

SUITES = Path(__file__).parent.parent.parent / "benchmarks/suites"
SWEEP = CONTENT["sweeps"][0]


def best_at_one(planned: PlannedRun) -> float:
    return 0.8 if planned.rate == 1 else 0.7


def test_every_combination_of_the_axes_is_a_setting(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    assert list(suite.settings) == ["rank 1, ε = 1", "rank 1, ε = 3", "rank 4, ε = 1", "rank 4, ε = 3"]
    cell = suite.settings["rank 4, ε = 1"][1]
    assert (cell.method, cell.group) == ("B only", "rank 4")
    for rate, (planned,) in cell.tuning.items():
        config = planned.config
        assert (config.lora.r, config.privacy.epsilon, config.optimizer.lr, config.seed) == (4, 1.0, rate, 100)
        assert (config.method.name, config.method.options) == ("ffa-lora", {"orthonormal_a": True})
    assert [planned.config.seed for planned in cell.results[0.3]] == [0, 1]
    assert suite.with_results({}).planned == 4 * 2 * (2 * 1 + 2)


def test_a_sweep_has_its_own_rates_and_seeds_or_those_of_the_suite(tmp_path: Path) -> None:
    clip = {"clip norm": {"C = 0.1": ["privacy.clip_norm=0.1"]}}
    own = SWEEP | {"settings": clip, "rates": [3, 10, 30], "tuning_seeds": [200, 201], "seeds": [7]}
    theirs = SWEEP | {"settings": {"clip norm": {"C = 1": []}}, "seeds": [0, 1, 2]}
    suite = small_suite(tmp_path, sweeps=[own, theirs])
    tuned = [(rate, run.seed) for rate, runs in suite.settings["C = 0.1"][0].tuning.items() for run in runs]
    assert tuned == [(rate, seed) for rate in (3, 10, 30) for seed in (200, 201)]
    runs = finished(suite, lambda run: run.rate / 100)
    results = [(run.setting, run.rate, run.seed) for run in runs.values() if run.purpose == "result"]
    expected = [("C = 0.1", 30, 7), ("C = 1", 1, 0), ("C = 1", 1, 1), ("C = 1", 1, 2)]
    assert results == [line for line in expected for _ in range(2)]
    found = suite.with_results(runs)
    assert found.finished == found.planned == 2 * (3 * 2 + 1 + 2 + 3)


def test_a_sweep_has_its_own_methods_or_those_of_the_suite(tmp_path: Path) -> None:
    own = SWEEP | {"settings": {"rank": {"rank 1": ["lora.r=1"]}}}
    theirs = {"settings": {"rank": {"rank 4": ["lora.r=4"]}}}
    suite = small_suite(tmp_path, methods={"A first": "as-lora:first=A", "as-lora": "as-lora"}, sweeps=[own, theirs])
    methods = {name: [cell.method for cell in found] for name, found in suite.settings.items()}
    assert methods == {"rank 1": ["as-lora", "B only"], "rank 4": ["A first", "as-lora"]}
    assert suite.settings["rank 4"][0].config.method.options == {"first": "A"}


def test_a_setting_is_tuned_first_and_then_run_seed_by_seed(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    runs = finished(suite, best_at_one)
    order = [(run.setting, run.purpose, run.method, run.rate, run.seed) for run in runs.values()]
    names = ["as-lora", "B only"]
    one = [("tuning", name, rate, 100) for name in names for rate in (0.3, 1.0)]
    one += [("result", name, 1.0, seed) for seed in (0, 1) for name in names]
    assert order == [(setting, *run) for setting in suite.settings for run in one]


def test_other_methods_go_on_while_one_is_still_tuned(tmp_path: Path) -> None:
    suite = small_suite(tmp_path).only("rank 1, ε = 1")
    tuned = finished(suite, best_at_one, most=4)
    missing = next(iter(tuned))
    del tuned[missing]
    assert [(run.purpose, run.method) for run in suite.due(tuned)] == [
        ("tuning", "as-lora"),
        ("result", "B only"),
        ("result", "B only"),
    ]


def test_the_rate_is_chosen_on_the_tuning_seeds_alone(tmp_path: Path) -> None:
    """The results would be better at the other rate."""

    def score(planned: PlannedRun) -> float:
        return best_at_one(planned) if planned.purpose == "tuning" else 1.5 - best_at_one(planned)

    suite = small_suite(tmp_path)
    runs = finished(suite, score)
    assert {run.rate for run in runs.values() if run.purpose == "result"} == {1.0}
    for entry in suite.with_results(runs).entries:
        assert entry.rate == 1.0
        assert entry.scores == pytest.approx([0.7, 0.7])


def test_a_run_is_the_same_whatever_it_and_its_folders_are_called(tmp_path: Path) -> None:
    config = load(None, ["method.name=as-lora"])
    named = ["name=other", "output=elsewhere", "privacy.ledger=ledger.sqlite", "method.gauge=orthonormal"]
    assert digest_of(load(None, named)) == digest_of(config)
    changes = ["seed=1", "optimizer.lr=0.25", "method.gauge=none", "privacy.epsilon=2", "federation.min_clients=3"]
    assert len({digest_of(load(None, [change])) for change in changes} | {digest_of(config)}) == len(changes) + 1


def test_renamed_settings_and_methods_keep_their_results(tmp_path: Path) -> None:
    runs = finished(small_suite(tmp_path), best_at_one)
    renamed = SWEEP | {"methods": {"as-lora": "as-lora", "FFA": "ffa-lora:orthonormal_a=true"}}
    found = small_suite(tmp_path, sweeps=[renamed]).with_results(runs)
    assert found.finished == found.planned
    assert {entry.method for entry in found.entries} == {"as-lora", "FFA"}


def test_a_changed_experiment_is_run_again(tmp_path: Path) -> None:
    runs = finished(small_suite(tmp_path), best_at_one)
    assert small_suite(tmp_path, "federation.batch_size=32").with_results(runs).finished == 0


def test_a_setting_that_two_sweeps_share_is_run_once(tmp_path: Path) -> None:
    other = SWEEP | {"settings": {"rank": {"rank 4 again": ["lora.r=4", "privacy.epsilon=3"]}}}
    suite = small_suite(tmp_path, sweeps=[SWEEP, other])
    runs = finished(suite, best_at_one)
    assert len(runs) == 4 * 2 * 4
    assert suite.with_results(runs).finished == suite.with_results(runs).planned == 5 * 2 * 4


def test_a_method_that_a_setting_cannot_have_is_left_out_with_the_reason(tmp_path: Path) -> None:
    shared = ["privacy.noise_against=sums", "federation.secure_sum=true", "federation.min_clients=6"]
    methods = {"as-lora": "as-lora", "flora": "flora", "head only": "head-only"}
    axis = {"noise": {"own noise": [], "shared noise": shared, "frozen head": ["model.head=freeze"]}}
    suite = small_suite(tmp_path, sweeps=[{"settings": axis, "methods": methods}])
    refusals = {(c.setting, c.method): c.refusal for found in suite.settings.values() for c in found if c.refusal}
    assert set(refusals) == {("shared noise", "flora"), ("frozen head", "head only")}
    assert "it needs the factors of single clients" in refusals["shared noise", "flora"]
    found = suite.with_results(finished(suite, best_at_one))
    assert found.finished == found.planned == 7 * 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"overrides": []}, "privacy.noise = 'secure'"),
        ({"sweeps": [SWEEP | {"methods": {"as-lora": "as-lora:privacy.noise=secure"}}]}, "privacy.noise = 'secure'"),
        ({"overrides": ["privacy.noise=reproducible", "engine=flower"]}, "engine = 'flower'"),
        ({"overrides": ["privacy.noise=reproducible", "optimizer.lr=1"]}, "set rates of the suite"),
        ({"overrides": ["privacy.noise=reproducible", "seed=1"]}, "set seeds and tuning_seeds of the suite"),
        ({"seeds": [0, 100]}, "100 is also a tuning seed"),
        ({"seeds": [0, 0]}, "a value appears twice"),
        ({"sweeps": [SWEEP | {"rates": [1, 1]}]}, "a value appears twice"),
        ({"sweeps": [SWEEP | {"seeds": [100]}]}, "100 is also a tuning seed"),
        ({"sweeps": [SWEEP | {"tuning_seeds": [1]}]}, "1 is also a tuning seed"),
        ({"sweeps": [SWEEP | {"seeds": []}]}, "sweeps.seeds"),
        ({"rates": [0.1, -1]}, "rates"),
        ({"rates": []}, "rates"),
        ({"reference": "fed-avg"}, "every sweep needs the reference method, 'fed-avg'"),
        (
            {"methods": {"ffa": "ffa-lora"}, "sweeps": [SWEEP, {"settings": SWEEP["settings"]}]},
            "every sweep needs the reference method, 'as-lora'",
        ),
        ({"sweeps": [{"settings": SWEEP["settings"]}]}, "set methods of the sweep or of the suite"),
        ({"methods": {}, "sweeps": [{"settings": SWEEP["settings"]}]}, "set methods of the sweep or of the suite"),
        ({"methods": {"as-lora": "as-lora"}, "sweeps": [SWEEP | {"methods": {}}]}, "sweeps.methods"),
        ({"sweep": []}, "did you mean 'sweeps'?"),
        ({"sweeps": [SWEEP | {"method": {}}]}, "did you mean 'methods'?"),
        ({"sweeps": [SWEEP, SWEEP]}, "two settings have this name"),
        ({"sweeps": [SWEEP | {"methods": {"as-lora": "as-lorra"}}]}, "no such method"),
        ({"sweeps": [SWEEP | {"methods": {"as-lora": "as-lora:optimizer.lr=1"}}]}, "set rates of the suite"),
        ({"sweeps": [SWEEP | {"settings": {"rank": {"rank 0": ["lora.r=0"]}}}]}, "lora.r = 0"),
        ({"experiment": "nowhere.yaml"}, "no such file"),
    ],
)
def test_what_a_suite_gets_wrong_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        small_suite(tmp_path, **changes)
    assert named.lower() in str(error.value).lower()


def test_a_filter_that_chooses_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank 1, ε = 1; rank 1, ε = 3"):
        small_suite(tmp_path).only("rank 2")


def test_all_runs_use_one_thread_unless_the_suite_says_otherwise(tmp_path: Path) -> None:
    assert {cell.config.model.threads for cell in cells(small_suite(tmp_path))} == {1}
    assert {cell.config.model.threads for cell in cells(small_suite(tmp_path, "model.threads=2"))} == {2}


def test_the_suites_of_the_repository_are_sound() -> None:
    for path in sorted(SUITES.glob("*.yaml")):
        suite = load_suite(path)
        assert suite.config.name == path.stem
        for found in suite.settings.values():
            assert [cell.refusal for cell in found if cell.method == suite.config.reference] == [None]


def test_the_suite_in_the_documentation_is_sound(tmp_path: Path) -> None:
    text = (SUITES.parent.parent / "docs/benchmark.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    path = tmp_path / "suite.yaml"
    path.write_text(block.replace("../../examples", str(SUITES.parent.parent / "examples")), encoding="utf-8")
    suite = load_suite(path)
    assert next(iter(suite.settings)) == "rank 1, ε = 1"
    assert len(cells(suite)) == 4 * 3


def test_the_suite_digits_has_every_method() -> None:
    """With the trained head, since the head alone is a method too."""
    suite = load_suite(SUITES / "digits.yaml")
    found = suite.settings["trained head, rank 4, ε = 3, own noise"]
    assert {cell.config.method.name for cell in found} == set(registry())
    assert [cell.refusal for cell in found if cell.refusal] == []


def test_a_run_that_diverged_rules_its_rate_out(tmp_path: Path) -> None:
    suite = small_suite(tmp_path)
    runs = finished(suite, lambda planned: None if planned.rate == 1 else 0.6)
    assert {entry.rate for entry in suite.with_results(runs).entries} == {0.3}
    runs = finished(suite, lambda planned: None)
    assert len(runs) == 4 * 2 * 2
    assert list(suite.due(runs)) == []
    assert result(cells(suite)[0].tuning[1][0], None).score is None
