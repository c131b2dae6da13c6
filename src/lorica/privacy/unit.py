"""The unit of privacy: a record, a group or a client, which is sampled, clipped and protected as a whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorica.config import PrivacyConfig

_GROUP = re.compile(r"group (.*), at most (\d+) records", re.DOTALL)


@dataclass(frozen=True)
class PrivacyUnit:
    """A record, all records of a group (a patient, a user), or everything of a client.

    `str` gives the text in the ledger and in `privacy.json`: `record`, `group COLUMN, at most N records`, or `client`.
    Releases with different units do not compose.

    Attributes:
        column: the column with the group of each record; None for single records and clients.
        group_records: maximum number of records used per group.
        whole_client: the unit is a client.
    """

    column: str | None = None
    group_records: int = 1
    whole_client: bool = False

    @classmethod
    def of(cls, privacy: PrivacyConfig) -> PrivacyUnit:
        """The unit of a configuration."""
        if privacy.unit == "client":
            return CLIENT
        return cls() if privacy.group is None else cls(privacy.group, privacy.group_records)

    @classmethod
    def parse(cls, text: str) -> PrivacyUnit:
        """The inverse of `str`.

        Raises:
            ValueError: not a unit of privacy in this version.

        >>> PrivacyUnit.parse("group patient, at most 8 records")
        PrivacyUnit(column='patient', group_records=8, whole_client=False)
        """
        if text in ("record", "client"):
            return cls(whole_client=text == "client")
        found = _GROUP.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a unit of privacy")
        return cls(found[1], int(found[2]))

    def __str__(self) -> str:
        return self.noun if self.column is None else f"group {self.column}, at most {self.group_records} records"

    @property
    def noun(self) -> str:
        """`record`, `group` or `client`, for sentences."""
        if self.whole_client:
            return "client"
        return "record" if self.column is None else "group"

    @property
    def level(self) -> str:
        """`Record-level`, `Group-level` or `Client-level`, as in "Record-level DP"."""
        return f"{self.noun.capitalize()}-level"


RECORD = PrivacyUnit()
CLIENT = PrivacyUnit(whole_client=True)
