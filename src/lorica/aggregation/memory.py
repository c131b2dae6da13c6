"""What a piece of the server carries from round to round."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Memory:
    """Named tensors and JSON-able numbers, which a checkpoint keeps. A piece that forgets everything has none.

    Attributes:
        tensors, numbers: by a name of the piece's own, such as that of the tensor that they belong to.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able values and tensors, in nested dictionaries."""
        return {"numbers": dict(self.numbers), "tensors": dict(self.tensors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.numbers, self.tensors = dict(state["numbers"]), dict(state["tensors"])
