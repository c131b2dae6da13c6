"""The server's side: route the clients' shares, check their masked inputs, and remove the masks from the sum.

No function keeps state. If an error names a client, the server can drop that client's bytes and call again, as long as
at least the threshold of clients is left. After the survivors have been announced to the clients, masked inputs can no
longer be dropped, so check each one with `check_masked` when it arrives. Stage 1 needs only `messages.check_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.messages import (
    DIGEST_BYTES,
    SEALED_BYTES,
    check_threshold,
    commitment,
    context,
    mask_key,
    pair_seed,
)
from lorica.secure_sum.primitives import keystream, public_key
from lorica.secure_sum.quantisation import coordinates, dequantise
from lorica.secure_sum.setup import SummationError
from lorica.secure_sum.shamir import SHARE_BYTES, combine, valid


def route(
    agreement: Agreement, keys: Mapping[int, bytes], sent: Mapping[int, Mapping[int, bytes]]
) -> dict[int, dict[int, bytes]]:
    """After stage 2: the encrypted shares for each client that shared, from the other clients.

    Args:
        keys: client -> public keys, as given to `client.share`.
        sent: sender -> recipient -> encrypted shares, from the clients that answered.

    Returns:
        Recipient -> sender -> encrypted shares, among the clients that answered.

    Raises:
        SummationError: fewer senders than the threshold; a sender without keys; recipients that are not exactly the
            other clients; a message of the wrong length.
    """
    for sender, messages in sent.items():
        if sender not in keys:
            raise SummationError("it sent shares but no keys", sender)
        if set(messages) != set(keys) - {sender}:
            raise SummationError("its shares are not for exactly the other clients", sender)
        if any(len(message) != SEALED_BYTES for message in messages.values()):
            raise SummationError(f"one of its shares is not {SEALED_BYTES} bytes long", sender)
    check_threshold(agreement, len(sent), "shared their secrets")
    return {
        recipient: {sender: sent[sender][recipient] for sender in sorted(sent) if sender != recipient}
        for recipient in sorted(sent)
    }


def check_masked(agreement: Agreement, keys: Mapping[int, bytes], client: int, reply: bytes) -> None:
    """Check one masked input, before its client is declared a survivor.

    Args:
        keys: client -> public keys, of the clients that `route` returned.

    Raises:
        SummationError: a client that did not share; a message of the wrong length; an input for another agreement or
            with other clients' masks.
    """
    if client not in keys:
        raise SummationError("it sent a masked input but no shares", client)
    expected = 2 * DIGEST_BYTES + coordinates(agreement.shapes) * agreement.setup.word.itemsize
    if len(reply) != expected:
        raise SummationError(f"its masked input has {len(reply)} bytes, not {expected}", client)
    if reply[:DIGEST_BYTES] != context(agreement, keys):
        raise SummationError("its masked input is for other masks or terms", client)


def unmask(
    agreement: Agreement, keys: Mapping[int, bytes], masked: Mapping[int, bytes], revealed: Mapping[int, bytes]
) -> dict[str, Tensor]:
    """After stage 4: the sum of the survivors' tensors.

    `Σ_u y_u − Σ_u G(b_u) − Σ_u Σ_{v dropped} ±G(s_uv)  mod 2^k`, dequantised. ePrint 2017/281, figure 4, round 4.

    Args:
        keys: client -> public keys, of the clients that `route` returned.
        masked: survivor -> masked input, of exactly the survivors named to `client.reveal`.
        revealed: client -> answer of `client.reveal`; at least `threshold` of the survivors.

    Returns:
        name -> fp32 sum.

    Raises:
        SummationError: fewer answers than the threshold; a masked input that `check_masked` refuses; an answer of the
            wrong length, out of range, or from a client that did not survive; shares of which the secrets cannot be
            reconstructed.
    """
    for client, reply in masked.items():
        check_masked(agreement, keys, client, reply)
    shares = {client: _shares(keys, masked, client, reply) for client, reply in revealed.items()}
    check_threshold(agreement, len(shares), "revealed their shares")
    setup = agreement.setup
    helpers = sorted(shares)[: setup.threshold]

    count = coordinates(agreement.shapes)
    total = np.zeros(count, setup.word)
    for client in sorted(keys):
        secret = combine({helper: shares[helper][client] for helper in helpers})
        if client in masked:
            known = masked[client][DIGEST_BYTES : 2 * DIGEST_BYTES]
            if secret is None or commitment(agreement, secret) != known:
                raise SummationError(f"wrong shares: the seed of client {client} cannot be reconstructed")
            total += np.frombuffer(masked[client], setup.word, offset=2 * DIGEST_BYTES)
            total -= keystream(secret, count, setup.word)
        else:
            if secret is None or public_key(secret) != mask_key(keys[client]):
                raise SummationError(f"wrong shares: the mask key of client {client} cannot be reconstructed")
            for survivor in masked:
                seed = pair_seed(agreement, client, secret, survivor, mask_key(keys[survivor]))
                stream = keystream(seed, count, setup.word)
                # The survivor's side of the pair: it added the mask if its id is the smaller one.
                total -= stream if survivor < client else np.negative(stream)
    return dequantise(setup, total, agreement.shapes)


def _shares(keys: Mapping[int, bytes], masked: Mapping[int, bytes], client: int, reply: bytes) -> dict[int, bytes]:
    """Client -> share of its secret, from one client's answer in stage 4."""
    if client not in masked:
        raise SummationError("it revealed shares but sent no masked input", client)
    parts = [reply[start : start + SHARE_BYTES] for start in range(0, len(reply), SHARE_BYTES)]
    if len(parts) != len(keys) or not all(valid(part) for part in parts):
        raise SummationError(f"its revealed shares are not {len(keys)} field elements", client)
    return dict(zip(sorted(keys), parts, strict=True))
