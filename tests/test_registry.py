"""Names that a package registers, and those that changed."""

from __future__ import annotations

import pytest

from lorica.config import load
from lorica.methods.base import find_method, registry
from lorica.registry import FORMER_METHOD_NAMES, current_method_name
from lorica.run.variants import parse_variant


@pytest.mark.parametrize("former", FORMER_METHOD_NAMES)
def test_a_former_name_is_the_renamed_method_and_warns(former: str, caplog: pytest.LogCaptureFixture) -> None:
    current_method_name.cache_clear()
    renamed = FORMER_METHOD_NAMES[former]
    config = load(None, [f"method.name={former}"])
    assert config.method.name == renamed
    assert find_method(config.method)[0] is registry()[renamed]
    assert [repr(former) in message and repr(renamed) in message for message in caplog.messages] == [True]
    assert parse_variant(former, config).config == config
    assert former not in registry()
