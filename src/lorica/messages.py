"""The only things that travel between the server and an owner."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import safetensors
import safetensors.torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from lorica.adapters.names import Pair, flat_pairs, pairs_under, under
from lorica.config import OptimizerConfig
from lorica.local.step import LocalStep
from lorica.privacy.mechanism import Terms
from lorica.privacy.plan import ClientPlan, Refused
from lorica.privacy.released import Released
from lorica.privacy.statement import Account

OWNER = "owner"
"""Stands for `task.train` in what a server sends: the data are with the owner, who names them."""
# A run's name is written into logs and files of the owner.
RUN = re.compile(r"[A-Za-z0-9._-]{1,100}")
_TENSORS = ConfigDict(arbitrary_types_allowed=True, extra="forbid")


@dataclass(frozen=True)
class Invitation:
    """What every message of a run carries.

    Attributes:
        run: identity of the run.
        experiment: the server's configuration as JSON.
        base: hash of the server's base model.
    """

    run: str
    experiment: str
    base: str

    def encode(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> Invitation:
        """The inverse of `encode`.

        Raises:
            Refused: not an invitation.
        """
        try:
            content = json.loads(text)
            invitation = cls(**content)
        except (ValueError, TypeError, RecursionError):
            invitation = None
        if invitation is None or not all(isinstance(value, str) for value in asdict(invitation).values()):
            raise Refused("the message holds no invitation that this version of Lorica understands")
        if not RUN.fullmatch(invitation.run):
            raise Refused("the run's name is not made of at most 100 letters, digits and -, _ or .")
        return invitation


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

    __pydantic_config__: ClassVar = _TENSORS

    def plain(self) -> dict[str, Any]:
        """All but the tensors, as JSON-able values."""
        plain = {key: value for key, value in vars(self).items() if key != "corrections"}
        plain |= {"terms": asdict(self.terms), "local": asdict(self.local), "rates": dict(self.rates)}
        return plain | {"optimizer": self.optimizer.model_dump()}


@dataclass(frozen=True)
class Projection:
    """Work: reply with `Z_k = A_kᵀ (B_kᵀ Q)`, `(d_in, columns)`, of the factors kept in this round, named
    `sketch:SITE`.

    A function of what was charged before: no step, no cost.

    Attributes:
        bases: site name -> `Q (d_out, columns)`.
    """

    bases: Mapping[str, Tensor]

    __pydantic_config__: ClassVar = _TENSORS


@dataclass(frozen=True)
class Delivery:
    """Work: take this model; nothing comes back. The client tests it on private records of its own, if it holds any.

    Attributes:
        model: every tensor of the adapter, after averaging over rounds where that is done.
        merged: site name -> `(B, A)`, all that is merged into the frozen weight.
        final: it is the run's result.
        personal: what the client keeps of its own takes the place of the model's tensors (`Method.personal`).
    """

    model: Mapping[str, Tensor]
    merged: Mapping[str, Pair]
    final: bool
    personal: bool = False

    __pydantic_config__: ClassVar = _TENSORS


@dataclass(frozen=True)
class Request:
    """Server to client.

    Attributes:
        run: identity of the run.
        round, exchange: which round, and which exchange within it, from 1.
        tensors: every global tensor that changed since this client last took part.
        increments: site name -> `(B, A)`, ranks merged into the frozen weight since then.
        restart: `increments` holds all that was ever merged; what the client has is void.
        sequence: 0 if the request brings all tensors and all increments; otherwise it builds on the one before.
        work: what to do.
    """

    run: str
    client: int
    round: int
    exchange: int
    tensors: Mapping[str, Tensor]
    work: Training | Projection | Delivery
    increments: Mapping[str, Pair] = field(default_factory=dict)
    restart: bool = False
    sequence: int = 0

    __pydantic_config__: ClassVar = _TENSORS

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
            content["training"] = self.work.plain()
            tensors |= {f"correction:{name}": value for name, value in self.work.corrections.items()}
        elif isinstance(self.work, Projection):
            content["projection"] = sorted(self.work.bases)
            tensors |= {f"basis:{name}": value for name, value in self.work.bases.items()}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        digest.update(encode(dict(sorted(tensors.items()))))
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Size of the tensors on the wire."""
        return size(self._tensors())

    def encode(self) -> bytes:
        """One safetensors blob: all tensors, and the rest as JSON in its metadata."""
        tensors = {name: value.contiguous().cpu() for name, value in self._tensors().items()}
        content: bytes = safetensors.torch.save(tensors, metadata={"request": json.dumps(self._plain())})
        return content

    @classmethod
    def decode(cls, content: bytes) -> Request:
        """The inverse of `encode`.

        Raises:
            ValueError: not a request. What the server wrote may be quoted in the message: it holds nothing private.
        """
        try:
            plain = json.loads(_metadata(content)["request"])
            tensors = decode(content)
            asked = dict(plain["work"])
            kind = asked.pop("kind")
            work: Training | Projection | Delivery
            if kind == "training":
                work = _STRICT[Training].validate_python(asked | {"corrections": under("correction:", tensors)})
            elif kind == "projection":
                work = _STRICT[Projection].validate_python(asked | {"bases": under("basis:", tensors)})
            elif kind == "delivery":
                model = {
                    "model": under("model:", tensors),
                    "merged": pairs_under("model-merged:B:", "model-merged:A:", tensors),
                }
                work = _STRICT[Delivery].validate_python(asked | model)
            else:
                raise ValueError(f"no work is called {kind!r}")
            sent = {
                "tensors": under("tensor:", tensors),
                "increments": pairs_under("merged:B:", "merged:A:", tensors),
                "work": work,
            }
            request: Request = _STRICT[Request].validate_python(plain | sent)
        except (safetensors.SafetensorError, ValidationError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"not a request of this version of Lorica: {type(error).__name__}: {error}") from error
        except RecursionError:
            raise ValueError("not a request of this version of Lorica: it is nested too deeply") from None
        # What validation passed over or converted, such as a key that a part of it does not know, is not understood.
        if json.loads(json.dumps(request._plain())) != plain or request._tensors().keys() != tensors.keys():
            raise ValueError("not a request of this version of Lorica: it says more than this version understands")
        return request

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {key: getattr(self, key) for key in _PLAIN}
        if isinstance(self.work, Training):
            plain["work"] = {"kind": "training", **self.work.plain()}
        elif isinstance(self.work, Delivery):
            plain["work"] = {"kind": "delivery", "final": self.work.final, "personal": self.work.personal}
        else:
            plain["work"] = {"kind": "projection"}
        return plain

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"tensor:{name}": value for name, value in self.tensors.items()}
        named |= flat_pairs(self.increments, "merged:B:", "merged:A:")
        if isinstance(self.work, Training):
            named |= {f"correction:{name}": value for name, value in self.work.corrections.items()}
        elif isinstance(self.work, Projection):
            named |= {f"basis:{name}": value for name, value in self.work.bases.items()}
        else:
            named |= {f"model:{name}": value for name, value in self.work.model.items()}
            named |= flat_pairs(self.work.merged, "model-merged:B:", "model-merged:A:")
        return named


