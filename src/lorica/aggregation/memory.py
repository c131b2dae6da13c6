"""State that a server-side component keeps between rounds."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Memory:
    """Named tensors and JSON-able numbers, saved in checkpoints. Both are empty in a stateless component.

    Attributes:
        tensors, numbers: by a name that the component chooses, such as the name of an adapter tensor.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able values and tensors, in nested dictionaries."""
        return {"numbers": dict(self.numbers), "tensors": dict(self.tensors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the output of `state_dict`."""
        self.numbers, self.tensors = dict(state["numbers"]), dict(state["tensors"])
