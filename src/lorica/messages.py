"""The messages between the server and an owner, and their encodings. Nothing else travels."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from lorica.adapters.names import Pair, flat_pairs, is_factor, pairs_under, site_of, under
from lorica.adapters.state import at_ranks, with_ranks
from lorica.config import OptimizerConfig
from lorica.local.step import LocalStep
from lorica.privacy.mechanism import Terms
from lorica.privacy.plan import ClientPlan, Refused
from lorica.privacy.released import Released
from lorica.privacy.statement import Account
from lorica.tensors import decode_with_metadata, encode

OWNER = "owner"
"""Value of `task.train` in a message: the data are with the owner, whose own settings say where."""
# The owner writes the name of a run into its logs and files.
RUN_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
LONGEST_INVITATION = 2**20
LARGEST_COUNT = 2**31
LONGEST_WORD = 10_000
"""Maximum number of characters in a plan or an account."""
_TENSORS = ConfigDict(arbitrary_types_allowed=True, extra="forbid")


@dataclass(frozen=True)
class Invitation:
    """The part that all messages of a run have in common.

    Attributes:
        run: id of the run.
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
            if len(text) > LONGEST_INVITATION:
                raise ValueError("too long")
            invitation = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            invitation = None
        if invitation is None or not all(isinstance(value, str) for value in asdict(invitation).values()):
            raise Refused("the message contains no invitation that this version of Lorica understands")
        if not RUN_NAME.fullmatch(invitation.run):
            raise Refused("the name of the run must be 1 to 100 characters: letters, digits, -, _ and .")
        return invitation