_PLAIN = ("run", "client", "round", "exchange", "restart", "sequence")
_STRICT: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Training, Projection, Delivery, Request)}
_PLAN = TypeAdapter(ClientPlan)
_ACCOUNT = TypeAdapter(Account)


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


def encode_plan(plan: ClientPlan) -> str:
    """What an owner agrees to, as JSON: its answer to an invitation."""
    return _PLAN.dump_json(plan).decode()


def decode_plan(text: str) -> ClientPlan:
    """The inverse of `encode_plan`.

    Raises:
        ValueError: not a plan.
    """
    return _PLAN.validate_json(text)


def encode_account(account: Account) -> str:
    """What an owner was charged so far, as JSON: it travels beside each reply."""
    return _ACCOUNT.dump_json(account).decode()


def decode_account(text: str) -> Account:
    """The inverse of `encode_account`.

    Raises:
        ValueError: not an account.
    """
    return _ACCOUNT.validate_json(text)


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes."""
    content: bytes = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    return content


def decode(content: bytes) -> dict[str, Tensor]:
    """The inverse of `encode`."""
    # Cloned into memory of PyTorch's alignment: products of others can round otherwise, and engines agree bit for bit.
    return {name: tensor.clone() for name, tensor in safetensors.torch.load(content).items()}


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors on the wire."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors blob: its header is JSON, after 8 bytes with the header's length."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata
