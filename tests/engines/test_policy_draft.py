"""The policy that `lorica flower init` drafts allows its experiment, and a node's settings are checked at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr")

from lorica.adapters.base_files import hash_of_base
from lorica.config import ExperimentConfig, load
from lorica.engines.flower.launch import write_app
from lorica.engines.flower.policy_draft import draft_policy
from lorica.engines.flower.sealed import check_settings
from lorica.errors import UserError
from lorica.owner.identity import make_identity
from lorica.privacy.plan import Refused, plan_client
from lorica.privacy.policy import Policy, load_policy

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.yaml"))


def drafted(config: ExperimentConfig, folder: Path) -> Policy:
    path = folder / "policy.yaml"
    path.write_text(draft_policy(config), encoding="utf-8")
    return load_policy(path)


@pytest.mark.parametrize("example", [None, *EXAMPLES], ids=lambda path: path.stem if path else "default")
def test_the_draft_of_every_shipped_experiment_loads_and_allows_what_it_learns(
    example: Path | None, tmp_path: Path
) -> None:
    config = load(example)
    if config.privacy.unit == "client":
        with pytest.raises(UserError, match=r"privacy\.unit = 'client': nodes do not trust the server"):
            write_app(config, tmp_path / "app")
        return
    policy = drafted(config, tmp_path)
    embedded = config.model.base.startswith("lorica:")
    base = hash_of_base(config.model.base) if embedded else "sha256:" + "0" * 64
    assert policy.base_models == ([base] if embedded else [])
    policy.model_copy(update={"base_models": [base]}).review_task(config, base)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["task.labels=['no', 'yes', 'null', '1.5', ': #']", "task.label='no'", "name='no'"],
        ["privacy.unit=group", "privacy.group='patient: id'", "privacy.group_records=3"],
        ["privacy.noise=reproducible"],
        ["privacy=none", "federation.weights=uniform"],
        ["federation.private_test=0.1"],
        ["federation.secure_sum=true"],
        ["privacy.epsilon=null", "privacy.noise_multiplier=0.3", "privacy.clip_norm=7"],
    ],
)
def test_an_owner_can_take_part_under_the_draft(overrides: list[str], tmp_path: Path) -> None:
    config = load(overrides=["privacy.epsilon=null", "privacy.noise_multiplier=1.0", *overrides])
    if config.privacy.noise_multiplier == 1.0:
        config = config.model_copy(
            update={"privacy": config.privacy.model_copy(update={"epsilon": 3.0, "noise_multiplier": None})}
        )
    policy, plan = drafted(config, tmp_path), plan_client(0, 1000, 64, 60, config.privacy)
    if plan.epsilon() > policy.max_epsilon:
        policy = policy.model_copy(update={"max_epsilon": 100.0})
    policy.review(config, plan, hash_of_base(config.model.base))
    with pytest.raises(Refused, match=r"policy\.tasks"):
        policy.review(load(overrides=[*overrides, "task.image=other"]), plan, hash_of_base(config.model.base))


def test_shared_noise_is_offered_but_needs_the_members(tmp_path: Path) -> None:
    sharing = ["privacy.noise_against=sums", "federation.min_clients=5", "federation.local_steps=1"]
    config = load(overrides=["federation.secure_sum=true", *sharing])
    text = draft_policy(config)
    assert drafted(config, tmp_path).noise_against == "replies"
    keys = {client: f"ed25519:{client:064x}" for client in range(6)}
    opened = text.replace("# noise_against", "noise_against").replace("# min_colluding", "min_colluding")
    policy = Policy(**yaml.safe_load(opened) | {"members": keys})
    assert (policy.noise_against, policy.min_colluding, policy.sums_only) == ("sums", 1, True)


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """Settings that a node starts with."""
    (tmp_path / "data.csv").write_text("text,label\na,b\n")
    (tmp_path / "policy.yaml").write_text(draft_policy(load()))
    make_identity(tmp_path, "owner")
    paths = {"data": "data.csv", "policy": "policy.yaml", "identity": "identity.key"}
    return {key: str(tmp_path / name) for key, name in paths.items()} | {"base": "lorica:glyph-vit"}


def written(settings: dict[str, Any]) -> str:
    return " ".join(["client=0", *(f'{key}="{value}"' for key, value in settings.items())])


@pytest.mark.parametrize("together", [True, False])
def test_good_settings_pass(node: dict[str, str], together: bool) -> None:
    text = written(node)
    check_settings([f"--node-config={text}"] if together else ["--superlink", "x:1", "--node-config", text])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "missing.csv"}, r"node-config\.data = 'missing\.csv': no such file"),
        ({"policy": "missing.yaml"}, r"policy = 'missing\.yaml': no such file"),
        ({"policy": None}, r"node-config\.policy = None: required with data"),
        ({"base": "/no/such/model"}, r"model\.base"),
        ({"identity": "missing.key"}, "missing.key"),
        ({"colour": "red"}, r"node-config\.colour.*unknown key"),
        ({"data": None, "policy": None}, r"node-config\.data = None: required"),
    ],
)
def test_a_mistake_is_the_owners_to_see_before_the_node_starts(
    changes: dict[str, str | None], message: str, node: dict[str, str]
) -> None:
    settings = {key: value for key, value in (node | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        check_settings(["--node-config", written(settings)])


def test_a_policy_that_does_not_load_or_does_not_allow_the_base_is_named(node: dict[str, str], tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy.read_text().replace("max_epsilon: 3.0", "max_epsilon: 3.0\nmax_epsilon: 300.0"))
    with pytest.raises(UserError, match=r"policy = .*'max_epsilon' is also in line"):
        check_settings(["--node-config", written(node)])
    content = yaml.safe_load(draft_policy(load())) | {"base_models": ["sha256:" + "0" * 64]}
    policy.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"node-config\.base = .*the policy does not allow this model.*sha256:"):
        check_settings(["--node-config", written(node)])


@pytest.mark.parametrize("arguments", [[], ["--node-config", 'client=0 data="open'], ["--node-config", "client=a=b"]])
def test_settings_that_cannot_be_read_are_one_error(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="node-config"):
        check_settings(arguments)
