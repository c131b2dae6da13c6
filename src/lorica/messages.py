"""The only things that travel between the server and an owner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import safetensors.torch
from torch import Tensor

from lorica.adapters.state import Pair
from lorica.config import OptimizerConfig
from lorica.local.step import LocalStep
from lorica.privacy.mechanism import Terms
from lorica.privacy.released import Released

ENERGY = "energy:"
SKETCH = "sketch:"


@dataclass(frozen=True)
class Training:
    """Work: train these tensors for `steps` noisy steps on these terms, and reply with their updates.

    Attributes:
        trained: names of the tensors to train.
        terms: the DP terms that the server proposes; the client checks them.
        rates: name -> learning rate of each trained tensor.
        local: what happens to the noisy gradient before the optimiser.
        corrections: name -> what SCAFFOLD adds to the noisy gradient.
        rounds: of the whole run, which schedules of the local step refer to.
        rank: the client trains the leading ranks only; None for all.
        personal: trained tensors that stay with the client: it starts from its own and sends no update of them.
        sketch_columns: in place of the factors' updates, reply with `SITE -> B_k (A_k Ω)`, `(d_out, columns)`, named
            `sketch:SITE`, and keep the factors for a `Projection`.
        last_step_energy: also reply with `‖ĝ‖²` of each trained tensor's last noisy gradient, named `energy:NAME`.
    """

    trained: tuple[str, ...]
    terms: Terms
    steps: int
    optimizer: OptimizerConfig
    rates: Mapping[str, float]
    local: LocalStep = field(default_factory=LocalStep)
    corrections: Mapping[str, Tensor] = field(default_factory=dict)
    rounds: int = 1
    rank: int | None = None
    personal: tuple[str, ...] = ()
    sketch_columns: int | None = None
    last_step_energy: bool = False


@dataclass(frozen=True)
class Projection:
    """Work: reply with `Z_k = A_kᵀ (B_kᵀ Q)`, `(d_in, columns)`, of the factors kept in this round, named
    `sketch:SITE`.

    A function of what was charged before: no step, no cost.

    Attributes:
        bases: site name -> `Q (d_out, columns)`.
    """

    bases: Mapping[str, Tensor]


@dataclass(frozen=True)
class Request:
    """Server to client.

    Attributes:
        run: identity of the run.
        round, exchange: which round, and which exchange within it, from 1.
        tensors: every global tensor that changed since this client last took part.
        increments: site name -> `(B, A)`, ranks merged into the frozen weight since then.
        restart: `increments` holds all that was ever merged; what the client has is void.
        work: what to do.
    """

    run: str
    client: int
    round: int
    exchange: int
    tensors: Mapping[str, Tensor]
    work: Training | Projection
    increments: Mapping[str, Pair] = field(default_factory=dict)
    restart: bool = False

    def digest(self, adapter: Mapping[str, Tensor], merged: Mapping[str, Pair]) -> str:
        """SHA-256 of what the request asks for and of the adapter that it starts from.

        Equal digests mean that the same release answers both requests.

        Args:
            adapter: all global tensors as the client holds them once it has taken `tensors` in.
            merged: likewise, with `increments` taken in.
        """
        content: dict[str, object] = {
            "run": self.run,
            "client": self.client,
            "round": self.round,
            "exchange": self.exchange,
        }
        tensors = dict(adapter) | {f"{name}.{i}": part for name, pair in merged.items() for i, part in enumerate(pair)}
        if isinstance(self.work, Training):
            work = {key: value for key, value in vars(self.work).items() if key != "corrections"}
            work |= {"terms": asdict(self.work.terms), "local": asdict(self.work.local)}
            work |= {"optimizer": self.work.optimizer.model_dump(), "rates": dict(self.work.rates)}
            content["training"] = work
            tensors |= {f"correction:{name}": value for name, value in self.work.corrections.items()}
        else:
            content["projection"] = sorted(self.work.bases)
            tensors |= {f"basis:{name}": value for name, value in self.work.bases.items()}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        digest.update(encode(dict(sorted(tensors.items()))))
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Size of the tensors on the wire."""
        extra = self.work.corrections if isinstance(self.work, Training) else self.work.bases
        return size(self.tensors) + size(extra) + sum(part.nbytes for pair in self.increments.values() for part in pair)


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
