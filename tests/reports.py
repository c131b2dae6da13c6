"""Runs without a report: drawing takes longer than a small run."""

from __future__ import annotations

import pytest


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rounds", "progress"):
        monkeypatch.setattr(f"lorica.run.{module}.write_report", lambda folder, live=False: None)
