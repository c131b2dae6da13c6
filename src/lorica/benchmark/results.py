"""The results of a benchmark on disk: one line for each finished run, never changed."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from lorica.errors import UserError
from lorica.files import append_line, write_atomically
from lorica.reporting.benchmark import BenchmarkRun

RESULTS = "results.jsonl"


def read_results(folder: Path) -> dict[str, BenchmarkRun]:
    """Digest -> finished run; the later one if a run was repeated. A last line without its end is ignored.

    Raises:
        UserError: a line is damaged.
    """
    path = folder / RESULTS
    content = path.read_bytes() if path.is_file() else b""
    found: dict[str, BenchmarkRun] = {}
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            run = BenchmarkRun.model_validate_json(line)
        except ValidationError as error:
            problem = f"line {number} is not a result ({error.errors()[0]['msg']})"
            raise UserError(RESULTS, str(path), problem, "delete the line; its run is then repeated") from None
        found[run.digest] = run
    return found


def drop_partial_line(folder: Path) -> None:
    """Remove a last line that a killed process did not finish."""
    path = folder / RESULTS
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(path, whole)


def add_result(folder: Path, run: BenchmarkRun) -> None:
    """Append the line of a finished run and sync it."""
    append_line(folder / RESULTS, json.dumps(run.model_dump(mode="json"), ensure_ascii=False))
