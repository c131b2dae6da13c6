"""Processes for work that divides into independent pieces."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from lorica.errors import UserError

GRACE_SECONDS = 10.0
_ending = threading.Event()
P = ParamSpec("P")
T = TypeVar("T")


class _Pool(ProcessPoolExecutor):
    """Its processes survive the `SystemExit` of a piece, and have the next piece in their queue already."""

    def submit(self, function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> Future[T]:
        return super().submit(_unless_ending, function, *arguments, **named)


def _unless_ending(function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    if _ending.is_set():
        sys.exit(1)
    return function(*arguments, **named)


@contextmanager
def worker_processes(jobs: int) -> Iterator[Executor]:
    """Processes that each compute one piece at a time. They end at once if the context ends with an error.

    Raises:
        UserError: one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = _Pool(jobs, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            problem = "a process was killed, perhaps because memory ran out"
            raise UserError("--jobs", None, problem, "run the same command again, with fewer --jobs") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """End this process when the main process ends, however it ends."""
    # The terminal sends Ctrl-C to all processes. The main process then terminates its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    logging.getLogger("lorica").setLevel(logging.ERROR)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        # Without a main process, a worker whose work has been interrupted would wait for the next piece forever.
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _end(*_: object) -> None:
    _ending.set()
    sys.exit(1)
