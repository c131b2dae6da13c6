"""What grows with all clients, rounds or releases instead of with the work that is done.

Runs: many clients with a few records each, of which some take part in a round. Ledgers: one message to a node with a
policy, whose ledger holds the releases of many runs. Every case runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import typer
from measuring import Clock, machine, memory, verdict
from rich.console import Console
from rich.table import Table

RECORDS = 12
"""Mean number of records of a client."""
SAMPLES = 20
"""Rounds, at the start and at the end of a run, of which the median is shown; and measured messages."""
ROUNDS_OF_A_RUN = 500
"""Rows of one run in a ledger."""
WORDS = [f"word{number}" for number in range(1000)]


def measure_run(folder: Path, clients: int, rounds: int, participants: int, partition: str) -> dict[str, float]:
    """CPU seconds before the first round, of a round at both ends of the run, and after the last one.

    The work of the participants (sampling, gradients, noise) and of the test is left out: the rest is Lorica's own.
    """
    from lorica.experiment import Experiment
    from lorica.tasks.records import Task

    import lorica.owner.client as owner

    _write_base(folder / "base")
    _write_texts(folder / "train.jsonl", clients * RECORDS)
    _write_texts(folder / "test.jsonl", 20)
    experiment = Experiment.load(
        {
            "name": "scale",
            "output": str(folder / "runs"),
            "model": {"base": str(folder / "base"), "threads": 1},
            "lora": {"r": 2, "target_modules": ["query", "value"]},
            "task": {
                "type": "text-classification",
                "train": str(folder / "train.jsonl"),
                "test": str(folder / "test.jsonl"),
            },
            "federation": {
                "clients": clients,
                "partition": partition,
                "alpha": 5.0,
                "min_records": 2,
                "rounds": rounds,
                "participation": participants / clients,
                "local_steps": 1,
                "batch_size": 2,
                "evaluate_every": rounds,
            },
            "method": {"name": "ffa-lora"},
            "privacy": {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0},
        }
    )
    work = _Stopwatch()
    marks: list[float] = []

    def mark(*_: object) -> None:
        marks.append(time.process_time() - work.seconds)

    before = memory("VmRSS") or 0
    with work.left_out(owner, "noisy_gradient"), work.left_out(owner.AdaptedModel, "write"):
        with work.left_out(Task, "evaluate"):
            mark()
            result = experiment.run(mark, mark)
            mark()
    # Times: of the call, of the start, of round 0, of each round, of the end.
    seconds = np.diff(marks)
    return {
        "start": float(seconds[0]),
        "first": statistics.median(seconds[2:-1][:SAMPLES]),
        "last": statistics.median(seconds[2:-1][-SAMPLES:]),
        "finish": float(seconds[-1]),
        "mebibytes": ((memory("VmHWM") or 0) - before) / 2**20,
        "report": (result.folder / "report.html").stat().st_size / 2**20,
    }


def measure_messages(folder: Path, rows: int) -> dict[str, float]:
    """CPU milliseconds of a message to an owner with a policy, training left out, and CPU seconds to open its ledger.

    The ledger holds runs of `ROWS_OF_A_RUN` releases each. SQLite does not wait for the disk.
    """
    from lorica.config import OptimizerConfig, PrivacyConfig
    from lorica.messages import Request, Training
    from lorica.owner.client import Client
    from lorica.privacy.ledger import Ledger, Release
    from lorica.privacy.plan import plan_client
    from lorica.privacy.policy import Policy
    from lorica.testing.models import tiny_bert
    from lorica.testing.records import TinyRecords

    import lorica.owner.client as owner

    terms = PrivacyConfig(noise_multiplier=10.0, epsilon=None, delta=1e-6, clip_norm=1.0)
    plan, model, records = plan_client(0, 10_000, 10, SAMPLES, terms), tiny_bert(), TinyRecords.texts(50)
    past = Release("data", records.fingerprint(), "", 0, 0, 0.001, 10.0, 1.0, 1, "secure", "")
    path = folder / "ledger.sqlite"
    _fill(path, past, rows)
    started = time.process_time()
    ledger = Ledger(path)
    opening = time.process_time() - started
    policy = Policy(
        max_epsilon=100.0, delta=1e-6, base_models=None, tasks=[{"type": "text-classification"}], max_steps=10**6
    )
    client = Client(0, records, plan, ledger, "data", 0, 1024, policy=policy)
    trained = tuple(name for name in model.tensors if name.endswith(".B"))
    work = Training(trained, plan.terms, 1, OptimizerConfig(), dict.fromkeys(trained, 0.5))
    released = {name: owner.post_process(lambda value: value, _released(model.read()[name])) for name in trained}
    seconds = []
    with mock.patch.object(Client, "_train", lambda *_: (released, None)):
        for number in range(1, SAMPLES + 1):
            request = Request("run", 0, number, 1, model.read(), work)
            started = time.process_time()
            client.reserve("run", lambda reserved: _review(client, policy, reserved))
            client.reply_to(model, request)
            seconds.append(time.process_time() - started)
    return {"open": opening, "milliseconds": 1000 * statistics.median(seconds)}
