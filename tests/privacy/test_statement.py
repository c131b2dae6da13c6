"""What privacy.json says of a run."""

from __future__ import annotations

import pytest

from lorica.config import PrivacyConfig
from lorica.privacy.plan import plan_client
from lorica.privacy.statement import Account, privacy_statement
from lorica.privacy.unit import PrivacyUnit


@pytest.mark.parametrize(("delta", "void"), [(0.01, True), (0.0099, False)])
def test_a_delta_that_means_nothing_is_said_of_research_noise(delta: float, void: bool) -> None:
    privacy = PrivacyConfig(epsilon=None, noise_multiplier=1.0, delta=delta, noise="reproducible")
    statement = privacy_statement({0: plan_client(0, 100, 10, 5, privacy)}, {0: Account(5, 1)}, None)
    found = [
        line for line in statement["not_covered"] if line.startswith("A δ of at least one over the number of records")
    ]
    assert len(found) == void
    assert all("(clients 0)" in line for line in found)


def test_the_relation_and_what_is_public_are_stated() -> None:
    plan = plan_client(0, 1000, 10, 5, PrivacyConfig(epsilon=None, noise_multiplier=1.0))
    statement = privacy_statement({0: plan}, {0: Account(5, 1)}, None)
    expected = "zero-out: one record contributes zero to every batch; the number of records is public"
    assert statement["relation"] == expected
    assert any("partition of a simulation is fixed" in line for line in statement["assumptions"])
    assert any("held out" in line and "own content and the public seed" in line for line in statement["assumptions"])
    groups = privacy_statement({0: plan}, {0: Account(5, 1)}, None, PrivacyUnit("who", 3))
    assert groups["relation"] == (
        "zero-out: all records of one group contribute zero to every batch; the number of groups is public"
    )
