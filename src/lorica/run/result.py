"""The result of a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.adapters.export import check_exported
from lorica.config import ExperimentConfig
from lorica.files import remove_incomplete
from lorica.reporting.checksums import files_are_whole
from lorica.reporting.html import report_is_missing, write_report
from lorica.reporting.run_folder import read_run
from lorica.run.folder import claim_folder


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder, which contains `report.html`.
        adapter: folder of the PEFT adapter.
        metrics: one dictionary per round, starting with round 0.
        privacy: the content of privacy.json.
    """

    folder: Path
    adapter: Path
    metrics: list[dict[str, Any]]
    privacy: dict[str, Any]

    @property
    def score(self) -> float:
        """The task's main metric after the last evaluated round."""
        return float([row["score"] for row in self.metrics if "score" in row][-1])

    @property
    def starting_score(self) -> float:
        return float(self.metrics[0]["score"])

    @property
    def epsilon(self) -> float:
        """The largest ε of all clients; infinite without privacy."""
        return float(max(client.get("epsilon", float("inf")) for client in self.privacy["clients"]))


def read_result(folder: Path) -> Result:
    """Read the result of a finished run from its folder."""
    run = read_run(folder)
    return Result(folder, folder / "adapter", run.metrics, run.privacy or {})


def finished_result(config: ExperimentConfig, data: dict[str, str]) -> Result | None:
    """The result of this experiment if its run has already finished, else None.

    A report that is missing, because the run was killed before it was written, is written. Call it under the lock of
    the run folder (`lorica.run.lock`).

    Args:
        data: `lorica.run.data.fingerprints`.

    Raises:
        UserError: the run folder contains another experiment, is damaged, or the data have changed.
    """
    folder = config.folder
    whole = files_are_whole(folder)
    claim_folder(folder, config, data)
    if not whole or not (folder / "adapter").is_dir():
        return None
    check_exported(folder / "adapter")
    result = read_result(folder)
    remove_incomplete(folder)
    if report_is_missing(folder):
        write_report(folder)
    return result
