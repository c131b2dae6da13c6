"""A mistake in a configuration is one clear error that names key, value and remedy."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorica.config import ExperimentConfig, MethodConfig, load
from lorica.errors import UserError
from lorica.methods.base import make_method

MINIMAL: dict[str, Any] = {
    "name": "x",
    "model": {"base": "b"},
    "task": {"type": "text-classification", "train": "a.csv", "test": "b.csv"},
}


def test_defaults_and_the_issues_keys() -> None:
    text = """
name: sst2-as-lora
seed: 42
model:   {base: some/model, head: train, pooling: mean}
lora:    {r: 8, lora_alpha: 8, lora_dropout: 0.0, target_modules: [query, value]}
task:    {type: text-classification, train: a.csv, test: b.csv, text: [sentence], label: label, max_length: 128}
federation: {clients: 6, partition: dirichlet, alpha: 0.5, rounds: 100, local_steps: 10, batch_size: 128,
             participation: 1.0}
optimizer: {name: sgd, lr: 0.5, lr_a: null, lr_b: null}
method:  {name: as-lora, score: energy}
privacy: {unit: record, epsilon: 3.0, delta: 1.0e-5, clip_norm: 2.0, noise: secure}
"""
    config = load(yaml.safe_load(text))
    assert config.method.options == {"score": "energy"}
    assert config.privacy.noise == "secure"


def test_the_resolved_file_reads_back_as_the_same_experiment(tmp_path: Path) -> None:
    config = load(None, ["privacy=none", "method.score=energy"])
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("section", "overrides", "noise", "clip_norm"),
    [
        ("none", [], "none", 2.0),
        ({"noise": "none", "clip_norm": 1.0}, [], "none", 1.0),
        ({"noise": "none", "clip_norm": None}, [], "none", None),
        # A file's ε stays without meaning, also one that a run with noise could not have.
        ({"noise": "none", "epsilon": 3.0, "noise_multiplier": 1.0}, [], "none", 2.0),
        ({"epsilon": 3.0, "clip_norm": 0.5}, ["privacy=none"], "none", 0.5),
        ({"epsilon": 3.0, "clip_norm": 0.5}, ["privacy.clip_norm=null", "privacy=none"], "none", None),
        ({"epsilon": 3.0, "clip_norm": 0.5}, ["privacy.noise=none", "privacy.clip_norm=null"], "none", None),
        ({"epsilon": 3.0, "noise_against": "sums"}, ["privacy=none"], "none", 2.0),
        ({"epsilon": 3.0}, ["privacy={noise: none, clip_norm: 4}"], "none", 4.0),
        ("none", ["privacy.clip_norm=1"], "none", 1.0),
        # Whoever says on the command line that there is no noise means it.
        ("none", ["privacy.epsilon=1", "privacy=none"], "none", 2.0),
        ("none", ["privacy.noise=secure", "privacy.epsilon=8"], "secure", 2.0),
    ],
)
def test_privacy_can_be_switched_off_with_any_clip(
    section: Any, overrides: list[str], noise: str, clip_norm: float | None
) -> None:
    content = MINIMAL | {"privacy": section}
    privacy = load(content, overrides).privacy
    assert (privacy.noise, privacy.clip_norm, privacy.private) == (noise, clip_norm, noise != "none")
    assert privacy.epsilon == (8.0 if privacy.private else None)
    assert privacy.noise_against == "replies"
    assert content["privacy"] == section
    assert load(load(content, overrides).model_dump()).privacy == privacy


@pytest.mark.parametrize(
    ("section", "override", "message"),
    [
        ({}, "privacy.clip_norm=null", r"^privacy\.clip_norm = None: the noise is calibrated .* privacy\.noise=none"),
        (
            "none",
            "privacy.epsilon=3",
            r"^privacy\.epsilon = '3': the experiment .* Add privacy\.noise=secure",
        ),
        (
            {"noise": "none"},
            "privacy.noise_multiplier=1",
            r"^privacy\.noise_multiplier = '1': the experiment has",
        ),
        ("none", "privacy.clip_norm=0", r"^privacy\.clip_norm = 0: .*greater than or equal"),
    ],
)
def test_a_clip_or_an_epsilon_that_contradicts_the_noise_is_refused(section: Any, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(MINIMAL | {"privacy": section}, [override])


def test_overrides_reach_any_depth_and_leave_the_source_alone() -> None:
    content = yaml.safe_load(yaml.safe_dump(MINIMAL))
    config = load(content, ["privacy.epsilon=1", "lora.target_modules=[q, v]", "optimizer.lr_a=null", "task.text=s"])
    assert config.privacy.epsilon == 1.0
    assert config.lora.target_modules == ["q", "v"]
    assert config.task.text == ["s"]
    assert content == MINIMAL


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("privacy.epsilonn=3", "privacy.epsilonn", "did you mean 'epsilon'"),
        ("federation.round=3", "federation.round", "'rounds'"),
        ("fedration.rounds=3", "fedration", "'federation'"),
        ("privacy.epsilon=0", "privacy.epsilon", "greater than or equal to 0.01"),
        ("privacy.epsilon=-1", "privacy.epsilon", "greater than or equal to 0.01"),
        ("privacy.delta=1", "privacy.delta", "less than 0.5"),
        ("privacy.delta=0.5", "privacy.delta", "less than 0.5"),
        ("privacy.delta=1.0e-13", "privacy.delta", "0.000000000001"),
        ("privacy.epsilon=1000", "privacy.epsilon", "less than or equal to 100"),
        ("privacy.epsilon=.nan", "privacy.epsilon", "finite"),
        ("privacy.clip_norm=.inf", "privacy.clip_norm", "finite"),
        ("optimizer.lr=.inf", "optimizer.lr", "finite"),
        ("federation.rounds=200_000", "federation", "participations"),
        ("federation.local_steps=10_001", "federation", "1,000,000 steps"),
        ("privacy.noise_multiplier=1", "privacy", "either epsilon or noise_multiplier"),
        ("privacy.noise=seeded", "privacy.noise", "secure"),
        ("privacy=nothing", "privacy", ""),
        ("lora.r=many", "lora.r", "integer"),
        ("lora.r=0", "lora.r", "greater than or equal to 1"),
        ("federation.participation=1.5", "federation.participation", "less than or equal to 1"),
        ("name=a/b", "name", "pattern"),
        ("task.text=[a, b, c]", "task.text", "pair"),
        ("task.type=regression", "task.type", "text-classification"),
        ("model.base=null", "model.base", "string"),
        ("no-equals-sign", "override", "section.key=value"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(override: str, key: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load(MINIMAL, [override])
    assert caught.value.key == key
    assert hint.lower() in str(caught.value).lower()


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.train"):
        load(MINIMAL | {"task": {"type": "text-classification"}})
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    with pytest.raises(UserError, match="not valid YAML"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="not a mapping"):
        load(tmp_path / "list.yaml")


def test_method_options_are_checked_by_the_method() -> None:
    with pytest.raises(UserError, match=r"method\.scor .*Did you mean 'score'"):
        make_method(MethodConfig(name="as-lora", scor="energy"), [])  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"method\.score"):
        make_method(MethodConfig(name="as-lora", score="finite-differences"), [])  # type: ignore[call-arg]
    with pytest.raises(UserError, match="Did you mean 'as-lora'"):
        make_method(MethodConfig(name="aslora"), [])


def test_every_setting_is_documented() -> None:
    """The embedded default names only keys that exist, and is the experiment that `lorica run` runs."""
    config = load()
    assert isinstance(config, ExperimentConfig)
    assert config.model.base == "lorica:glyph-vit"
    assert config.privacy.epsilon == 3.0
