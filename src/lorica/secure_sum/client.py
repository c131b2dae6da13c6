"""The client's four stages, as functions of its secret state and the server's message."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from lorica.secure_sum import primitives
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.messages import (
    check_keys,
    check_threshold,
    commitment,
    context,
    encryption_key,
    mask_key,
    pair_seed,
    signature,
    to_sign,
)
from lorica.secure_sum.quantisation import quantise
from lorica.secure_sum.requirements import Requirements
from lorica.secure_sum.setup import SummationError
from lorica.secure_sum.shamir import SECRET_BYTES, SHARE_BYTES, split, valid


@dataclass(frozen=True)
class State:
    """State of a client between the stages of one summation. Secret: it never leaves the client.

    Attributes:
        agreement: the terms from stage 1; no later stage can change them.
        own: this client's id.
        encryption_private, mask_private: X25519 private keys.
        advertised: its public keys, as sent in stage 1.
        keys: client -> public keys of all participants; empty before `share`.
        seed: seed of the self mask; empty before `share`.
        shares: client -> the shares of its seed and of its mask key for this client. Before `mask` only this client's
            own; afterwards those of all clients that shared.
        masked: SHA-256 of the quantised tensors and of the clients they were masked with; empty before `mask`.
        survivors: the clients named to `reveal`; empty before.
    """

    agreement: Agreement
    own: int
    encryption_private: bytes = field(repr=False)
    mask_private: bytes = field(repr=False)
    advertised: bytes
    keys: Mapping[int, bytes] = field(default_factory=dict)
    seed: bytes = field(default=b"", repr=False)
    shares: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    masked: bytes = b""
    survivors: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        """The state as JSON."""
        content = vars(self) | {"agreement": self.agreement.plain()}
        return json.dumps(content, default=bytes.hex).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> State:
        """The inverse of `to_bytes`.

        Raises:
            SummationError: not a state.
        """
        try:
            fields = json.loads(content)
            for name in ("encryption_private", "mask_private", "advertised", "seed", "masked"):
                fields[name] = bytes.fromhex(fields[name])
            for name in ("keys", "shares"):
                fields[name] = {int(client): bytes.fromhex(value) for client, value in fields[name].items()}
            fields["agreement"], fields["survivors"] = Agreement.of(fields["agreement"]), tuple(fields["survivors"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SummationError):
            raise SummationError("the stored state of this client is damaged") from None


def advertise(agreement: Agreement, required: Requirements) -> tuple[State, bytes]:
    """Stage 1: check the terms, generate two key pairs, and return the public keys for all members.

    The public keys are signed if this client has an identity key.

    Raises:
        SummationError: the terms do not meet this client's requirements (`Requirements.review`).
    """
    required.review(agreement)
    private = primitives.private_key(), primitives.private_key()
    message = b"".join(map(primitives.public_key, private))
    if required.identity is not None:
        message += required.identity.sign(to_sign(agreement, required.own, message))
    return State(agreement, required.own, *private, message), message


def share(state: State, keys: Mapping[int, bytes], required: Requirements) -> tuple[State, dict[int, bytes]]:
    """Stage 2: draw the seed of the self mask, and share it and the mask key among all participants.

    Args:
        keys: client -> its public keys, this client included.

    Returns:
        Recipient -> encrypted shares, for each other participant.

    Raises:
        SummationError: called before; fewer keys than the threshold or than this client requires; malformed, repeated
            or unusable keys; this client's own keys missing or replaced; with `required.members`, keys without that
            member's signature for this agreement.
    """
    agreement, own = state.agreement, state.own
    if state.seed:
        raise SummationError("the server asks for this client's shares twice")
    check_keys(agreement, keys)
    if keys.get(own) != state.advertised:
        raise SummationError("the public keys that this client sent are missing or replaced")
    # Again: the owner may have changed the policy since.
    required.review(agreement)
    required.check(agreement, keys, "sent keys")
    if required.members:
        _check_signatures(agreement, keys, required)
    seed, threshold = secrets.token_bytes(SECRET_BYTES), agreement.setup.threshold
    of_seed, of_key = split(seed, threshold, keys), split(state.mask_private, threshold, keys)
    pairs = {client: of_seed[client] + of_key[client] for client in keys}
    sealed = {
        other: primitives.seal(_encryption(state, other, keys), pairs[other], agreement.digest, own, other)
        for other in sorted(keys)
        if other != own
    }
    return replace(state, keys=dict(keys), seed=seed, shares={own: pairs[own]}), sealed


def mask(state: State, shares: Mapping[int, bytes], tensors: Mapping[str, Tensor]) -> tuple[State, bytes]:
    """Stage 3: mask the quantised tensors with the self mask and a pairwise mask for each client that shared.

    A repeated call with the same tensors and senders returns the same bytes, in case the reply was lost.

    Args:
        shares: sender -> encrypted shares for this client, from each other client that shared.
        tensors: name -> released tensor to sum; this function multiplies it by the client's agreed weight.

    Raises:
        SummationError: called before `share`; called a second time with other tensors or senders; unknown senders;
            fewer clients than the threshold; shares that were altered or belong to another client or agreement; other
            tensors than agreed; a tensor that is not finite.
    """
    agreement, own = state.agreement, state.own
    if not state.seed:
        raise SummationError("the server asks for a masked input before this client shared its secrets")
    unknown = set(shares) - (set(state.keys) - {own})
    if unknown:
        raise SummationError(f"shares from unknown clients: {sorted(unknown)}")
    check_threshold(agreement, len(shares) + 1, "shared their secrets")
    agreed = {name: tuple(shape) for name, shape in agreement.shapes.items()}
    if {name: tuple(value.shape) for name, value in tensors.items()} != agreed:
        raise SummationError("the server asks for other tensors than it announced")

    words = quantise(agreement.setup, {name: agreement.weights[own] * value for name, value in tensors.items()})
    keys = {client: state.keys[client] for client in sorted({own, *shares})}
    belongs_to = context(agreement, keys)
    digest = hashlib.sha256(belongs_to + words.tobytes()).digest()
    if state.masked not in (b"", digest):
        raise SummationError("the server asks for a second input under the same masks")
    received = {own: state.shares[own]}
    for sender in sorted(shares):
        received[sender] = _open(state, sender, shares[sender])

    word = agreement.setup.word
    words += primitives.keystream(state.seed, len(words), word)
    for other in shares:
        seed = pair_seed(agreement, own, state.mask_private, other, mask_key(keys[other]))
        stream = primitives.keystream(seed, len(words), word)
        words += stream if own < other else np.negative(stream)
    reply = belongs_to + commitment(agreement, state.seed) + words.tobytes()
    return replace(state, shares=received, masked=digest), reply


def reveal(state: State, survivors: Collection[int], required: Requirements) -> tuple[State, bytes]:
    """Stage 4: for each client that shared, reveal the share of its seed if it survived, else that of its mask key.

    A repeated call with the same survivors returns the same bytes.

    Args:
        survivors: the clients whose masked inputs reached the server.

    Raises:
        SummationError: called before `mask`; called a second time with other survivors; unknown clients; this client
            not among them; fewer than the threshold or than this client requires; too large a weight of one of them.
    """
    own = state.own
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
    check_threshold(state.agreement, len(alive), "survived")
    required.check(state.agreement, alive, "survived")
    reply = b"".join(
        pair[:SHARE_BYTES] if client in alive else pair[SHARE_BYTES:] for client, pair in sorted(state.shares.items())
    )
    return replace(state, survivors=alive), reply


def _check_signatures(agreement: Agreement, keys: Mapping[int, bytes], required: Requirements) -> None:
    for client, message in sorted(keys.items()):
        member = required.members[client]
        if not signature(message):
            raise SummationError(f"its public keys are not signed; the policy lists {member} for it", client)
        if not member.signed(to_sign(agreement, client, message), signature(message)):
            problem = f"its public keys are not signed for this sum by {member}, which the policy lists for it"
            raise SummationError(problem, client)


def _encryption(state: State, other: int, keys: Mapping[int, bytes]) -> bytes:
    """The encryption key for shares between this client and another."""
    public = encryption_key(keys[other])
    ids = sorted((state.own, other))
    try:
        return primitives.agree(state.encryption_private, public, "share", state.agreement.digest, *ids)
    except ValueError:
        raise SummationError("its public key is not a usable X25519 key", other) from None


def _open(state: State, sender: int, sealed: bytes) -> bytes:
    key = _encryption(state, sender, state.keys)
    pair = primitives.open_sealed(key, sealed, state.agreement.digest, sender, state.own)
    if pair is None or not (valid(pair[:SHARE_BYTES]) and valid(pair[SHARE_BYTES:])):
        raise SummationError("its shares were altered, misrouted or malformed", sender)
    return pair
