"""What trackers are told: a run's settings without paths, and the public numbers of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.config import ExperimentConfig

_ON_THIS_MACHINE: dict[str, Any] = {
    "output": True,
    "flower": True,
    "report_to": True,
    "task": {"train", "test"},
    "lora": {"start"},
    "privacy": {"ledger"},
}
_COUNTED = ("participants", "missing")
_SUMMED = ("bytes_up", "bytes_down")


def public_settings(config: ExperimentConfig) -> dict[str, Any]:
    """The configuration as one flat dictionary, such as `{"privacy.epsilon": 3.0}`.

    Paths stay out, and so does all that only says where the run takes place; of a base model in a folder, the folder's
    name remains.
    """
    content = config.model_dump(mode="json", exclude=_ON_THIS_MACHINE)
    base = Path(config.model.base).expanduser()
    if base.exists():
        content["model"]["base"] = base.name
    return _flat(content)


def public_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl: those on the public test set, ε, times, and totals over the clients.

    >>> public_metrics({"round": 2, "metric": "accuracy", "accuracy": 0.5, "score": 0.5, "bytes_up": {"0": 3, "1": 4}})
    {'accuracy': 0.5, 'bytes_up': 7.0}
    """
    # The score is the main metric once more.
    numbers = {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and name not in ("round", "score")
    }
    counted = {name: float(len(row[name])) for name in _COUNTED if name in row}
    summed = {name: float(sum(row[name].values())) for name in _SUMMED if name in row}
    return numbers | counted | summed


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
