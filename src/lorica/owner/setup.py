"""Set up an owner: its training and test records, its plan, and its ledger."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.files import home_folder
from lorica.local.step import LocalStep
from lorica.owner.client import Client
from lorica.owner.cohort import Cohort
from lorica.privacy.ledger import Ledger
from lorica.privacy.ledger_file import ledger_beside
from lorica.privacy.plan import ClientPlan
from lorica.privacy.unit import CLIENT, RECORD, PrivacyUnit
from lorica.streams import stream_seed
from lorica.tasks.groups import by_group
from lorica.tasks.owners import first_source
from lorica.tasks.partition import BY_LABELS, partition
from lorica.tasks.records import Records, Task


def by_privacy_unit(config: ExperimentConfig, task: Task) -> Task:
    """The task with its training records grouped by `privacy.group`, or unchanged if that is not set."""
    if config.privacy.group is None:
        return task
    divided = config.federation.partition in ("column", "files")
    return by_group(task, config.privacy.group_records, divided, stream_seed(config.seed, "groups"))


def divide(config: ExperimentConfig, task: Task) -> list[Records]:
    """The training records of each simulated client, divided by `federation.partition`.

    Raises:
        UserError: too few records, or no labels to divide them by.
    """
    federation = config.federation
    if federation.partition in BY_LABELS and not task.has_classes:
        raise UserError(
            "federation.partition",
            federation.partition,
            f"it divides records by label, but {config.task.type} has no labels",
            "set federation.partition to iid or quantity",
        )
    owners = None if task.owners is None else task.owners.of
    parts = partition(task.train.labels, federation, stream_seed(config.seed, "partition"), owners)
    return [task.train.subset(part) for part in parts]


def hold_out(config: ExperimentConfig, records: Records) -> tuple[Records, Records | None]:
    """Split a client's records into training and test records; None if there are no test records.

    A record is held out if a hash of the public seed and its digest is below `federation.private_test`. This depends on
    no other record, and equal records are on the same side. The number of test records follows from it; it can be zero.

    Raises:
        UserError: no training record is left, or the unit of privacy is a group.
    """
    share = config.federation.private_test
    if share == 0:
        return records, None
    if PrivacyUnit.of(config.privacy) != RECORD:
        reason = "private tests are not supported with privacy.unit = group"
        raise UserError("federation.private_test", share, reason, "set federation.private_test to 0")
    prefix = f"{config.seed}:private-test:".encode()
    ranks = [int.from_bytes(hashlib.sha256(prefix + bytes(digest)).digest()[:8]) for digest in records.digests]
    tested = np.array(ranks, dtype=np.uint64) < np.uint64(int(share * 2**64))
    if tested.all():
        raise UserError(
            "federation.private_test",
            share,
            f"it holds out all {len(records)} records of a client",
            "lower federation.private_test",
        )
    return records.subset(np.flatnonzero(~tested)), records.subset(np.flatnonzero(tested)) if tested.any() else None


def ledger_path(config: ExperimentConfig, dataset: str) -> Path:
    """`privacy.ledger`, or a file next to the training data, or in Lorica's home folder if the data is not local."""
    if config.privacy.ledger is not None:
        return Path(config.privacy.ledger).expanduser()
    train = first_source(config.task.train)
    # Without privacy there is no budget to record, so a read-only data folder is not an error.
    if train.exists() and (config.privacy.private or os.access(train.absolute().parent, os.W_OK)):
        return ledger_beside(train)
    return home_folder() / "ledgers" / f"{dataset[:16]}.sqlite"


def make_client(
    config: ExperimentConfig,
    plan: ClientPlan,
    records: Records,
    private_test: Records | None,
    ledger: Ledger,
    dataset: str,
) -> Client:
    """The client with this plan.

    Args:
        dataset: fingerprint of the whole data set.
    """
    return Client(
        number=plan.client,
        records=records,
        plan=plan,
        ledger=ledger,
        dataset=dataset,
        unit=PrivacyUnit.of(config.privacy),
        seed=config.seed,
        micro_batch_tokens=config.federation.micro_batch_tokens,
        private_test=private_test,
        run_name=config.name,
    )


def make_cohort(
    config: ExperimentConfig,
    plan: ClientPlan,
    records: Records,
    members: list[Records],
    ledger: Ledger,
    dataset: str,
) -> Cohort:
    """All clients of a simulation as one owner (`privacy.unit: client`).

    Args:
        records: the records of all clients together.
        members: the records of each client.
        dataset: fingerprint of the whole data set.
    """
    return Cohort(
        number=0,
        records=records,
        plan=plan,
        ledger=ledger,
        dataset=dataset,
        unit=CLIENT,
        seed=config.seed,
        micro_batch_tokens=config.federation.micro_batch_tokens,
        members=members,
        optimizer=config.optimizer,
        steps=config.federation.local_steps,
        batch_size=config.federation.batch_size,
        local=LocalStep.of(config.local),
    )
