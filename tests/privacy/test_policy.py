"""An owner's policy refuses what would cost, show or train more than the owner allows."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import yaml
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant

from lorica.adapters.base_files import hash_of_base
from lorica.config import ExperimentConfig, PrivacyConfig, load
from lorica.errors import UserError
from lorica.privacy import accounting
from lorica.privacy.accounting import Steps, epsilon_rdp
from lorica.privacy.ledger import Release
from lorica.privacy.plan import ClientPlan, Refused, plan_client, plan_run
from lorica.privacy.policy import Policy, load_policy
from lorica.privacy.unit import RECORD, PrivacyUnit

BASE = "sha256:" + "ab" * 32
OTHER_BASE = "sha256:" + "cd" * 32
OWNER: dict[str, Any] = {
    "max_epsilon": 3.1,
    "delta": 1e-5,
    "base_models": [BASE],
    "tasks": [{"type": "text-classification", "text": ["sentence"]}],
    "min_noise_multiplier": 0.7,
    "max_clip_norm": 2.0,
    "max_sampling_rate": 0.2,
    "max_steps": 1000,
}
PROPOSAL: dict[str, Any] = {
    "name": "proposal",
    "model": {"base": "./model"},
    "task": {"type": "text-classification", "train": "a.csv", "test": "b.csv", "text": ["sentence"]},
    "federation": {"rounds": 20, "local_steps": 5, "batch_size": 100},
    "privacy": {"epsilon": 3.0, "delta": 1e-5, "clip_norm": 2.0},
}


def proposal(*overrides: str) -> tuple[ExperimentConfig, ClientPlan]:
    """What a server proposes to an owner of 1,000 records, who takes part in every round."""
    config = load(PROPOSAL, list(overrides))
    steps = config.federation.rounds * config.federation.local_steps
    return config, plan_client(0, 1000, config.federation.batch_size, steps, config.privacy)


def review(*overrides: str, base: str = BASE, **changes: Any) -> None:
    Policy(**OWNER | changes).review(*proposal(*overrides), base)


def test_what_the_policy_allows_passes() -> None:
    review()
    review("task.max_length=64", "task.train=elsewhere.csv", "lora.r=32", "method.name=fed-avg")
    review(base_models=None, base=OTHER_BASE)
    review("federation.private_test=0.1", metrics=["loss", "accuracy"])


FIXED = ["privacy.epsilon=null", "privacy.noise_multiplier=1.0"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy=none"], r"policy\.noise: the server proposes noise = none; allowed are secure"),
        (["privacy.noise=reproducible"], r"policy\.noise: .* reproducible"),
        ([FIXED[0], "privacy.noise_multiplier=0.3"], r"policy\.min_noise_multiplier: .* 0\.3; the minimum is 0\.7"),
        (["privacy.clip_norm=1.0e+9"], r"policy\.max_clip_norm: .* 1e\+09; the limit is 2"),
        (["federation.batch_size=1000"], r"policy\.max_sampling_rate: .* 1; the limit is 0\.2"),
        (["federation.rounds=201"], r"policy\.max_steps: .* 1005 steps; the limit is 1000"),
        ([*FIXED, "federation.rounds=100"], r"policy\.max_epsilon: .* 500 steps that cost ε = .* the limit is 3\.1"),
        # A loose δ would make the same noise look cheap.
        (["privacy.delta=9.0e-4"], r"policy\.max_epsilon: .* at δ = 1e-05"),
        (["task.text=[sentence, notes]"], r"policy\.tasks: .* task\.text = \['sentence', 'notes'\]; .*\['sentence'\]"),
        # Columns that the entry leaves out are the defaults, not any.
        (["task.label=diagnosis"], r"policy\.tasks: .* task\.label = 'diagnosis'; .*'label'"),
        (["task.type=language-modelling"], r"policy\.tasks: .* task\.type = 'language-modelling'"),
        (["federation.private_test=0.1"], r"policy\.metrics: .* \['loss', 'accuracy'\]; allowed are \[\]"),
        (["privacy.unit=group", "privacy.group=who"], r"policy\.unit: .* 'group' .* 'who'"),
        (["privacy=none", "privacy.unit=group", "privacy.group=who"], r"policy\.unit: .* 'group' .* 'who'"),
    ],
)
def test_what_goes_beyond_the_policy_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        review(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy.epsilon=40"], r"policy\.max_epsilon: .* ε = 40 at δ = 1e-05; the limit is 3\.1 at δ = 1e-05"),
        (["privacy.epsilon=100", "privacy.delta=9.0e-4"], r"policy\.max_epsilon: .* ε = 100 at δ = 0\.0009"),
        # At a smaller δ than the owner's, its ε is no word on ours; the noise that it takes is.
        (["privacy.epsilon=100", "privacy.delta=1.0e-6"], r"policy\.min_noise_multiplier: .* the minimum is 0\.7"),
        (["privacy.epsilon=40", "federation.batch_size=1000"], r"policy\.max_sampling_rate: .* 1; the limit is 0\.2"),
        (["privacy.epsilon=40", "federation.rounds=1000"], r"policy\.max_steps: .* 5000 steps; the limit is 1000"),
        (["privacy.epsilon=40", "privacy.clip_norm=3"], r"policy\.max_clip_norm: .* 3; the limit is 2"),
        (["privacy.epsilon=40", "privacy.noise=reproducible"], r"policy\.noise: .* reproducible"),
        ([FIXED[0], "privacy.noise_multiplier=0.3"], r"policy\.min_noise_multiplier: .* 0\.3; the minimum is 0\.7"),
        (["privacy=none"], r"policy\.noise: .* none"),
    ],
)
def test_a_proposal_beyond_the_policy_is_refused_before_noise_is_calibrated(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    """A calibration keeps a node busy for seconds, which a server could ask for again and again."""
    monkeypatch.setattr(accounting, "from_gaussian_mechanism", _never)
    config = load(PROPOSAL, overrides)
    with pytest.raises(Refused, match=message):
        Policy(**OWNER).review_proposal(config, 1000, config.federation.rounds * config.federation.local_steps)


def test_a_proposal_within_the_policy_passes() -> None:
    for overrides in ([], FIXED, ["privacy.delta=1.0e-6"]):
        Policy(**OWNER).review_proposal(load(PROPOSAL, overrides), 1000, 100)
    lax = Policy(**OWNER | {"noise": ["none"]})
    lax.review_proposal(load(PROPOSAL, ["privacy=none"]), 1000, 100)


def test_an_owners_delta_that_means_nothing_is_the_owners_error() -> None:
    with pytest.raises(UserError, match=r"policy\.delta = 0\.001: not below 1/1000.*Choose at most 1e-04"):
        Policy(**OWNER | {"delta": 1e-3}).review_proposal(load(PROPOSAL), 1000, 100)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("a loss distribution was computed")


def test_another_model_is_refused() -> None:
    with pytest.raises(Refused, match=rf"policy\.base_models: .*{OTHER_BASE}; allowed are {BASE}"):
        review(base=OTHER_BASE)
    with pytest.raises(Refused, match="allowed are none"):
        review(base_models=[])


def test_of_several_tasks_the_nearest_is_named() -> None:
    tasks = [{"type": "image-classification"}, {"type": "text-classification", "text": "sentence", "max_length": 64}]
    with pytest.raises(Refused, match=r"task\.max_length = 128; the nearest entry has 64"):
        review(tasks=tasks)
    review("task.max_length=64", tasks=tasks)


def test_groups_are_held_to_their_column_and_size() -> None:
    groups = {"unit": "group", "group": "who", "max_group_records": 4}
    asked = ["privacy.unit=group", "privacy.group=who", "privacy.group_records=4"]
    review(*asked, **groups)
    with pytest.raises(Refused, match=r"policy\.max_group_records: .* 5; the limit is 4"):
        review(*asked[:2], "privacy.group_records=5", **groups)
    with pytest.raises(Refused, match=r"policy\.unit"):
        review(asked[0], "privacy.group=town", **groups)
    with pytest.raises(Refused, match=r"policy\.unit"):
        review(**groups)


def test_kinds_of_noise_that_are_listed_pass() -> None:
    review("privacy.noise=reproducible", noise=["secure", "reproducible"])
    review("privacy=none", noise=["none"])
    # Research noise is held to the limits of the run that it stands for.
    with pytest.raises(Refused, match=r"policy\.max_epsilon"):
        review("privacy.noise=reproducible", "privacy.epsilon=5", noise=["secure", "reproducible"])


SHARING = [
    "privacy.noise_against=sums",
    "federation.secure_sum=true",
    "federation.min_clients=5",
    "federation.local_steps=1",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.5",
]
MEMBERS = {client: f"ed25519:{client:064x}" for client in range(6)}


def review_sharing(colluding: int = 1, **changes: Any) -> None:
    config = load(PROPOSAL, [*SHARING, f"privacy.colluding={colluding}"])
    Policy(**OWNER | {"members": MEMBERS, "noise_against": "sums"} | changes).review(
        config, plan_run(config, 0, 1000), BASE
    )


def test_noise_is_shared_only_if_the_owner_says_so_and_knows_the_members() -> None:
    review_sharing()
    with pytest.raises(Refused, match=r"policy\.noise_against: .* 'sums'; only 'replies' is allowed"):
        review_sharing(noise_against="replies")
    with pytest.raises(UserError, match=r"policy\.noise_against.*members"):
        load_policy_of({"noise_against": "sums"})
    with pytest.raises(Refused, match=r"policy\.min_colluding: .* privacy\.colluding = 0; the minimum is 1"):
        review_sharing(colluding=0)
    review_sharing(colluding=0, min_colluding=0)


def test_the_epsilon_of_the_own_noise_has_its_own_limit() -> None:
    """σ = 1.5 in the sum is 0.75 alone: max_epsilon allows the first, and a second limit may refuse the second."""
    plan = plan_run(load(PROPOSAL, SHARING), 0, 1000)
    together = reference_epsilon([Steps(0.1, 1.5, 20)], OWNER["delta"])
    alone = reference_epsilon([Steps(0.1, 0.75, 20)], OWNER["delta"])
    assert together < OWNER["max_epsilon"] < alone
    review_sharing(max_epsilon_own_noise=alone * 1.01)
    with pytest.raises(Refused, match=r"policy\.max_epsilon_own_noise: .* 20 steps"):
        review_sharing(max_epsilon_own_noise=alone * 0.99)
    # Over all releases: an earlier run with shared noise counts with each of its two noise multipliers.
    earlier = release(noise_multiplier=1.5, own_noise_multiplier=0.75)
    both = reference_epsilon([Steps(0.1, 0.75, 40)], OWNER["delta"])
    for limit, allowed in ((both * 1.01, True), (both * 0.99, False)):
        policy = Policy(**OWNER | {"members": MEMBERS, "noise_against": "sums", "max_epsilon_own_noise": limit})
        if allowed:
            policy.review_release([earlier], RECORD, plan, 20)
            continue
        with pytest.raises(Refused, match=r"policy\.max_epsilon_own_noise: .* total cost"):
            policy.review_release([earlier], RECORD, plan, 20)


def load_policy_of(changes: dict[str, Any]) -> Policy:
    from lorica.config import validate

    return validate(Policy, OWNER | changes, prefix="policy")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sigma", "rounds"), [(0.9, 20), (1.5, 100), (3.0, 200)])
def test_the_limit_lies_at_the_epsilon_of_a_second_accountant(sigma: float, rounds: int) -> None:
    config, plan = proposal("privacy.epsilon=null", f"privacy.noise_multiplier={sigma}", f"federation.rounds={rounds}")
    accountant = PRVAccountant()
    accountant.history = [(sigma, 0.1, 5 * rounds)]
    cost = accountant.get_epsilon(1e-5, eps_error=0.005)
    assert cost < epsilon_rdp([Steps(0.1, sigma, 5 * rounds)], 1e-5)
    Policy(**OWNER | {"max_epsilon": cost * 1.01}).review(config, plan, BASE)
    with pytest.raises(Refused, match=r"policy\.max_epsilon"):
        Policy(**OWNER | {"max_epsilon": cost * 0.99}).review(config, plan, BASE)


def release(**changes: Any) -> Release:
    content = {"dataset": "data", "records": "own", "run": "one", "client": 0, "round": 1, "request": "digest"}
    terms = {"sampling_rate": 0.1, "noise_multiplier": 1.0, "clip_norm": 2.0, "steps": 20, "noise": "secure"}
    return Release(**content | terms | changes)


def reference_epsilon(steps: list[Steps], delta: float) -> float:
    """dp-accounting's own accountant on its own grid, without a line of Lorica's."""
    accountant = pld.PLDAccountant(value_discretization_interval=5e-4)
    counts: Counter[tuple[float, float]] = Counter()
    for step in steps:
        counts[step.sampling_rate, step.noise_multiplier] += step.count
    for (rate, sigma), count in counts.items():
        if count:
            accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), count)
    return float(accountant.get_epsilon(delta))


ROWS = st.builds(
    release,
    run=st.sampled_from(["one", "two"]),
    client=st.integers(0, 2),
    records=st.sampled_from(["own", "other"]),
    dataset=st.sampled_from(["data", "more data"]),
    sampling_rate=st.sampled_from([0.05, 0.2]),
    noise_multiplier=st.sampled_from([0.9, 2.5]),
    steps=st.integers(0, 40),
)


# Each takes half a second.
@settings(max_examples=settings().max_examples // 4)
@given(
    rows=st.lists(ROWS, max_size=4),
    limit=st.floats(0.2, 12),
    rate=st.sampled_from([0.05, 0.1]),
    sigma=st.sampled_from([0.8, 1.7]),
    steps=st.integers(1, 60),
)
def test_what_passes_never_exceeds_the_limit(
    rows: list[Release], limit: float, rate: float, sigma: float, steps: int
) -> None:
    """Whichever run, client, owner or data set the rows name: a server chooses those."""
    privacy = PrivacyConfig(epsilon=None, noise_multiplier=sigma)
    plan = plan_client(0, 1000, round(1000 * rate), steps, privacy)
    whole = reference_epsilon([*(row.cost for row in rows), Steps(rate, sigma, steps)], 1e-5)
    try:
        Policy(**OWNER | {"max_epsilon": limit}).review_release(rows, RECORD, plan, steps)
    except Refused:
        assert whole > limit * 0.99
    else:
        assert whole <= limit * 1.001


def test_a_refused_release_names_what_would_be_spent() -> None:
    _, plan = proposal(*FIXED)
    spent = reference_epsilon([Steps(0.1, 1.0, 60)], 1e-5)
    policy = Policy(**OWNER | {"max_epsilon": spent * 0.98})
    policy.review_release([release(), release(round=2)], RECORD, plan, 10)
    with pytest.raises(Refused, match=rf"policy\.max_epsilon: .* 20 steps .* ε = {spent:.2f}.* the limit is"):
        policy.review_release([release(), release(round=2)], RECORD, plan, 20)


@pytest.mark.parametrize("noise", ["reproducible", "none"])
def test_after_a_release_without_secret_noise_nothing_more_leaves(noise: str) -> None:
    """Unless the owner lists it; secure releases are then still held to ε."""
    _, plan = proposal(*FIXED)
    bare = release(noise=noise, run="earlier", noise_multiplier=0.0 if noise == "none" else 1.0, steps=10_000)
    with pytest.raises(Refused, match=rf"policy\.noise: the ledger holds releases with noise = {noise}"):
        Policy(**OWNER).review_release([bare], RECORD, plan, 1)
    knowing = Policy(**OWNER | {"noise": ["secure", noise]})
    knowing.review_release([bare], RECORD, plan, 1)
    with pytest.raises(Refused, match=r"policy\.max_epsilon"):
        knowing.review_release([bare, release(steps=1000)], RECORD, plan, 1)


@pytest.mark.parametrize("units", [(RECORD, PrivacyUnit("who", 4)), (PrivacyUnit("who", 4), RECORD)])
def test_units_do_not_mix(units: tuple[PrivacyUnit, PrivacyUnit]) -> None:
    _, plan = proposal()
    with pytest.raises(Refused, match=r"policy\.unit"):
        Policy(**OWNER).review_release([release(unit=units[0], steps=1)], units[1], plan, 1)
    Policy(**OWNER).review_release([release(unit=units[0], steps=1)], units[0], plan, 1)


@pytest.mark.parametrize("overrides", ["privacy=none", "privacy.noise=reproducible"])
def test_each_release_is_asked_for_its_noise(overrides: str) -> None:
    """Not only the run: a node may have been started anew in between."""
    _, plan = proposal(overrides)
    with pytest.raises(Refused, match=r"policy\.noise: the server proposes noise = "):
        Policy(**OWNER).review_release([], RECORD, plan, 1)


def test_a_noiseless_row_that_calls_itself_secure_costs_everything() -> None:
    _, plan = proposal()
    with pytest.raises(Refused, match=r"ε = inf"):
        Policy(**OWNER).review_release([release(noise_multiplier=0.0)], RECORD, plan, 1)


def test_a_policy_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(OWNER | {"records": 5000}))
    policy = load_policy(path)
    assert policy.records == 5000
    assert policy.noise == ["secure"]
    assert policy.metrics == []
    assert math.isclose(policy.delta, 1e-5)
    assert policy == Policy(**OWNER, records=5000)


@pytest.mark.parametrize("key", ["max_epsilon", "delta", "tasks", "base_models"])
def test_what_an_owner_must_decide_has_no_default(key: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in OWNER.items() if name != key}))
    with pytest.raises(UserError, match=rf"policy\.{key} = None: this key is required"):
        load_policy(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_epsilonn": 3}, r"policy\.max_epsilonn = 3: unknown key\. Did you mean 'max_epsilon'\?"),
        ({"max_epsilon": -1}, r"policy\.max_epsilon = -1"),
        ({"max_epsilon": math.inf}, r"policy\.max_epsilon = inf"),
        ({"max_clip_norm": math.nan}, r"policy\.max_clip_norm = nan"),
        ({"max_sampling_rate": 1.5}, r"policy\.max_sampling_rate = 1\.5"),
        ({"base_models": ["bert-base"]}, r"policy\.base_models .*sha256"),
        ({"tasks": []}, r"policy\.tasks = \[\]"),
        ({"tasks": [{"text": "sentence"}]}, r"policy\.tasks\.type = None: this key is required"),
        ({"tasks": [{"type": "text-classification", "labl": "x"}]}, r"policy\.tasks\.labl .*Did you mean 'label'\?"),
        ({"noise": ["soft"]}, r"policy\.noise"),
        ({"unit": "group"}, r"policy.* set unit: group and group: COLUMN together"),
        ({"group": "who"}, r"policy.* set unit: group and group: COLUMN together"),
    ],
)
def test_mistakes_in_a_policy_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(OWNER | change))
    with pytest.raises(UserError, match=message):
        load_policy(path)


def test_the_documented_policy_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
    content = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, flags=re.S)[0])
    policy = Policy(**content)
    assert policy.base_models == [hash_of_base("lorica:glyph-vit")]
    assert policy.records == 5000


def test_a_policy_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy = .*absent\.yaml.*no such file"):
        load_policy(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"policy = .*not a mapping"):
        load_policy(tmp_path / "list.yaml")
