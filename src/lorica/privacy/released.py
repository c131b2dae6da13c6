"""The type of a tensor that may leave its owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

_KEY = object()


@final
class Released:
    """The output of a privacy mechanism, or a function of such outputs and public values.

    Only `lorica.privacy` creates one (`_release`); `post_process` derives new ones. A reply accepts nothing else, so a
    raw loss, gradient or count cannot reach the server.

    Raises:
        TypeError: constructed without this module's key.
    """

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor, key: object) -> None:
        if key is not _KEY:
            raise TypeError("only lorica.privacy can release tensors; use post_process to transform released ones")
        self._tensor = tensor.detach()

    @property
    def tensor(self) -> Tensor:
        """The released value."""
        return self._tensor


def _release(tensor: Tensor) -> Released:
    """Mark the output of a mechanism as released. For mechanisms in `lorica.privacy` only."""
    return Released(tensor, _KEY)


def post_process(function: Callable[..., Tensor], *inputs: Released) -> Released:
    """Apply `function` to released tensors. The result is released: DP is closed under post-processing.

    `function` may close over public values only. Dwork and Roth, The Algorithmic Foundations of Differential Privacy,
    Proposition 2.1.
    """
    return Released(function(*(released.tensor for released in inputs)), _KEY)
