"""Whole runs in processes of their own, which a signal ends.

They are forked from a process that has imported Lorica and done nothing else: a fresh interpreter, without its ten
seconds of imports for each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lorica
import lorica.cli
import lorica.run.rounds
from lorica.errors import UserError
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


@dataclass(frozen=True)
class Ending:
    """How a run in another process ended.

    Attributes:
        killed: it was killed by a signal.
        events: number of its file-system events; 0 if it was killed.
        error: the traceback or, of a `UserError`, the message; empty if it finished or was killed.
        expected: it finished, was killed, or ended with a `UserError`.
    """

    killed: bool
    events: int = 0
    error: str = ""
    expected: bool = True


def run_until(
    overrides: Sequence[str], root: Path, event: int = 0, error: int | None = None, seconds: float = 0.0
) -> Ending:
    """Start a run in another process, which dies just before its `event`-th file-system event, or after some seconds.

    Events are renames, syncs, new and deleted files and folders, files opened for writing, and opened databases.

    Args:
        overrides: of the default experiment.
        root: events elsewhere do not count.
        event: counted from 1; 0 for none.
        error: number of the system's error with which the event fails in place of the kill, such as `errno.ENOSPC`.
        seconds: at an instant of the clock, wherever the process is then; 0 for none.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = _started(_run_until, sender, list(overrides), root, event, error, seconds)
    sender.close()
    try:
        ending: Ending = receiver.recv()
    except EOFError:
        ending = Ending(killed=True)
    process.join()
    assert process.exitcode in ((-signal.SIGKILL, -signal.SIGALRM) if ending.killed else (0,))
    return ending


_PATH_OF = {"open": 0, "os.rename": 1, "os.mkdir": 0, "os.rmdir": 0, "os.remove": 0, "sqlite3.connect": 0}


def _run_until(
    environment: dict[str, str],
    sender: Connection,
    overrides: list[str],
    root: Path,
    event: int,
    error: int | None,
    seconds: float,
) -> None:
    os.environ.update(environment)
    events = 0

    def happens(path: object) -> None:
        nonlocal events
        events += 1
        if events == event and error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif events == event:
            raise OSError(error, os.strerror(error or 0), str(path))

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name not in _PATH_OF or (
            name == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            return
        path = arguments[_PATH_OF[name]]
        if isinstance(path, str | bytes | os.PathLike) and str(root) in os.fsdecode(path):
            happens(path)

    def fsync(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
        happens(descriptor)
        sync(descriptor)

    sys.addaudithook(hook)
    os.fsync = fsync
    if seconds:
        # Without a handler, the alarm ends the process at once.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        lorica.Experiment.load(overrides=overrides).run()
        ending = Ending(killed=False, events=events)
    except UserError as problem:
        ending = Ending(killed=False, events=events, error=str(problem))
    except BaseException:
        ending = Ending(killed=False, events=events, error=traceback.format_exc(), expected=False)
    signal.setitimer(signal.ITIMER_REAL, 0)
    sender.send(ending)


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
