"""Refusals that are safe to send to the server. Other error messages may quote private data and stay in the log."""

from __future__ import annotations

from lorica.errors import UserError

ERROR = "an error occurred at the node; see its log"


def because_of(error: UserError) -> str:
    """A refusal that names the key but not its value."""
    return f"the node cannot take part because of its {error.key}; see its log"
