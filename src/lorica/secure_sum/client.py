"""The client's four stages, as functions of its secret state and the server's message."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from torch import Tensor

from lorica.secure_sum import primitives
from lorica.secure_sum.messages import (
    check_keys,
    check_threshold,
    commitment,
    context,
    encryption_key,
    mask_key,
    pair_seed,
)
from lorica.secure_sum.quantisation import quantise
from lorica.secure_sum.setup import Setup, SummationError
from lorica.secure_sum.shamir import SECRET_BYTES, SHARE_BYTES, split, valid


@dataclass(frozen=True)
class State:
    """State of a client between the stages of one summation. Secret: it never leaves the client.

    Attributes:
        own: this client's id.
        encryption_private, mask_private: X25519 private keys.
        keys: client -> public keys of all participants; empty before `share`.
        seed: seed of the self mask; empty before `share`.
        shares: client -> the shares of its seed and of its mask key for this client. Before `mask` only this client's
            own; afterwards those of all clients that shared.
        masked: SHA-256 of the quantised tensors and of the clients they were masked with; empty before `mask`.
        survivors: the clients named to `reveal`; empty before.
    """

    setup: Setup
    own: int
    encryption_private: bytes = field(repr=False)
    mask_private: bytes = field(repr=False)
    keys: Mapping[int, bytes] = field(default_factory=dict)
    seed: bytes = field(default=b"", repr=False)
    shares: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    masked: bytes = b""
    survivors: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        """The state as JSON."""
        content = vars(self) | {"setup": asdict(self.setup)}
        return json.dumps(content, default=bytes.hex).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> State:
        """The inverse of `to_bytes`.

        Raises:
            SummationError: not a state.
        """
        try:
            fields = json.loads(content)
            for name in ("encryption_private", "mask_private", "seed", "masked"):
                fields[name] = bytes.fromhex(fields[name])
            for name in ("keys", "shares"):
                fields[name] = {int(client): bytes.fromhex(value) for client, value in fields[name].items()}
            fields["setup"], fields["survivors"] = Setup(**fields["setup"]), tuple(fields["survivors"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise SummationError("the stored state of this client is damaged") from None


def advertise(setup: Setup, own: int) -> tuple[State, bytes]:
    """Stage 1: generate two key pairs and return the public keys, for all participants."""
    state = State(setup, own, primitives.private_key(), primitives.private_key())
    return state, _public_keys(state)


def share(state: State, keys: Mapping[int, bytes]) -> tuple[State, dict[int, bytes]]:
    """Stage 2: draw the seed of the self mask, and share it and the mask key among all participants.

    Args:
        keys: client -> its public keys, this client included.

    Returns:
        Recipient -> encrypted shares, for each other participant.

    Raises:
        SummationError: called before; fewer keys than the threshold; malformed, repeated or unusable keys; this
            client's own keys missing or replaced.
    """
    setup, own = state.setup, state.own
    if state.seed:
        raise SummationError("the server asks for this client's shares twice")
    check_keys(setup, keys)
    if keys.get(own) != _public_keys(state):
        raise SummationError("the public keys that this client sent are missing or replaced")
    seed = secrets.token_bytes(SECRET_BYTES)
    of_seed, of_key = split(seed, setup.threshold, keys), split(state.mask_private, setup.threshold, keys)
    pairs = {client: of_seed[client] + of_key[client] for client in keys}
    sealed = {
        other: primitives.seal(_encryption(state, other, keys), pairs[other], setup.summation, own, other)
        for other in sorted(keys)
        if other != own
    }
    return replace(state, keys=dict(keys), seed=seed, shares={own: pairs[own]}), sealed


def mask(state: State, shares: Mapping[int, bytes], tensors: Mapping[str, Tensor]) -> tuple[State, bytes]:
    """Stage 3: mask the quantised tensors with the self mask and a pairwise mask for each client that shared.

    A repeated call with the same tensors and senders returns the same bytes, in case the reply was lost.

    Args:
        shares: sender -> encrypted shares for this client, from each other client that shared.
        tensors: name -> released tensor to sum, already multiplied by this client's public weight.

    Raises:
        SummationError: called before `share`; called a second time with other tensors or senders; unknown senders;
            fewer clients than the threshold; shares that were altered or belong to another client or summation; a
            tensor that is not finite.
    """
    setup, own = state.setup, state.own
    if not state.seed:
        raise SummationError("the server asks for a masked input before this client shared its secrets")
    unknown = set(shares) - (set(state.keys) - {own})
    if unknown:
        raise SummationError(f"shares from unknown clients: {sorted(unknown)}")
    check_threshold(setup, len(shares) + 1, "shared their secrets")

    words = quantise(setup, tensors)
    keys = {client: state.keys[client] for client in sorted({own, *shares})}
    belongs_to = context(setup, keys, {name: tensor.shape for name, tensor in tensors.items()})
    digest = hashlib.sha256(belongs_to + words.tobytes()).digest()
    if state.masked not in (b"", digest):
        raise SummationError("the server asks for a second input under the same masks")
    received = {own: state.shares[own]}
    for sender in sorted(shares):
        received[sender] = _open(state, sender, shares[sender])

    words += primitives.keystream(state.seed, len(words), setup.word)
    for other in shares:
        seed = pair_seed(setup, own, state.mask_private, other, mask_key(keys[other]))
        stream = primitives.keystream(seed, len(words), setup.word)
        words += stream if own < other else np.negative(stream)
    reply = belongs_to + commitment(setup, state.seed) + words.tobytes()
    return replace(state, shares=received, masked=digest), reply


def reveal(state: State, survivors: Collection[int]) -> tuple[State, bytes]:
    """Stage 4: for each client that shared, reveal the share of its seed if it survived, else that of its mask key.

    A repeated call with the same survivors returns the same bytes.

    Args:
        survivors: the clients whose masked inputs reached the server.

    Raises:
        SummationError: called before `mask`; called a second time with other survivors; unknown clients; this client
            not among them; fewer than the threshold.
    """
    setup, own = state.setup, state.own
    alive = tuple(sorted(set(survivors)))
    if not state.masked:
        raise SummationError("the server asks for shares before this client sent its masked input")
    if state.survivors not in ((), alive):
        raise SummationError("the server asks for shares a second time, with other survivors")
    unknown = set(alive) - set(state.shares)
    if unknown:
        raise SummationError(f"survivors that did not share their secrets: {sorted(unknown)}")
    if own not in alive:
        raise SummationError("the server says that this client dropped out, but asks it for shares")
    check_threshold(setup, len(alive), "survived")
    reply = b"".join(
        pair[:SHARE_BYTES] if client in alive else pair[SHARE_BYTES:] for client, pair in sorted(state.shares.items())
    )
    return replace(state, survivors=alive), reply


def _public_keys(state: State) -> bytes:
    return primitives.public_key(state.encryption_private) + primitives.public_key(state.mask_private)


def _encryption(state: State, other: int, keys: Mapping[int, bytes]) -> bytes:
    """The encryption key for shares between this client and another."""
    public = encryption_key(keys[other])
    ids = sorted((state.own, other))
    try:
        return primitives.agree(state.encryption_private, public, "share", state.setup.summation, *ids)
    except ValueError:
        raise SummationError("its public key is not a usable X25519 key", other) from None


def _open(state: State, sender: int, sealed: bytes) -> bytes:
    key = _encryption(state, sender, state.keys)
    pair = primitives.open_sealed(key, sealed, state.setup.summation, sender, state.own)
    if pair is None or not (valid(pair[:SHARE_BYTES]) and valid(pair[SHARE_BYTES:])):
        raise SummationError("its shares were altered, misrouted or malformed", sender)
    return pair
