"""What a client insists on in every sum, whatever the server proposes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lorica.secure_sum.agreement import ROUNDING, Agreement
from lorica.secure_sum.identity import Identity, Member
from lorica.secure_sum.setup import SummationError


@dataclass(frozen=True)
class Requirements:
    """One client's terms. The defaults are for clients that trust each other's machines, as in one process.

    Attributes:
        run: the only run whose sums it takes part in.
        own: this client's id.
        min_clients: fewest clients in a sum.
        max_share: largest share of a sum that one client may have, before and after others dropped out.
        members: client -> the identity key by which its fresh keys are known. Nobody else takes part. Empty: fresh
            keys are not checked, so that a server can invent clients or replace keys.
        identity: signs this client's own fresh keys.
    """

    run: str
    own: int
    min_clients: int = 3
    max_share: float = 0.5
    members: Mapping[int, Member] = field(default_factory=dict)
    identity: Identity | None = field(default=None, repr=False)

    def review(self, agreement: Agreement) -> None:
        """Refuse terms under which this client takes no part.

        Raises:
            SummationError: another run, this client is no member, an unknown member, too few members, or too large a
                share.
        """
        if agreement.run != self.run:
            raise SummationError(f"a sum of run {agreement.run!r:.100}, this client takes part in {self.run!r}")
        if self.own not in agreement.weights:
            raise SummationError("this client is not among the members of the sum")
        unknown = sorted(set(agreement.weights) - set(self.members)) if self.members else []
        if unknown:
            raise SummationError("not in the list `members` of this client's policy", unknown[0])
        self.check(agreement, agreement.weights, "are members of the sum")

    def check(self, agreement: Agreement, clients: Collection[int], what: str) -> None:
        """Refuse a sum over these members: too few, or one of them dominates.

        Raises:
            SummationError: says which.
        """
        if len(clients) < self.min_clients:
            raise SummationError(f"{len(clients)} clients {what}, this client requires {self.min_clients}")
        total = math.fsum(agreement.weights[client] for client in clients)
        largest = max(clients, key=lambda client: (agreement.weights[client], -client))
        share = agreement.weights[largest] / total
        if share > self.max_share + ROUNDING:
            raise SummationError(f"its share of the sum is {share:.3g}, this client allows {self.max_share:g}", largest)
