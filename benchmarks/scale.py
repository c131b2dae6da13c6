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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import product
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
ROWS_OF_A_RUN = 500
"""Releases of one run in a ledger."""
START_BAR, ROUND_BAR, FINISH_BAR, MESSAGE_BAR = 30.0, 0.05, 5.0, 2.0
"""Seconds before the first round, of a round, and after the last one; milliseconds of a message."""
MEMORY = next((folder for folder in ("/dev/shm",) if Path(folder).is_dir()), None)
"""A file system in memory: syncing to a disk is not what is measured."""
WORDS = [f"word{number}" for number in range(1000)]


def measure_run(folder: Path, clients: int, rounds: int, participants: int, partition: str) -> dict[str, float]:
    """CPU seconds before the first round, of a round at both ends of the run, and after the last one.

    The clients' replies (gradients, noise, the charge in their ledger) are left out. The model is tested twice, at the
    start and at the end.
    """
    from lorica.experiment import Experiment

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
    with work.of_clients():
        mark()
        result = experiment.run(mark, mark)
        mark()
    # Times: of the call, of the start, of round 0, of each round, of the end.
    seconds = np.diff(marks)
    return {
        "start": float(seconds[0]),
        "first": float(np.median(seconds[2:-1][:SAMPLES])),
        "last": float(np.median(seconds[2:-1][-SAMPLES:])),
        "finish": float(seconds[-1]),
        "mebibytes": ((memory("VmHWM") or 0) - before) / 2**20,
        "report": (result.folder / "report.html").stat().st_size / 2**20,
    }


class _Stopwatch:
    """The CPU seconds in which clients trained, added up. It looks at the clock twice a round, which is not free."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def of_clients(self) -> Iterator[None]:
        from lorica.engines.local import LocalEngine
        from lorica.messages import Delivery

        carry = LocalEngine.exchange

        @wraps(carry)
        def timed(engine: Any, requests: Any) -> Any:
            started = time.process_time()
            replies = carry(engine, requests)
            if not isinstance(next(iter(requests.values())).work, Delivery):
                self.seconds += time.process_time() - started
            return replies

        with mock.patch.object(LocalEngine, "exchange", timed):
            yield


def measure_messages(folder: Path, rows: int) -> dict[str, float]:
    """CPU milliseconds of a message to an owner with a policy, training left out, and CPU seconds to open its ledger.

    The ledger holds runs of `ROWS_OF_A_RUN` releases each.
    """
    from lorica.config import OptimizerConfig, PrivacyConfig
    from lorica.messages import Request, Training
    from lorica.owner.client import Client
    from lorica.privacy.ledger import Ledger, Release
    from lorica.privacy.plan import plan_client
    from lorica.privacy.policy import Policy
    from lorica.privacy.released import _release
    from lorica.testing.models import tiny_bert
    from lorica.testing.records import TinyRecords

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
    released = {name: _release(model.read()[name]) for name in trained}
    seconds = []
    with mock.patch.object(Client, "_train", return_value=(released, None)):
        for number in range(1, SAMPLES + 1):
            request = Request("run", 0, number, 1, model.read(), work)
            started = time.process_time()
            client.reserve(
                "run", lambda reserved: policy.review_release(_known(client), client.unit, plan, 1, reserved)
            )
            client.reply_to(model, request)
            seconds.append(time.process_time() - started)
    return {"open": opening, "milliseconds": 1000 * statistics.median(seconds)}


def _known(client: Any) -> list[Any]:
    """What a node's policy is asked about before a message."""
    ledger = client.ledger
    return [*ledger.costs(), *ledger.elsewhere(client.records.fingerprint(), reserved=True)]


def _fill(path: Path, past: Any, rows: int) -> None:
    """A ledger with so many releases in runs of `ROWS_OF_A_RUN`, written in one transaction."""
    from lorica.privacy import database
    from lorica.privacy.chain import Head, verify
    from lorica.privacy.home import Home
    from lorica.privacy.ledger import Ledger
    from lorica.privacy.ledger_rows import chained, exposures_of, insert

    identity = Ledger(path).identity
    with database.transaction(path) as connection:
        previous = identity
        for row in range(rows):
            run, number = divmod(row, ROWS_OF_A_RUN)
            insert(connection, replace(past, run=f"{run:032d}", round=number, request=f"{row:064d}"), previous)
            (previous,) = connection.execute("SELECT chain FROM releases ORDER BY id DESC LIMIT 1").fetchone()
        exposures = exposures_of(connection, identity)
        head = verify(identity, chained(connection), None)
    Home().remember(identity, path, Head(head.rows, head.link), exposures)


