"""What a server is told when a node cannot answer. Any other word of an error may quote what is private."""

from __future__ import annotations

from lorica.errors import UserError

ERROR = "an error at the node; its log has it"


def because_of(error: UserError) -> str:
    """Names the setting, and nothing of its value."""
    return f"the node cannot take part because of its {error.key}; its log has the rest"
