"""What does not go with secure sums, and who drops out of one. `check_sums` compares them with single replies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorica
from lorica.config import load
from lorica.errors import UserError
from lorica.methods.base import make_method
from lorica.methods.components import check_components
from lorica.secure_sum.setup import SummationError
from lorica.testing.federation import tiny_federation
from tests.methods.conftest import METHODS, REGISTRY

SUMS = ["federation.secure_sum=true", "federation.clients=4", "privacy.noise=reproducible"]


@pytest.mark.parametrize("name", [name for name in METHODS if "secure_sum" in REGISTRY[name].refuses])
def test_methods_that_combine_single_replies_refuse_sums(name: str) -> None:
    config = load(overrides=[*SUMS, f"method.name={name}"])
    method = REGISTRY[name](REGISTRY[name].Options(), [])
    with pytest.raises(UserError, match=r"federation\.secure_sum"):
        check_components(config, method)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("server.aggregate=median", r"server\.aggregate"),
        ("local.scaffold=true", r"local\.scaffold"),
        ("lora.client_ranks=halving", r"lora\.client_ranks"),
        ("privacy.clip_norm=null", r"privacy\.clip_norm"),
        ("federation.participation=0.5", r"federation\.participation"),
    ],
)
def test_components_that_look_at_single_replies_do_not_go_with_sums(override: str, key: str) -> None:
    noise = ["privacy=none"] if override == "privacy.clip_norm=null" else []
    config = load(overrides=[*SUMS, *noise, override])
    with pytest.raises(UserError, match=f"^{key}"):
        check_components(config, make_method(config.method, []))


@pytest.mark.parametrize(
    ("override", "key"),
    [("method.score=last-step-energy", r"federation\.secure_sum"), ("optimizer.name=adamw", r"optimizer\.name")],
)
def test_scores_of_single_replies_are_refused_before_the_run(override: str, key: str, tmp_path: Path) -> None:
    overrides = [*SUMS, override, f"output={tmp_path}", f"privacy.ledger={tmp_path / 'ledger'}", "name=x"]
    with pytest.raises(UserError, match=f"^{key}"):
        lorica.Experiment.load(overrides=overrides).run()
    assert not (tmp_path / "x").exists()


def test_a_client_that_drops_out_is_not_in_the_sum(tmp_path: Path) -> None:
    """Fed-avg with uniform weights: the mean of those that stayed."""

    def leave(*_: object) -> bytes:
        raise SummationError("out of order")

    whole = tiny_federation("fed-avg", tmp_path / "a", clients=4)
    some = tiny_federation("fed-avg", tmp_path / "b", clients=4, secure_sum=True)
    some.min_clients = 3
    start = dict(some.server.model.tensors)
    some.engine.clients[2].reply_to = leave  # type: ignore[attr-defined]
    whole.round()
    (replies,) = whole.engine.replies  # type: ignore[attr-defined]
    traffic = some.round()
    assert (traffic.participants, traffic.missing) == ([0, 1, 3], [2])
    for name, value in some.server.model.tensors.items():
        mean = sum(replies[number][name].double() for number in (0, 1, 3)) / 3
        assert torch.allclose(value.double(), start[name].double() + mean, atol=1e-5), name
