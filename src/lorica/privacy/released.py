"""The type of a tensor that may leave its owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

_KEY = object()


@final
class Released:
    """A tensor that went through a mechanism, or a function of such tensors and public values.

    Only `lorica.privacy` makes one (`_release`); `post_process` makes new ones from old ones. A reply takes nothing
    else, so a raw loss, gradient or count has no way to the server.

    Raises:
        TypeError: constructed without this module's key.
    """

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor, key: object) -> None:
        if key is not _KEY:
            raise TypeError("only lorica.privacy releases tensors; use post_process on released ones")
        self._tensor = tensor.detach()

    @property
    def tensor(self) -> Tensor:
        """The released value."""
        return self._tensor


def _release(tensor: Tensor) -> Released:
    """Mark the output of a mechanism as released. For mechanisms in `lorica.privacy` only."""
    return Released(tensor, _KEY)


def post_process(function: Callable[..., Tensor], *inputs: Released) -> Released:
    """`function` of released tensors, which is released again: differential privacy is closed under post-processing.

    `function` must close over public values only. Dwork and Roth, The Algorithmic Foundations of Differential Privacy,
    Proposition 2.1.
    """
    return Released(function(*(released.tensor for released in inputs)), _KEY)
