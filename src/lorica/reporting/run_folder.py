"""Read a run folder: configuration, results and privacy guarantee of a run, from its files alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.config import experiment_of
from lorica.errors import UserError
from lorica.files import read_json
from lorica.paths import user_path
from lorica.reporting.checksums import files_are_whole, remedy
from lorica.strict_yaml import read_yaml_file

AUDIT = "audit.json"
METRIC_NAMES = {"f1": "F1", "matthews": "Matthews correlation", "pearson": "Pearson correlation"}


@dataclass(frozen=True)
class Run:
    """The content of a run folder, with one line of metrics per round, sorted by round.

    Attributes:
        audit: the audit of this experiment (`lorica audit run`); None if there is none, or only one of another
            experiment.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    privacy: dict[str, Any] | None
    folder: Path
    partition: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.folder.name))

    @property
    def method(self) -> str:
        return str(self.config.get("method", {}).get("name", "unknown method"))

    @property
    def rounds(self) -> int:
        """Number of finished rounds."""
        return int(self.metrics[-1]["round"])

    @property
    def planned_rounds(self) -> int:
        return int(self.config.get("federation", {}).get("rounds", self.rounds))

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The clients in privacy.json; empty if there are none."""
        return list((self.privacy or {}).get("clients") or [])


@dataclass(frozen=True)
class Outcome:
    """Main metric of the initial model and of the last evaluated round; None if not evaluated."""

    start: float | None
    final: float | None
    final_round: int | None

    @property
    def gain(self) -> float | None:
        return None if self.start is None or self.final is None else self.final - self.start


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    An incomplete last line, left by a crash, is ignored. If a round was run twice (in a resumed run), the later line
    counts. Decisions of unfinished rounds are ignored. environment.json, decisions.jsonl, privacy.json,
    partition.json and audit.json may be missing.

    Raises:
        UserError: no such folder, not a run folder, a damaged file, or no finished round.
    """
    folder = user_path("run", folder)
    if not folder.is_dir():
        raise UserError("run", str(folder), "no such folder", "give the folder of a run, such as runs/NAME")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                "run",
                str(folder),
                f"not a run folder: {name} is missing",
                "give the folder of a run, such as runs/NAME",
            )
    files_are_whole(folder)
    metrics = read_rounds(folder / "metrics.jsonl")
    if not metrics or metrics[-1]["round"] < 1:
        raise UserError("run", str(folder), "no round is finished", "resume the run until it has finished a round")
    finished = {row["round"] for row in metrics}
    decisions = [row for row in read_rounds(folder / "decisions.jsonl") if row["round"] in finished]
    config, audit = read_yaml_file(folder / "config.yaml", "config.yaml"), _read_json(folder / AUDIT)
    return Run(
        config=config,
        environment=_read_json(folder / "environment.json") or {},
        metrics=metrics,
        decisions=decisions,
        privacy=_read_json(folder / "privacy.json"),
        folder=folder,
        partition=_read_json(folder / "partition.json"),
        audit=audit if audit is not None and audit.get("experiment") == experiment_hash(config) else None,
    )


def experiment_hash(config: dict[str, Any]) -> str:
    """SHA-256 (hexadecimal) of what makes an experiment, to know an audit's experiment again."""
    return hashlib.sha256(json.dumps(experiment_of(config), sort_keys=True).encode()).hexdigest()


def outcome(metrics: list[dict[str, Any]]) -> Outcome:
    """The main metric at the start and the end of a run: in round 0 and in the last evaluated round, not the best one.

    `final` is None if no round after round 0 was evaluated, `start` if round 0 was not.
    """
    evaluated = [(int(row["round"]), score) for row in metrics if (score := score_of(row)) is not None]
    start = next((score for number, score in evaluated if number == 0), None)
    if not evaluated or evaluated[-1][0] == 0:
        return Outcome(start, None, None)
    last, final = evaluated[-1]
    return Outcome(start, final, last)


def score_of(row: dict[str, Any]) -> float | None:
    """The task's main metric in a line of metrics.jsonl, where 1 is perfect; None if not evaluated."""
    value = row.get("score", row.get("accuracy"))
    return None if value is None else float(value)


