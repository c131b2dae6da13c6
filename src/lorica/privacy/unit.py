"""The unit of privacy: a record or a group, which is sampled, clipped and protected as a whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorica.config import PrivacyConfig

_GROUP = re.compile(r"group (.*), at most (\d+) records", re.DOTALL)


@dataclass(frozen=True)
class PrivacyUnit:
    """A record, or all records of a group (a patient, a user).

    `str` gives the text in the ledger and in `privacy.json`: `record`, or `group COLUMN, at most N records`.
    Releases with different units do not compose.

    Attributes:
        column: the column with the group of each record; None for single records.
        group_records: maximum number of records used per group.
    """

    column: str | None = None
    group_records: int = 1

    @classmethod
    def of(cls, privacy: PrivacyConfig) -> PrivacyUnit:
        """The unit of a configuration."""
        return cls() if privacy.group is None else cls(privacy.group, privacy.group_records)

    @classmethod
    def parse(cls, text: str) -> PrivacyUnit:
        """The inverse of `str`.

        Raises:
            ValueError: not a unit of privacy in this version.

        >>> PrivacyUnit.parse("group patient, at most 8 records")
        PrivacyUnit(column='patient', group_records=8)
        """
        if text == "record":
            return cls()
        found = _GROUP.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a unit of privacy")
        return cls(found[1], int(found[2]))

    def __str__(self) -> str:
        return "record" if self.column is None else f"group {self.column}, at most {self.group_records} records"

    @property
    def noun(self) -> str:
        """`record` or `group`, for sentences."""
        return "record" if self.column is None else "group"

    @property
    def level(self) -> str:
        """`Record-level` or `Group-level`, as in "Record-level DP"."""
        return f"{self.noun.capitalize()}-level"


RECORD = PrivacyUnit()
