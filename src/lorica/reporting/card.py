"""The model card of an adapter: description, how to load it, and the privacy statement."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lorica.markdown import code, fenced, inline
from lorica.reporting.clients import GUARANTEE, client_rows, left_out_text
from lorica.reporting.run_folder import Run, clipping, metric_name, not_private
from lorica.reporting.tables import PRIVACY_TERMS, markdown_table, rounds_text, score_text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_card(run: Run, load_lines: str) -> str:
    """Markdown with Hugging Face front matter, for `README.md` in the adapter folder.

    A base model that is not a Hugging Face id (a folder, `lorica:...`) appears in the text only, because the hub
    rejects cards with an unknown `base_model`. Only the last part of a folder's path is shown, because cards are
    published.

    Args:
        load_lines: Python code that loads the adapter.
    """
    base = str(run.config.get("model", {}).get("base", "unknown"))
    front: dict[str, Any] = {"library_name": "peft"}
    if _HUB_ID.fullmatch(base):
        front["base_model"] = base
    elif not base.startswith("lorica:"):
        base = Path(base).name
    tags = ["lora", "federated-learning", "differential-privacy", "lorica"]
    front["tags"] = [tag for tag in tags if tag != "differential-privacy" or _has_noise(run)]
    reason = not_private(run)
    warning = f"\n> **Not a private release: {inline(reason)}**\n" if reason else ""
    version = run.environment.get("lorica")
    trained_with = "Lorica" if version is None else f"Lorica {inline(version)}"
    start = run.environment.get("start")
    started = f"* Started from: adapter `{code(start['name'])}`, SHA-256 `{code(start['sha256'])}`\n" if start else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {inline(run.name)}
{warning}
A LoRA adapter for `{code(base)}`, trained with {trained_with} on data that never left its owners.

* Method: `{code(run.method)}`
{started}* Test {inline(metric_name(run.metrics))}: {score_text(run)}
* Rounds: {rounds_text(run)}

## How to load it

{fenced(load_lines)}

## Privacy

{_privacy(run)}"""


def _privacy(run: Run) -> str:
    privacy = run.privacy or {}
    if not _has_noise(run):
        clip = f" Gradients were {clipping(run)}." if privacy else ""
        return f"**No privacy guarantee: {inline(not_private(run))}**{clip}\n"
    lines = [f"* {name}: {inline(privacy[key])}" for key, name in PRIVACY_TERMS if privacy.get(key)]
    headings, rows = client_rows(run.clients, GUARANTEE)
    table = markdown_table(headings, [[inline(cell) for cell in row] for row in rows])
    return "\n".join(
        [
            "Each client has its own guarantee, for its own records.",
            "",
            *lines,
            "",
            table,
            " ".join(["ε and δ are rounded up.", left_out_text(len(run.clients))]).strip(),
            "",
            "### Assumptions",
            "",
            *_bullets(privacy.get("assumptions")),
            "",
            "### Not covered",
            "",
            *_bullets(privacy.get("not_covered")),
            "",
        ]
    )


def _has_noise(run: Run) -> bool:
    return bool((run.privacy or {}).get("noise", "none") != "none")


def _bullets(lines: list[str] | None) -> list[str]:
    return [f"* {inline(line)}" for line in lines] if lines else ["* None listed."]
