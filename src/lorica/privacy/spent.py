"""The ε that a run has spent so far, kept up to date round by round."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

from lorica.privacy.accounting import Composition, Steps
from lorica.privacy.plan import ClientPlan

MOST_COMPOSITIONS = 256
"""Maximum number of compositions that are kept, of about 100 kB each."""

Kind = tuple[float, float, float]
"""(q, σ, δ): clients of one kind have the same ε after the same number of steps."""


class Spent:
    """The largest ε of any client of a run, by what the schedule has assigned to the clients so far.

    A round costs one convolution for each kind of step of its participants, and nothing for the other clients. The
    values are upper bounds, as those of `lorica.privacy.accounting.epsilon`, which computes the final statement; they
    differ by less than 1e-6.

    Args:
        past: participants of the rounds before.
        steps: noisy steps of a participant in a round.
    """

    def __init__(self, past: Iterable[Iterable[int]], steps: int) -> None:
        self._steps = steps
        self._rounds = Counter(client for participants in past for client in participants)
        self._new = set(self._rounds)
        self._compositions: OrderedDict[Kind, Composition] = OrderedDict()
        self._largest: dict[bool, float] = {}

    def add(self, participants: Iterable[int], plans: Mapping[int, ClientPlan]) -> dict[str, float]:
        """Count a round, and return `epsilon` and `epsilon_own_noise` after it; without what no client has.

        Args:
            plans: client -> plan. Clients without one have not joined and have spent nothing.
        """
        participants = list(participants)
        self._rounds.update(participants)
        self._new.update(participants)
        private = [plans[client] for client in self._new if client in plans and plans[client].delta is not None]
        self._new = {client for client in self._new if client not in plans}
        self._raise(False, {plan.client: plan.steps(1) for plan in private}, plans)
        self._raise(True, {plan.client: plan.own_steps(1) for plan in private if plan.shared is not None}, plans)
        names = {False: "epsilon", True: "epsilon_own_noise"}
        return {names[own]: value for own, value in sorted(self._largest.items())}

    def _raise(self, own: bool, steps: Mapping[int, Steps], plans: Mapping[int, ClientPlan]) -> None:
        """Take the clients with most rounds among those of each kind, and raise the largest ε to theirs."""
        most: dict[Kind, int] = {}
        for client, step in steps.items():
            delta = plans[client].delta
            assert delta is not None
            kind = (step.sampling_rate, step.noise_multiplier, delta)
            most[kind] = max(most.get(kind, 0), self._rounds[client])
        for kind, rounds in most.items():
            value = self._epsilon(kind, rounds * self._steps)
            self._largest[own] = max(self._largest.get(own, 0.0), value)

    def _epsilon(self, kind: Kind, count: int) -> float:
        rate, noise_multiplier, delta = kind
        composition = self._compositions.pop(kind, None)
        if composition is None or composition.count > count:
            composition = Composition(Steps(rate, noise_multiplier, 0), delta)
        self._compositions[kind] = composition
        if len(self._compositions) > MOST_COMPOSITIONS:
            self._compositions.popitem(last=False)
        return composition.epsilon(count)
