"""Processes for work that divides into independent pieces."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from lorica.errors import UserError

GRACE_SECONDS = 10.0


@contextmanager
def worker_processes(jobs: int) -> Iterator[Executor]:
    """Processes that each compute one piece at a time. They end at once if the context ends with an error.

    Raises:
        UserError: one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
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
