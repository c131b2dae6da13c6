"""A run folder, read back: what a run was, what it reached and what it guarantees, from its files alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorica.errors import UserError

METRIC_NAMES = {"f1": "F1", "matthews": "Matthews correlation", "pearson": "Pearson correlation"}


@dataclass(frozen=True)
class Run:
    """The content of a run folder; one metrics line per round, in the order of the rounds."""

    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    privacy: dict[str, Any] | None
    folder: Path
    partition: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.folder.name))

    @property
    def method(self) -> str:
        return str(self.config.get("method", {}).get("name", "unknown method"))

    @property
    def rounds(self) -> int:
        """Rounds that are finished."""
        return int(self.metrics[-1]["round"])

    @property
    def planned_rounds(self) -> int:
        return int(self.config.get("federation", {}).get("rounds", self.rounds))

    @property
    def clients(self) -> list[dict[str, Any]]:
        """What privacy.json says of each client; empty where it lists none."""
        return list((self.privacy or {}).get("clients") or [])


@dataclass(frozen=True)
class Outcome:
    """Main metric of the starting model and of the last evaluated round; None where nothing was evaluated."""

    start: float | None
    final: float | None
    final_round: int | None

    @property
    def gain(self) -> float | None:
        return None if self.start is None or self.final is None else self.final - self.start


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    A last line that a crash cut short is left out, of a round that was run twice (a resumed run) the later line counts,
    and decisions of a round that did not finish are left out. environment.json, decisions.jsonl, privacy.json and
    partition.json may be absent.

    Raises:
        UserError: there is no such folder, it is not a run folder, a file in it is damaged, or no round is finished.
    """
    folder = Path(folder)
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
    metrics = _read_rounds(folder / "metrics.jsonl")
    if not metrics or metrics[-1]["round"] < 1:
        raise UserError("run", str(folder), "no round is finished yet", "let the run finish a round, or resume it")
    finished = {row["round"] for row in metrics}
    decisions = [row for row in _read_rounds(folder / "decisions.jsonl") if row["round"] in finished]
    return Run(
        config=_read_config(folder / "config.yaml"),
        environment=_read_json(folder / "environment.json") or {},
        metrics=metrics,
        decisions=decisions,
        privacy=_read_json(folder / "privacy.json"),
        folder=folder,
        partition=_read_json(folder / "partition.json"),
    )


def outcome(metrics: list[dict[str, Any]]) -> Outcome:
    """Where a run started and where it ended: round 0 and the last evaluated round, never the best one.

    `final` is None if no round after round 0 was evaluated, `start` if round 0 was not.
    """
    evaluated = [(int(row["round"]), score) for row in metrics if (score := score_of(row)) is not None]
    start = next((score for number, score in evaluated if number == 0), None)
    if not evaluated or evaluated[-1][0] == 0:
        return Outcome(start, None, None)
    last, final = evaluated[-1]
    return Outcome(start, final, last)


def score_of(row: dict[str, Any]) -> float | None:
    """The task's main metric in a line of metrics.jsonl, where 1 is perfect; None where nothing was evaluated."""
    value = row.get("score", row.get("accuracy"))
    return None if value is None else float(value)


def metric_name(metrics: list[dict[str, Any]]) -> str:
    """What the main metric is called, such as "F1"."""
    name = next((str(row["metric"]) for row in metrics if row.get("metric")), "accuracy")
    return METRIC_NAMES.get(name, name.replace("_", " "))


def bytes_sent(metrics: list[dict[str, Any]]) -> tuple[int, int]:
    """Bytes from all clients to the server and back, over all rounds."""
    up = sum(sum(row.get("bytes_up", {}).values()) for row in metrics)
    down = sum(sum(row.get("bytes_down", {}).values()) for row in metrics)
    return up, down


def missing_text(metrics: list[dict[str, Any]]) -> str:
    """Which clients gave no reply that counted, and in which rounds: "client 2 in rounds 3, 4"; empty if none."""
    rounds: dict[int, list[int]] = {}
    for row in metrics:
        for client in row.get("missing", []):
            rounds.setdefault(client, []).append(row["round"])
    parts = []
    for client, numbers in sorted(rounds.items()):
        noun = "round" if len(numbers) == 1 else "rounds"
        listed = ", ".join(map(str, numbers)) if len(numbers) <= 10 else f"{len(numbers)} in all"
        parts.append(f"client {client} in {noun} {listed}")
    return "; ".join(parts)


def seconds_per_round(metrics: list[dict[str, Any]], key: str = "seconds") -> float | None:
    """Mean time of a round; None where no time was recorded. `server_seconds` is the server's part of it."""
    seconds = [row[key] for row in metrics if row.get(key) is not None]
    return sum(seconds) / len(seconds) if seconds else None


def guarantee(run: Run) -> tuple[float, float] | None:
    """The largest ε and the largest δ over the clients; None for a run without DP."""
    spent = [client for client in run.clients if client.get("epsilon") is not None]
    if not spent:
        return None
    return max(client["epsilon"] for client in spent), max(client["delta"] for client in spent)


def not_private(run: Run) -> str | None:
    """Why this run is not a private release, in one sentence; None if it is one.

    Only `private_release: true` together with secure noise counts as one; a missing privacy.json does not.
    """
    if run.privacy is None:
        return "its folder holds no privacy.json, so nothing is known about its noise."
    noise = run.privacy.get("noise")
    if noise == "none":
        return "it trained without differential privacy, so the adapter may reveal single records."
    if noise == "reproducible":
        return (
            "its noise was drawn from a seed (privacy.noise: reproducible), and whoever knows the seed can take it "
            "away. The ε given here is what the same run would cost with secure noise."
        )
    if run.privacy.get("private_release") is not True:
        return "privacy.json marks it so (private_release: false)."
    if noise != "secure":
        return f"privacy.json names an unknown kind of noise ({noise})."
    return None


def _read_rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, by round; empty if the file is absent."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[int(row["round"])] = row
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(
                    path.name, f"line {number}", "not a JSON object with a round", "mend or remove the line"
                ) from None
    return [rows[number] for number in sorted(rows)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(path.name, str(path), f"not valid JSON ({error})", "mend the file") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(path.name, str(path), "not a JSON object", "mend the file")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(path.name, str(path), f"not valid YAML ({error})", "mend the file") from None
    if not isinstance(content, dict):
        raise UserError(path.name, str(path), "not a mapping of keys to values", "mend the file")
    return content
