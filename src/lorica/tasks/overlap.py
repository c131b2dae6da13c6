"""Find records that are both in the private training data and in the public test data.

A server publishes its test results after every round, without noise. For private records this would be a release that
no ε covers.
"""

from __future__ import annotations

import logging
from pathlib import Path

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.owners import source_names
from lorica.tasks.records import Task

logger = logging.getLogger(__name__)
REMEDY = "use other records for testing, or set task.test_overlap=allow if all of these records are public"


def check_sources(config: TaskConfig) -> None:
    """Refuse a test source that is also a training source, under any path, or contains one or is inside one.

    Raises:
        UserError: names the test set's key.
    """
    if config.test_overlap == "allow":
        return
    trains = [Path(name).expanduser().resolve() for name in source_names(config.train)]
    tests = config.test if isinstance(config.test, dict) else {"": config.test}
    for name, test in tests.items():
        path = Path(test).expanduser().resolve()
        if any(path == train or path in train.parents or train in path.parents for train in trains):
            raise UserError(f"task.test.{name}".rstrip("."), test, "overlaps with task.train", REMEDY)


def overlap(config: TaskConfig, task: Task) -> int:
    """The number of training records that are also in a test set, by the digests of the records.

    Raises:
        UserError: there are any, and `task.test_overlap` is `refuse`.
    """
    public = {bytes(digest) for records in task.tests.values() for digest in records.digests}
    found = sum(bytes(digest) in public for digest in task.train.digests)
    if found and config.test_overlap == "refuse":
        raise UserError("task.test", config.test, f"{found} of its records are also in task.train", REMEDY)
    if found and config.test_overlap == "report":
        logger.warning(
            "%d records of task.train are also in task.test. Their test results are published without noise: use other "
            "records for testing unless these are public",
            found,
        )
    return found
