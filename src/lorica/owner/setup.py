"""Set up an owner: its training and test records, its plan, and its ledger."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from lorica.adapters.base_model import resolve_device
from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.files import home_folder
from lorica.owner.client import Client
from lorica.privacy.ledger import Ledger, ledger_beside
from lorica.privacy.plan import ClientPlan, plan_client
from lorica.privacy.unit import RECORD, PrivacyUnit
from lorica.schedule import participation_schedule
from lorica.streams import numpy_stream, stream_seed
from lorica.tasks.groups import by_group
from lorica.tasks.owners import first_source
from lorica.tasks.partition import BY_LABELS, partition
from lorica.tasks.records import Records, Task

logger = logging.getLogger(__name__)


def by_privacy_unit(config: ExperimentConfig, task: Task) -> Task:
    """The task with its training records grouped by `privacy.group`, or unchanged if that is not set."""
    if config.privacy == "none" or config.privacy.group is None:
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


def hold_out(config: ExperimentConfig, client: int, records: Records) -> tuple[Records, Records | None]:
    """Split a client's records into training and test records by a public random draw, at least one of each.

    The test records are None if `federation.private_test` is 0.
    """
    share = config.federation.private_test
    if share == 0:
        return records, None
    if PrivacyUnit.of(config.privacy) != RECORD:
        reason = "private tests are not supported with privacy.unit = group"
        raise UserError("federation.private_test", share, reason, "set federation.private_test to 0")
    order = numpy_stream(config.seed, "private-test", client).permutation(len(records))
    cut = min(max(1, round(share * len(records))), len(records) - 1)
    return records.subset(np.sort(order[cut:])), records.subset(np.sort(order[:cut]))


def planned(config: ExperimentConfig, client: int, records: int) -> ClientPlan:
    """A client's plan, with noise calibrated to the steps that the schedule assigns to it.

    Args:
        records: `n`, declared public.

    Raises:
        UserError: the batch size exceeds the number of records.
    """
    federation = config.federation
    schedule = participation_schedule(federation.clients, federation.rounds, federation.participants, config.seed)
    steps = federation.local_steps * sum(client in participants for participants in schedule)
    plan = plan_client(client, records, federation.batch_size, steps, config.privacy)
    if plan.delta is not None and plan.delta >= 1 / records:
        logger.warning(
            "privacy.delta = %g is not below 1/%d, one over the number of records of client %d: publishing one random "
            "record would satisfy it. Choose a smaller privacy.delta.",
            plan.delta,
            records,
            client,
        )
    return plan


def ledger_path(config: ExperimentConfig, dataset: str) -> Path:
    """`privacy.ledger`, or a file next to the training data, or in Lorica's home folder if the data is not local."""
    if config.privacy != "none" and config.privacy.ledger is not None:
        return Path(config.privacy.ledger).expanduser()
    train = first_source(config.task.train)
    # Without privacy there is no budget to record, so a read-only data folder is not an error.
    if train.exists() and (config.privacy != "none" or os.access(train.absolute().parent, os.W_OK)):
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
        micro_batch_tokens=config.federation.pass_tokens(resolve_device(config.model.device).type),
        private_test=private_test,
    )