def run_content(run: Run) -> dict[str, Any]:
    """A finished run for scripts: its result first, then all of its metrics and the privacy statement.

    `score` is the main metric after the last evaluated round, and `epsilon` the largest of all clients; null without
    privacy.
    """
    found = outcome(run.metrics)
    return {
        "name": run.name,
        "method": run.method,
        "folder": str(run.folder),
        "adapter": str(run.folder / "adapter"),
        "report": str(run.folder / "report.html"),
        "metric": next((row["metric"] for row in run.metrics if "metric" in row), None),
        "score": found.final,
        "starting_score": found.start,
        "epsilon": max((client["epsilon"] for client in run.clients if "epsilon" in client), default=None),
        "private_release": (run.privacy or {}).get("private_release"),
        "metrics": run.metrics,
        "privacy": run.privacy,
    }


def metric_name(metrics: list[dict[str, Any]]) -> str:
    """Display name of the main metric, such as "F1"."""
    name = next((str(row["metric"]) for row in metrics if row.get("metric")), "accuracy")
    return shown_metric(name)


def shown_metric(name: str) -> str:
    """Display name of a metric, such as "F1"."""
    return METRIC_NAMES.get(name, name.replace("_", " "))


def bytes_sent(metrics: list[dict[str, Any]]) -> tuple[int, int]:
    """Bytes sent by all clients and bytes sent to them, over all rounds."""
    up = sum(sum(row.get("bytes_up", {}).values()) for row in metrics)
    down = sum(sum(row.get("bytes_down", {}).values()) for row in metrics)
    return up, down


def missing_text(metrics: list[dict[str, Any]]) -> str:
    """Clients without an accepted reply, and the rounds: "client 2 in rounds 3, 4". Empty if there are none."""
    rounds: dict[int, list[int]] = {}
    for row in metrics:
        for client in row.get("missing", []):
            rounds.setdefault(client, []).append(row["round"])
    parts = []
    for client, numbers in sorted(rounds.items()):
        noun = "round" if len(numbers) == 1 else "rounds"
        listed = f"{noun} {', '.join(map(str, numbers))}" if len(numbers) <= 10 else f"{len(numbers)} rounds"
        parts.append(f"client {client} in {listed}")
    return "; ".join(parts)


def seconds_per_round(metrics: list[dict[str, Any]], key: str = "seconds") -> float | None:
    """Mean time per round; None if not recorded. The key `server_seconds` gives the time on the server."""
    seconds = [row[key] for row in metrics if row.get(key) is not None]
    return sum(seconds) / len(seconds) if seconds else None


def guarantee(run: Run) -> tuple[float, float] | None:
    """The maximum ε and the maximum δ over the clients; None for a run without DP."""
    spent = [client for client in run.clients if client.get("epsilon") is not None]
    if not spent:
        return None
    return max(client["epsilon"] for client in spent), max(client["delta"] for client in spent)


def own_noise_epsilon(run: Run) -> float | None:
    """The maximum ε of a client's own noise alone; None if the clients do not share the noise."""
    return max((client["epsilon_own_noise"] for client in run.clients if "epsilon_own_noise" in client), default=None)


def not_private(run: Run) -> str | None:
    """Why this run is not a private release, in one sentence; None if it is.

    A private release requires `private_release: true` and secure noise in privacy.json.
    """
    if run.privacy is None:
        return "its folder has no privacy.json, so its noise is unknown."
    noise = run.privacy.get("noise")
    if noise == "none":
        return "it was trained without differential privacy, so the adapter may reveal single records."
    if noise == "reproducible":
        return (
            "its noise was drawn from a seed (privacy.noise: reproducible), and anyone who knows the seed can remove "
            "it. The ε shown is the cost of the same run with secure noise."
        )
    if run.privacy.get("private_release") is not True:
        return "privacy.json says so (private_release: false)."
    if noise != "secure":
        return f"privacy.json has an unknown kind of noise ({noise})."
    return None


def client_level(run: Run) -> bool:
    """Whether the unit of privacy is a client, so that all clients have one guarantee."""
    return (run.privacy or run.config.get("privacy", {})).get("unit") == "client"


def clipping(run: Run) -> str:
    """ "clipped to norm 2" or "not clipped", for runs without noise, whose clip is no part of a guarantee."""
    clients = run.clients or [run.config.get("privacy", {})]
    norms = {client["clip_norm"] for client in clients if client.get("clip_norm") is not None}
    return f"clipped to norm {max(norms):g}" if norms else "not clipped"


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, sorted by round; empty if the file is missing."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[int(row["round"])] = row
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            if number < len(lines):
                raise UserError(
                    path.name,
                    f"line {number}",
                    "not a JSON object with a round",
                    f"correct or delete this line of {path}",
                ) from None
    return [rows[number] for number in sorted(rows)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(path.name, str(path), f"the file is damaged ({error})", remedy(path.name)) from None