def _write_base(folder: Path) -> None:
    """A BERT of one layer with random weights, and a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": ["input_ids", "attention_mask"]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    shape = {"vocab_size": len(words), "max_position_embeddings": 16, "pad_token_id": 0}
    transformers.BertModel(transformers.BertConfig(**sizes, **shape)).save_pretrained(folder)


def _write_texts(path: Path, count: int) -> None:
    draws = np.random.default_rng(count)
    with path.open("w", encoding="utf-8") as file:
        for number, words in enumerate(draws.integers(0, len(WORDS), (count, 6))):
            text = " ".join(WORDS[word] for word in words)
            file.write(json.dumps({"text": text, "label": number % 2}) + "\n")


MEASURES = {"run": measure_run, "messages": measure_messages}


def _in_a_process_of_its_own(threads: int, measure: str, *sizes: int | str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        environment = os.environ | {"LORICA_HOME": f"{folder}/home", "OMP_NUM_THREADS": str(threads)}
        case = json.dumps([measure, folder, *sizes])
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found


def main(
    clients: Annotated[str, typer.Option(help="Comma-separated numbers of clients.")] = "10,1000,10000",
    rounds: Annotated[str, typer.Option(help="Comma-separated numbers of rounds.")] = "5,500",
    participants: Annotated[int, typer.Option(help="Most clients of a round.")] = 100,
    partitions: Annotated[
        str, typer.Option(help="iid: equal sizes. quantity: many sizes, each with its own noise.")
    ] = "iid",
    rows: Annotated[str, typer.Option(help="Comma-separated numbers of rows of a ledger.")] = "100,10000,100000",
    threads: int = 1,
    case: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print one table: runs by clients and rounds, and messages by rows of the ledger."""
    if case:
        measure, folder, *sizes = json.loads(case)
        print(json.dumps(MEASURES[measure](Path(folder), *sizes)))
        return
    console = Console(width=130)
    table = Table(title="CPU seconds, without the clients' replies")
    for heading in ("case", "start", "a round, first", "a round, last", "finish", "memory", "report"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    runs = {}
    for partition, count, number in product(partitions.split(","), _numbers(clients), _numbers(rounds)):
        found = _in_a_process_of_its_own(threads, "run", count, number, min(participants, count), partition)
        runs[count, number] = found
        name = f"{count:,} clients ({partition}), {number} rounds"
        times = [f"{found[key]:.3g}" for key in ("start", "first", "last", "finish")]
        row = [name, *times, f"{found['mebibytes']:.0f} MiB", f"{found['report']:.1f} MiB"]
        table.add_row(*row)
        # The largest case takes many minutes, and what is known by then is not lost with it.
        print(*row, sep=" | ", file=sys.stderr)
    table.add_section()
    for count in _numbers(rows):
        found = _in_a_process_of_its_own(threads, "messages", count)
        message = f"{found['milliseconds'] / 1000:.3g}"
        table.add_row(f"message, ledger of {count:,} rows", f"{found['open']:.3g}", message, message, "", "", "")
        slowest = found["milliseconds"]
    console.print(table)
    console.print(machine(Clock.cpu))
    start, a_round, finish = (max(f[key] for f in runs.values()) for key in ("start", "last", "finish"))
    met = start <= START_BAR and a_round <= ROUND_BAR and finish <= FINISH_BAR
    console.print(
        f"bar 1: start under {START_BAR:g} s, a round under {1000 * ROUND_BAR:g} ms, finish under {FINISH_BAR:g} s: "
        f"{start:.1f} s, {1000 * a_round:.0f} ms, {finish:.1f} s at worst: {verdict(met)}"
    )
    console.print(
        f"bar 2: a message under {MESSAGE_BAR:g} ms: {slowest:.1f} ms with the longest ledger: "
        f"{verdict(slowest < MESSAGE_BAR)}"
    )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    typer.run(main)
