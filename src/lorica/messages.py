"""The only things that travel between the server and an owner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import safetensors.torch
from torch import Tensor

from lorica.config import OptimizerConfig
from lorica.privacy.mechanism import Terms
from lorica.privacy.released import Released


@dataclass(frozen=True)
class Request:
    """Server to client: train these tensors for `steps` steps on these terms.

    Attributes:
        run: identity of the run.
        round, exchange: which round, and which exchange within it, from 1.
        trained: names of the tensors to train.
        tensors: every global tensor that changed since this client last took part.
        terms: the DP terms that the server proposes; the client checks them.
        rates: name -> learning rate of each trained tensor.
        last_step_energy: also reply with `‖ĝ‖²` of each trained tensor's last noisy gradient, named `energy:NAME`.
    """

    run: str
    client: int
    round: int
    exchange: int
    trained: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    terms: Terms
    steps: int
    optimizer: OptimizerConfig
    rates: Mapping[str, float]
    last_step_energy: bool = False

    def digest(self, adapter: Mapping[str, Tensor]) -> str:
        """SHA-256 of what the request asks for and of the adapter that it starts from.

        Equal digests mean that the same release answers both requests.

        Args:
            adapter: all global tensors as the client holds them once it has taken `tensors` in.
        """
        content = {
            "run": self.run,
            "client": self.client,
            "round": self.round,
            "exchange": self.exchange,
            "trained": self.trained,
            "terms": asdict(self.terms),
            "steps": self.steps,
            "optimizer": self.optimizer.model_dump(),
            "rates": dict(self.rates),
            "last_step_energy": self.last_step_energy,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        digest.update(encode(dict(sorted(adapter.items()))))
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Size of the tensors on the wire."""
        return size(self.tensors)


@dataclass(frozen=True)
class Reply:
    """Client to server: released tensors and nothing else.

    Raises:
        TypeError: a tensor that went through no mechanism.
    """

    client: int
    tensors: Mapping[str, Released]

    def __post_init__(self) -> None:
        for name, value in self.tensors.items():
            if not isinstance(value, Released):
                raise TypeError(f"a reply takes released tensors only; {name} is a {type(value).__name__}")

    def encode(self) -> bytes:
        """The reply as safetensors bytes: what travels, and what the ledger keeps."""
        return encode({name: released.tensor for name, released in self.tensors.items()})


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes."""
    content: bytes = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    return content


def decode(content: bytes) -> dict[str, Tensor]:
    """The inverse of `encode`."""
    tensors: dict[str, Tensor] = safetensors.torch.load(content)
    return tensors


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors on the wire."""
    return sum(tensor.nbytes for tensor in tensors.values())
