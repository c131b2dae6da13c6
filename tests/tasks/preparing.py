"""What a process does that prepares records beside others: a module of its own that imports no more than that."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np

from lorica.tasks.cache import Arrays, cached_arrays


def make(arrays: Arrays) -> None:
    arrays.append("tokens", np.arange(5, dtype=np.int32))
    arrays.append("tokens", np.arange(5, 7, dtype=np.int32))
    arrays.append("pixels", np.ones((2, 3, 4), dtype=np.uint8))
    arrays.append("none", np.empty((0, 2), dtype=np.float32))


def prepare(home: str, queue: multiprocessing.Queue[int]) -> None:
    os.environ["LORICA_HOME"] = home
    queue.put(int(cached_arrays(["shared"], make)["tokens"].sum()))
