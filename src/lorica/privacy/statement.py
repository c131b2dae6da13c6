"""The privacy statement of a run (`privacy.json`): its guarantee for each owner, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorica.privacy.accounting import ACCOUNTANT, DISCRETIZATION
from lorica.privacy.ledger import Ledger
from lorica.privacy.lifetime import histories
from lorica.privacy.plan import ClientPlan
from lorica.privacy.unit import CLIENT, RECORD, PrivacyUnit

ASSUMPTIONS = [
    "Clients hold disjoint records, so the guarantee of the federation is that of its weakest client.",
    "Record counts, sampling rates, noise multipliers, learning rates and the choice of clients per round are public.",
    "Which record belongs to which client is public; the partition of a simulation is fixed before training.",
    "Whether a record is held out (federation.private_test) depends on its own content and the public seed alone.",
    "The choice of records in each batch is known to the owner only.",
]
CLIENT_ASSUMPTIONS = [
    "The server is trusted: it sees each client's update, and adds the noise to their sum.",
    "The number of clients, the expected number in a round, and learning rates are public.",
    "Which clients take part in a step is known to the server only.",
    "Clients hold disjoint records; how a simulation divides them is fixed before training.",
    "A client's records affect its own update only.",
]
OWN_NOISE_ASSUMPTIONS = [
    "The server and the other owners may see every message; each owner adds its noise before anything leaves it.",
]
SHARED_NOISE_ASSUMPTIONS = [
    "The server sees only sums of the replies of at least min_clients owners, under masks.",
    "The members of a sum are the owners that they claim to be: each owner lists the identity keys of the others.",
    "The other owners add their part of the noise as agreed; an owner that does not counts as colluding.",
]
NOT_COVERED = [
    "The test set: it is public, and the server evaluates on it in every round.",
    "The choice of hyper-parameters by looking at the results of several runs; each run is charged to the ledger.",
    "Running time and memory use.",
]
MECHANISM = "Gaussian noise of standard deviation σC on the sum, divided by the expected batch size"
RECORD_COUNTS = "The number of records of each client."
CLIENT_MECHANISM = "Gaussian noise of standard deviation σC on the sum, divided by the expected number of clients"
SHARED_MECHANISM = (
    "Gaussian noise on the secure sum of the owners' gradients, of which each owner adds a part: the parts of any "
    "min_clients - colluding owners together have at least each owner's noise multiplier σ"
)
UNPROTECTED = {
    "none": "All records: the run was trained without differential privacy.",
    "reproducible": "An attacker who knows or guesses the seed, since the noise and the batches follow from it.",
}


@dataclass(frozen=True)
class Account:
    """Steps and releases charged to one client in a run. A function of public numbers.

    Attributes:
        steps, releases: count every release that may have left, whether or not it arrived.
        lifetime_epsilon: ε of everything ever released about its most exposed record; None if the owner does not share
            it, or if it is not defined.
        unprotected: number of releases about any of its records with seeded noise or none.
        ledger: path of the ledger; None if it is with the owner.
    """

    steps: int
    releases: int
    lifetime_epsilon: float | None = None
    unprotected: int = 0
    ledger: str | None = None


def accounts_of(
    ledger: Ledger,
    dataset: str,
    run: str,
    plans: Mapping[int, ClientPlan],
    records: Mapping[int, str],
    unit: PrivacyUnit,
) -> dict[int, Account]:
    """Each client's account of a run, from one ledger that is read once.

    Args:
        records: client -> fingerprint of its records.
    """
    charged, found = ledger.charged(run), histories(ledger, dataset, set(records.values()))
    accounts = {}
    for client, plan in plans.items():
        history = found[records[client]]
        life = None
        if plan.noise == "secure" and plan.delta is not None:
            life = history.epsilon(plan.delta, (run, client), unit=unit)
        steps, releases = charged.get(client, (0, 0))
        accounts[client] = Account(steps, releases, life, history.unprotected, str(ledger.path))
    return accounts


def adversary(plan: ClientPlan, unit: PrivacyUnit = RECORD) -> str:
    """Against whom the guarantee of a run holds, in words."""
    if unit == CLIENT:
        return "everyone who sees the global model of every round, except the server, which is trusted"
    if plan.shared is None:
        return "the server and all other owners together, who see every message"
    colluding = plan.shared.colluding
    with_it = f"up to {colluding} other owner{'s' * (colluding != 1)} that collude{'s' * (colluding == 1)} with it"
    alone = "epsilon_own_noise holds against a server that sees the owner's own replies"
    return (
        f"a server that sees only sums over at least {plan.shared.min_clients} owners, and "
        f"{with_it if colluding else 'no other owner'}; {alone}"
    )


def relation(unit: PrivacyUnit) -> str:
    """The neighbouring relation in words: how two data sets differ (`accounting.NEIGHBOURS`)."""
    if unit == CLIENT:
        return "zero-out: one client contributes zero to every round; the number of clients is public"
    what = "one record contributes" if unit == RECORD else "all records of one group contribute"
    return f"zero-out: {what} zero to every batch; the number of {unit.noun}s is public"


def sampler(unit: PrivacyUnit) -> str:
    """How the sample of a step is drawn, in words."""
    if unit == CLIENT:
        return "Poisson: each client enters each step independently with probability q = expected clients / clients"
    noun = unit.noun
    return f"Poisson: each {noun} enters each batch independently with probability q = batch size / {noun}s"


def clipped(unit: PrivacyUnit) -> str:
    """What is clipped, in words."""
    if unit == CLIENT:
        return "flat: the whole update of each client, norm at most C"
    return f"flat: the gradient of each {unit.noun} over all trained tensors together, norm at most C"


def privacy_statement(
    plans: Mapping[int, ClientPlan],
    accounts: Mapping[int, Account],
    target_epsilon: float | None,
    unit: PrivacyUnit = RECORD,
    overlap: int = 0,
    start: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """JSON-able statement of a run as far as the clients' ledgers have been charged.

    `steps` and `epsilon` are those of the ledger, not of the plan: they count every release that may have left.

    Args:
        plans: client -> plan.
        accounts: client -> account.
        unit: the unit of privacy.
        overlap: number of training records that are also test records.
        start: name and SHA-256 of the adapter that the run started from.
    """
    noise, shared = next(iter(plans.values())).noise, next(iter(plans.values())).shared
    noun = unit.noun
    clips = all(math.isfinite(plan.terms.clip_norm) for plan in plans.values())
    clients = []
    for client, plan in sorted(plans.items()):
        own = accounts[client]
        row: dict[str, Any] = {
            "client": client,
            f"{noun}s" if unit == CLIENT else "records": plan.records,
            "sampling_rate": plan.terms.sampling_rate,
            "batch_size": plan.terms.batch_size,
            "steps": own.steps,
            "planned_steps": plan.max_steps,
            "releases": own.releases,
        }
        if clips:
            row["clip_norm"] = plan.terms.clip_norm
        if plan.delta is not None:
            row |= {
                "noise_multiplier": plan.noise_multiplier,
                "delta": plan.delta,
                "epsilon": plan.epsilon(own.steps),
                "epsilon_rdp": plan.epsilon_rdp(own.steps),
            }
            if plan.shared is not None:
                row |= {
                    "own_noise_multiplier": plan.terms.noise_multiplier,
                    "epsilon_own_noise": plan.epsilon_own_noise(own.steps),
                }
            if own.lifetime_epsilon is not None and math.isfinite(own.lifetime_epsilon):
                row["lifetime_epsilon"] = own.lifetime_epsilon
        clients.append(row)
    if unit == CLIENT:
        assumptions, mechanism = CLIENT_ASSUMPTIONS, CLIENT_MECHANISM
    elif shared is None:
        assumptions, mechanism = [*ASSUMPTIONS, *OWN_NOISE_ASSUMPTIONS], MECHANISM
    else:
        assumptions, mechanism = [*ASSUMPTIONS, *SHARED_NOISE_ASSUMPTIONS], SHARED_MECHANISM
    ledgers = {own.ledger for own in accounts.values() if own.ledger is not None}
    statement: dict[str, Any] = {
        "private_release": noise == "secure",
        "noise": noise,
        "unit": str(unit),
        "adversary": adversary(next(iter(plans.values())), unit),
        "relation": relation(unit),
        "sampler": sampler(unit),
        "clients": clients,
        "assumptions": assumptions,
        "not_covered": [
            *([UNPROTECTED[noise]] if noise in UNPROTECTED else []),
            *NOT_COVERED,
            *([] if unit == CLIENT else [RECORD_COUNTS]),
        ],
        "ledger": ", ".join(sorted(ledgers)) or "with each owner",
    }
    if clips:
        statement["clipping"] = clipped(unit)
    if noise != "none":
        statement |= {
            "mechanism": mechanism,
            "accountant": f"{ACCOUNTANT} (pessimistic, grid {DISCRETIZATION:g}); cross-check by RDP",
            "delta": max(plan.delta for plan in plans.values() if plan.delta is not None),
            "target_epsilon": target_epsilon,
        }
    if start is not None:
        statement["start"] = dict(start)
        statement["not_covered"].append(
            f"The adapter {start['name']} (SHA-256 {start['sha256']}) that the run started from: the guarantee covers "
            "only what this run released. If that adapter was trained on any of these records, its ε and that of this "
            "run add up, as the owners' ledgers count them."
        )
    if overlap:
        statement["not_covered"].append(
            f"{overlap} training records that are also in a test set (task.test_overlap): the test results are "
            "published without noise."
        )
    void = [str(plan.client) for plan in plans.values() if plan.void_delta]
    if void:
        what = "client" if unit == CLIENT else "record"
        problem = f"A δ of at least one over the number of {what}s, which publishing one random {what} would satisfy"
        statement["not_covered"].append(problem if unit == CLIENT else f"{problem} (clients {', '.join(void)})")
    if any(own.lifetime_epsilon == math.inf for own in accounts.values()):
        statement["not_covered"].append(
            "Earlier releases of the same data with another unit of privacy: they do not compose."
        )
    bare = max(own.unprotected for own in accounts.values())
    if noise == "secure" and bare:
        statement["not_covered"].append(f"{bare} earlier releases of the same records with reproducible or no noise.")
    return statement
