"""The whole federation in one process, on one base model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.client import Client
from lorica.messages import Request, decode


class LocalEngine:
    """Runs the clients one after another; each writes its tensors into the shared model in place."""

    def __init__(self, model: AdaptedModel, clients: Mapping[int, Client]) -> None:
        self._model, self._clients = model, clients

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        """Every client's reply to its request, in the order of client ids."""
        return {
            number: decode(self._clients[number].answer(self._model, requests[number])) for number in sorted(requests)
        }
