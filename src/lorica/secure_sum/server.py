"""The server's side: route the clients' shares, check their masked inputs, and remove the masks from the sum.

No function keeps state. Where an error names a client, the server can leave that client's bytes out and call again,
until fewer than the threshold are left. Once the survivors were announced to the clients, only answers to that can be
left out, no masked input: hence `check_masked` as each one comes in. Stage 1 needs `messages.check_keys` only.
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
    """After stage 2: hand every client that shared what the others sent it.

    Args:
        keys: client -> public keys, as given to `client.share`.
        sent: sender -> recipient -> encrypted shares, from those that answered.

    Returns:
        Recipient -> sender -> encrypted shares, among those that answered.

    Raises:
        SummationError: fewer senders than the threshold; a sender without keys; other recipients than all the others;
            a message of the wrong length.
    """
    for sender, messages in sent.items():
        if sender not in keys:
            raise SummationError("sent shares but no keys", sender)
        if set(messages) != set(keys) - {sender}:
            raise SummationError("its shares are not for exactly the other clients", sender)
        if any(len(message) != SEALED_BYTES for message in messages.values()):
            raise SummationError(f"a share that is not {SEALED_BYTES} bytes long", sender)
    check_threshold(agreement, len(sent), "shared their secrets")
    return {
        recipient: {sender: sent[sender][recipient] for sender in sorted(sent) if sender != recipient}
        for recipient in sorted(sent)
    }


def check_masked(agreement: Agreement, keys: Mapping[int, bytes], client: int, reply: bytes) -> None:
    """Check one masked input, before its client is declared a survivor.

    Args:
        keys: of the clients that shared: those that `route` returned.

    Raises:
        SummationError: a client that did not share; a message of the wrong length; made under another agreement or with
            other clients' masks.
    """
    if client not in keys:
        raise SummationError("sent a masked input but no shares", client)
    expected = 2 * DIGEST_BYTES + coordinates(agreement.shapes) * agreement.setup.word.itemsize
    if len(reply) != expected:
        raise SummationError(f"a masked input of {len(reply)} bytes, expected {expected}", client)
    if reply[:DIGEST_BYTES] != context(agreement, keys):
        raise SummationError("its masked input is of other masks or terms", client)


def unmask(
    agreement: Agreement, keys: Mapping[int, bytes], masked: Mapping[int, bytes], revealed: Mapping[int, bytes]
) -> dict[str, Tensor]:
    """After stage 4: the sum of the survivors' tensors.

    `Σ_u y_u − Σ_u G(b_u) − Σ_u Σ_{v dropped} ±G(s_uv)  mod 2^k`, dequantised. ePrint 2017/281, figure 4, round 4.

    Args:
        keys: of the clients that shared: those that `route` returned.
        masked: survivor -> masked input: exactly those that `client.reveal` was told of.
        revealed: client -> answer of `client.reveal`; at least `threshold` of the survivors.

    Returns:
        name -> fp32 sum.

    Raises:
        SummationError: fewer answers than the threshold; a masked input that `check_masked` refuses; an answer of the
            wrong length or out of range, or from a client that is no survivor; shares that give no secrets back.
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
                raise SummationError(f"wrong shares: they do not give back the seed of client {client}")
            total += np.frombuffer(masked[client], setup.word, offset=2 * DIGEST_BYTES)
            total -= keystream(secret, count, setup.word)
        else:
            if secret is None or public_key(secret) != mask_key(keys[client]):
                raise SummationError(f"wrong shares: they do not give back the mask key of client {client}")
            for survivor in masked:
                seed = pair_seed(agreement, client, secret, survivor, mask_key(keys[survivor]))
                stream = keystream(seed, count, setup.word)
                # The survivor's side of the pair: it added the mask if its id is the smaller one.
                total -= stream if survivor < client else np.negative(stream)
    return dequantise(setup, total, agreement.shapes)


def _shares(keys: Mapping[int, bytes], masked: Mapping[int, bytes], client: int, reply: bytes) -> dict[int, bytes]:
    """One client's revealed shares, by the client whose secret they are of."""
    if client not in masked:
        raise SummationError("revealed shares but sent no masked input", client)
    parts = [reply[start : start + SHARE_BYTES] for start in range(0, len(reply), SHARE_BYTES)]
    if len(parts) != len(keys) or not all(valid(part) for part in parts):
        raise SummationError(f"its revealed shares are not {len(keys)} field elements", client)
    return dict(zip(sorted(keys), parts, strict=True))
