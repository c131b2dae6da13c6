"""What a client requires of every sum, whatever the server proposes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lorica.secure_sum.agreement import ROUNDING, Agreement
from lorica.secure_sum.identity import Identity, Member
from lorica.secure_sum.setup import SummationError


@dataclass(frozen=True)
class Requirements:
    """One client's requirements.

    Attributes:
        run: the run that this client takes part in.
        own: this client's id.
        min_clients: minimum number of clients in a sum, before and after dropouts.
        max_share: maximum share of one client in the total weight, before and after dropouts.
        members: client -> its identity key, which must have signed its public keys; other clients are refused. If
            empty, no signatures are checked, and a server can invent clients or replace keys.
        identity: the key that signs this client's public keys.
    """

    run: str
    own: int
    min_clients: int = 3
    max_share: float = 0.5
    members: Mapping[int, Member] = field(default_factory=dict)
    identity: Identity | None = field(default=None, repr=False)

    def review(self, agreement: Agreement) -> None:
        """Check the terms of a sum.

        Raises:
            SummationError: another run, this client is not a member, an unlisted member, too few members, or too large
                a share.
        """
        if agreement.run != self.run:
            raise SummationError(f"the sum is of run {agreement.run!r:.100}, not of {self.run!r}")
        if self.own not in agreement.weights:
            raise SummationError("this client is not a member of the sum")
        unknown = sorted(set(agreement.weights) - set(self.members)) if self.members else []
        if unknown:
            raise SummationError("it is not listed under `members` in this client's policy", unknown[0])
        self.check(agreement, agreement.weights, "are members of the sum")

    def check(self, agreement: Agreement, clients: Collection[int], what: str) -> None:
        """Check a sum over some of the members.

        Raises:
            SummationError: too few clients, or one with too large a share.
        """
        if len(clients) < self.min_clients:
            raise SummationError(f"only {len(clients)} clients {what}, but this client requires {self.min_clients}")
        total = math.fsum(agreement.weights[client] for client in clients)
        largest = max(clients, key=lambda client: (agreement.weights[client], -client))
        share = agreement.weights[largest] / total
        if share > self.max_share + ROUNDING:
            problem = f"its share of the sum is {share:.3g}, but this client allows at most {self.max_share:g}"
            raise SummationError(problem, largest)
