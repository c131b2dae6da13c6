"""The whole federation in one process, on one base model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.client import Client
from lorica.errors import UserError
from lorica.messages import Request, decode
from lorica.privacy.ledger import lifetime_above
from lorica.privacy.plan import ClientPlan
from lorica.privacy.statement import Account, account


class LocalEngine:
    """Runs the clients one after another; each writes its tensors into the shared model in place.

    Attributes:
        clients: number -> owner.
        max_lifetime_epsilon: each owner's limit over all runs on the same data; None for no limit.
    """

    def __init__(
        self, model: AdaptedModel, clients: Mapping[int, Client], max_lifetime_epsilon: float | None = None
    ) -> None:
        self._model = model
        self.clients = clients
        self.max_lifetime_epsilon = max_lifetime_epsilon

    @property
    def ledger(self) -> str:
        return ", ".join(sorted({str(client.ledger.path) for client in self.clients.values()}))

    def join(self, run: str) -> dict[int, ClientPlan]:
        """All clients.

        Raises:
            UserError: the run would exceed an owner's limit.
        """
        for client in self.clients.values():
            self._check_lifetime(client, run)
        return {number: client.plan for number, client in self.clients.items()}

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        """Every client's reply to its request, in the order of client ids."""
        return {
            number: decode(self.clients[number].answer(self._model, requests[number])) for number in sorted(requests)
        }

    def accounts(self, run: str) -> dict[int, Account]:
        """What the ledger holds of this run, client by client."""
        return {
            number: account(client.ledger, client.dataset, client.records.fingerprint(), run, client.plan, client.unit)
            for number, client in self.clients.items()
        }

    def personal(self, run: str) -> dict[int, dict[str, Tensor]]:
        """Every client's own tensors (`Client.personal`)."""
        return {number: client.personal(run) for number, client in self.clients.items()}

    def _check_lifetime(self, client: Client, run: str) -> None:
        plan, limit = client.plan, self.max_lifetime_epsilon
        if limit is None or plan.noise != "secure" or plan.delta is None:
            return
        remaining = plan.steps(plan.max_steps - client.ledger.steps(run, client.number))
        releases = client.ledger.releases(client.dataset)
        life = lifetime_above(limit, releases, client.records.fingerprint(), plan.delta, remaining, client.unit)
        if life is not None:
            raise UserError(
                "privacy.max_lifetime_epsilon",
                limit,
                f"with this run, client {client.number} would have released ε = {life:.3f} in all",
                "lower privacy.epsilon, run fewer rounds, or raise the limit",
            )