@dataclass(frozen=True)
class Training:
    """Work: train these tensors for `steps` noisy steps under these terms, and reply with their updates.

    Attributes:
        trained: names of the tensors to train.
        terms: the DP terms that the server proposes; the client checks them.
        rates: name -> learning rate of each trained tensor.
        local: transformations of the noisy gradient before the optimiser.
        corrections: name -> tensor that SCAFFOLD adds to the noisy gradient.
        rounds: number of rounds of the run, for the schedules of the local step.
        rank: hold and train only the first `rank` ranks; None for all.
        slices: site name -> the ranks that are trained, ascending; empty to train all.
        personal: trained tensors that stay with the client: it starts from its own values and sends no updates.
        sketch_columns: instead of the factors' updates, reply with `B_k (A_k Ω)`, `(d_out, columns)`, for each site,
            named `sketch:SITE`, and keep the factors for a `Projection`.
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
    slices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    personal: tuple[str, ...] = ()
    sketch_columns: int | None = None
    last_step_energy: bool = False

    __pydantic_config__: ClassVar = _TENSORS

    def ranks(self, name: str) -> Sequence[int] | None:
        """The ranks of a tensor that are trained; None for all, and for tensors other than factors."""
        if not is_factor(name):
            return None
        return self.slices.get(site_of(name)) if self.rank is None else range(self.rank)

    def part(self, name: str, value: Tensor) -> Tensor:
        """The part of a tensor that is trained."""
        return at_ranks(name, value, self.ranks(name))

    def whole(self, name: str, value: Tensor, part: Tensor) -> Tensor:
        """A tensor with another trained part: the inverse of `part`."""
        ranks = self.ranks(name)
        return part if ranks is None else with_ranks(name, value, ranks, part)

    def common_digest(self, adapter: Mapping[str, Tensor]) -> str:
        """SHA-256 of the work without the client's own terms, and of the adapter that it starts from.

        Equal for all members of a sum, who must turn their noisy gradients into replies in the same way.
        """
        plain = {key: value for key, value in self.plain().items() if key != "terms"}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        digest.update(encode(dict(sorted(adapter.items()))))
        return digest.hexdigest()

    def plain(self) -> dict[str, Any]:
        """All fields except the tensors, as JSON-able values."""
        plain = {key: value for key, value in vars(self).items() if key != "corrections"}
        plain |= {"terms": asdict(self.terms), "local": asdict(self.local), "rates": dict(self.rates)}
        plain |= {"slices": dict(self.slices)}
        return plain | {"optimizer": self.optimizer.model_dump()}


@dataclass(frozen=True)
class Projection:
    """Work: reply with `Z_k = A_kᵀ (B_kᵀ Q)`, `(d_in, columns)`, of the factors kept in this round, named
    `sketch:SITE`.

    A function of earlier releases: it takes no step and costs nothing.

    Attributes:
        bases: site name -> `Q (d_out, columns)`.
    """

    bases: Mapping[str, Tensor]

    __pydantic_config__: ClassVar = _TENSORS


@dataclass(frozen=True)
class Delivery:
    """Work: receive this model, without a reply. The client evaluates it on its private test records, if it has any.

    Attributes:
        model: all tensors of the adapter, averaged over rounds if that is configured.
        merged: site name -> `(B, A)`, everything merged into the frozen weight.
        final: whether this is the result of the run.
        personal: the client's own tensors replace those of the model (`Method.personal`).
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
        run: id of the run.
        round, exchange: the round, and the exchange within it, both from 1.
        tensors: all global tensors that changed since this client last took part.
        increments: site name -> `(B, A)`, ranks merged into the frozen weight since then.
        restart: `increments` contains everything merged so far and replaces the client's copy.
        sequence: 0 if the request contains all tensors and increments; otherwise it builds on the previous request.
        work: what the client is asked to do.
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
        """SHA-256 of the requested work and of the adapter that it starts from.

        Requests with equal digests get the same release.

        Args:
            adapter: all global tensors at the client, `tensors` included.
            merged: all merged ranks at the client, `increments` included.
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
        """Size in bytes of the request's tensors on the wire."""
        return size(self._tensors())

    def encode(self) -> bytes:
        """One safetensors blob: all tensors, with the other fields as JSON in its metadata."""
        return encode(self._tensors(), {"request": json.dumps(self._plain())})

    @classmethod
    def decode(cls, content: bytes) -> Request:
        """The inverse of `encode`.

        Raises:
            ValueError: not a request. The message may quote the server, since a request contains nothing private.
        """
        try:
            tensors, metadata = decode_with_metadata(content)
            plain = json.loads(metadata["request"])
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
                raise ValueError(f"unknown kind of work {kind!r}")
            sent = {
                "tensors": under("tensor:", tensors),
                "increments": pairs_under("merged:B:", "merged:A:", tensors),
                "work": work,
            }
            request: Request = _STRICT[Request].validate_python(plain | sent)
        except (ValidationError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"not a request of this version of Lorica: {type(error).__name__}: {error}") from error
        except RecursionError:
            raise ValueError("not a request of this version of Lorica: nested too deeply") from None
        # Refuse anything that validation ignored or converted, such as an unknown key in a nested part.
        if json.loads(json.dumps(request._plain())) != plain or request._tensors().keys() != tensors.keys():
            raise ValueError("not a request of this version of Lorica: it has unknown keys or tensors")
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
    """Client to server: released tensors only.

    Raises:
        TypeError: a tensor that is not `Released`.
    """

    client: int
    tensors: Mapping[str, Released]

    def __post_init__(self) -> None:
        for name, value in self.tensors.items():
            if not isinstance(value, Released):
                raise TypeError(f"a reply accepts only released tensors; {name} is a {type(value).__name__}")

    def encode(self) -> bytes:
        """The reply as safetensors bytes, as it is sent and stored in the ledger."""
        return encode({name: released.tensor for name, released in self.tensors.items()})


def encode_plan(plan: ClientPlan) -> str:
    """A plan as JSON: the owner's answer to an invitation."""
    return json.dumps(asdict(plan))


def decode_plan(text: object) -> ClientPlan:
    """The inverse of `encode_plan`.

    Raises:
        ValueError: not a plan.
    """
    return _PLAN.validate_json(_word(text), strict=True)


def encode_account(account: Account) -> str:
    """An account as JSON; it is sent with each reply."""
    return _ACCOUNT.dump_json(account).decode()


def decode_account(text: object) -> Account:
    """The inverse of `encode_account`.

    Raises:
        ValueError: not an account, or counts out of range.
    """
    account = _ACCOUNT.validate_json(_word(text), strict=True)
    if account != Account(account.steps, account.releases):
        raise ValueError("an account may contain only steps and releases")
    if not (0 <= account.steps < LARGEST_COUNT and 0 <= account.releases < LARGEST_COUNT):
        raise ValueError("the number of steps or releases is out of range")
    return account


def size(tensors: Mapping[str, Tensor]) -> int:
    """Size in bytes of tensors on the wire."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _word(text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(f"it is of type {type(text).__name__}, not text")
    if len(text) > LONGEST_WORD:
        raise ValueError(f"it has {len(text)} characters, but at most {LONGEST_WORD} are allowed")
    return text
