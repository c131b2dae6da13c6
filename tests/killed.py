"""Whole runs that SIGKILL ends at a given moment.

They are forked from a process that has imported Lorica and done nothing else: a fresh interpreter, without its ten
seconds of imports for each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lorica
import lorica.run.rounds
from lorica.privacy.ledger import Ledger


def kill_run(overrides: Sequence[str], call: int, moment: str, where: str) -> None:
    """Start a run in another process, which dies `before` or `after` the `call`-th `charge`, `attach` or `checkpoint`.

    Args:
        overrides: of the default experiment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(dict(os.environ), list(overrides), call, moment, where))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _run(environment: dict[str, str], overrides: list[str], call: int, moment: str, where: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if where in ("charge", "attach"):
        setattr(Ledger, where, _dying(getattr(Ledger, where), call, moment))
    else:
        lorica.run.rounds.save_checkpoint = _dying(lorica.run.rounds.save_checkpoint, call, moment)
    lorica.Experiment.load(overrides=overrides).run()


def _dying(function: Callable[..., Any], call: int, moment: str) -> Callable[..., Any]:
    calls = 0

    def wrapped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if (calls, moment) == (call, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*arguments)
        if (calls, moment) == (call, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return wrapped
