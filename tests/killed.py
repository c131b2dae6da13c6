"""Whole runs in processes of their own, which a signal ends.

They are forked from a process that has imported Lorica and done nothing else: a fresh interpreter, without its ten
seconds of imports for each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lorica
import lorica.cli
import lorica.run.rounds
from lorica.privacy.ledger import Ledger


def kill_run(overrides: Sequence[str], call: int, moment: str, where: str) -> None:
    """Start a run in another process, which dies `before` or `after` the `call`-th `charge`, `attach` or `checkpoint`.

    Args:
        overrides: of the default experiment.
    """
    process = _started(_run, list(overrides), call, moment, where)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def start_command(arguments: Sequence[str], folder: Path) -> multiprocessing.process.BaseProcess:
    """Start `lorica` with these arguments in a folder, where `output` gets what it prints."""
    return _started(_command, list(arguments), folder)


def _started(function: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=function, args=(dict(os.environ), *arguments))
    process.start()
    return process


def _command(environment: dict[str, str], arguments: list[str], folder: Path) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT), 1)
    # Where tests run in the background, children would ignore SIGINT too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lorica.cli.app(arguments)


def _run(environment: dict[str, str], overrides: list[str], call: int, moment: str, where: str) -> None:
    os.environ.update(environment)
    if where in ("charge", "attach"):
        setattr(Ledger, where, _dying(getattr(Ledger, where), call, moment))
    else:
        lorica.run.rounds.save_checkpoint = _dying(lorica.run.rounds.save_checkpoint, call, moment)
    lorica.Experiment.load(overrides=overrides).run()


def kill_run_at(overrides: Sequence[str], function: str, call: int) -> bool:
    """Start a run in another process, which dies before its `call`-th `os.replace`, `os.fsync` or `os.mkdir`.

    Returns:
        False if the run ended before that.
    """
    process = _started(_run_until, list(overrides), function, call)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _run_until(environment: dict[str, str], overrides: list[str], function: str, call: int) -> None:
    os.environ.update(environment)
    setattr(os, function, _dying(getattr(os, function), call, "before"))
    lorica.Experiment.load(overrides=overrides).run()


def _dying(function: Callable[..., Any], call: int, moment: str) -> Callable[..., Any]:
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if (calls, moment) == (call, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*arguments, **options)
        if (calls, moment) == (call, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return wrapped
