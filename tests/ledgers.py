"""Rows for ledgers of tests."""

from __future__ import annotations

from collections.abc import Mapping

from lorica.privacy.ledger import Ledger, Release
from lorica.privacy.released import Released


def write(
    ledger: Ledger, release: Release, reply: bytes = b"reply", kept: Mapping[str, Released] | None = None
) -> None:
    """Charge a release and store its reply, as a client does."""
    ledger.attach(ledger.charge(release), reply, kept)
