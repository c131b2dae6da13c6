"""The unit of privacy reads as it is written, whatever its column is called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.privacy.unit import CLIENT, RECORD, PrivacyUnit


@given(column=st.text(min_size=1), records=st.integers(1, 10**6))
def test_a_unit_is_read_back_from_its_words(column: str, records: int) -> None:
    unit = PrivacyUnit(column, records)
    assert PrivacyUnit.parse(str(unit)) == unit
    assert (unit.noun, unit.level) == ("group", "Group-level")


def test_the_record() -> None:
    assert PrivacyUnit.parse("record") == RECORD
    assert (str(RECORD), RECORD.level) == ("record", "Record-level")


def test_the_client() -> None:
    assert PrivacyUnit.parse("client") == CLIENT
    assert (str(CLIENT), CLIENT.noun, CLIENT.level) == ("client", "client", "Client-level")
    assert CLIENT != RECORD


def test_other_words_are_no_unit() -> None:
    with pytest.raises(ValueError, match="'patient' is not a unit of privacy"):
        PrivacyUnit.parse("patient")
