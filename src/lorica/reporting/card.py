"""The model card of an adapter: description, how to load it, and the privacy statement."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lorica.files import write_atomically
from lorica.markdown import code, inline
from lorica.registry import TASK_KINDS, registered
from lorica.reporting.audit import AUDIT_LINE, audit_line
from lorica.reporting.clients import GUARANTEE, client_rows, left_out_text
from lorica.reporting.run_folder import Run, client_level, clipping, metric_name, not_private, outcome, read_run
from lorica.reporting.tables import PRIVACY_TERMS, markdown_table, rounds_text, score_text
from lorica.tasks.readers import HUB_ID, READERS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_card(run: Run, loading: str) -> str:
    """Markdown with Hugging Face front matter, for `README.md` in the adapter folder.

    A base model that is not a Hugging Face id (a folder, `lorica:...`) appears in the text only, because the hub
    rejects cards with an unknown `base_model`. Only the last part of a folder's path is shown, because cards are
    published.

    Args:
        loading: Markdown that says how to load the adapter.
    """
    base = str(run.config.get("model", {}).get("base", "unknown"))
    if not base.startswith("lorica:") and not _is_hub_id(base):
        base = Path(base).name
    reason = not_private(run)
    warning = f"\n> **Not a private release: {inline(reason)}**\n" if reason else ""
    version = run.environment.get("lorica")
    trained_with = "Lorica" if version is None else f"Lorica {inline(version)}"
    start = run.environment.get("start")
    audited = "" if run.audit is None else f"* {inline(audit_line(run.audit))}\n"
    started = f"* Started from: adapter `{code(start['name'])}`, SHA-256 `{code(start['sha256'])}`\n" if start else ""
    where = " in a simulation with a trusted server" if client_level(run) else " on data that never left its owners"
    return f"""---
{_front_matter(run).to_yaml()}
---

# {inline(run.name)}
{warning}
A LoRA adapter for `{code(base)}`, trained with {trained_with}{where}.

* Method: `{code(run.method)}`
{started}* Test {inline(metric_name(run.metrics))}: {score_text(run)}
* Rounds: {rounds_text(run)}
{audited}
## How to load it

{loading}

## Privacy

{_privacy(run)}"""


def add_audit(folder: Path) -> None:
    """Write the line of the audit into the model cards of a finished run, in place of that of an earlier one.

    Raises:
        UserError: as `read_run`, or the folder is not writable.
    """
    run = read_run(folder)
    for path in sorted((folder / "adapter").rglob("README.md")):
        lines = path.read_text(encoding="utf-8").split("\n")
        kept = [line for line in lines if not line.startswith(f"* {AUDIT_LINE}")]
        place = next(index for index, line in enumerate(kept) if line.startswith("* Rounds: "))
        added = [] if run.audit is None else [f"* {inline(audit_line(run.audit))}"]
        write_atomically(path, "\n".join([*kept[: place + 1], *added, *kept[place + 1 :]]).encode())


def _front_matter(run: Run) -> ModelCardData:
    """What the hub searches by: base model, task, public data sets, result and licence, as far as they are known."""
    base, task = str(run.config.get("model", {}).get("base", "")), run.config.get("task", {})
    kind = registered(TASK_KINDS).get(str(task.get("type")))
    tag = None if kind is None else kind.load().pipeline_tag
    tags = ["lora", "federated-learning", "differential-privacy", "lorica"]
    tests = task.get("test", "")
    names = [str(name) for name in (tests.values() if isinstance(tests, dict) else [tests])]
    result = _result(run, tag, _dataset_id(names[0]) or Path(names[0]).name)
    return ModelCardData(
        library_name="peft",
        base_model=base if _is_hub_id(base) else None,
        license=_license(base),
        pipeline_tag=tag,
        # Of the training data, only its owners know whether it may be named.
        datasets=sorted({found for name in names if (found := _dataset_id(name))}) or None,
        model_name=None if result is None else run.name,
        eval_results=result,
        tags=[name for name in tags if name != "differential-privacy" or _has_noise(run)],
    )


def _result(run: Run, tag: str | None, dataset: str) -> list[EvalResult] | None:
    """The main metric after the last evaluated round; None if a name in it may be more than a name."""
    score = outcome(run.metrics).final
    metric = next((str(row["metric"]) for row in run.metrics if row.get("metric")), "accuracy")
    if score is None or tag is None or not all(map(_NAME.fullmatch, (run.name, dataset, metric))):
        return None
    return [EvalResult(tag, dataset, dataset, metric, round(score, 4))]


def _is_hub_id(base: str) -> bool:
    return bool(_HUB_ID.fullmatch(base)) and not Path(base).exists()


def _dataset_id(source: str) -> str | None:
    """The hub id in a source such as `nyu-mll/glue:sst2[train]`; None for a file, of which only its owner knows."""
    match = HUB_ID.fullmatch(source)
    if match is None or "/" not in match["id"] or Path(source).suffix.lower() in READERS or Path(source).exists():
        return None
    return match["id"]


def _license(base: str) -> str | None:
    """The licence that a local base model's own card names: an adapter is of little use without its base."""
    card = Path(base) / "README.md"
    if not card.is_file():
        return None
    try:
        named = ModelCard.load(card, ignore_metadata_errors=True).data.license
    # Whoever wrote the card may have broken any rule of its format.
    except Exception:
        return None
    return named if isinstance(named, str) else None


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
            "All clients have the same guarantee, for everything that a client has."
            if client_level(run)
            else "Each client has its own guarantee, for its own records.",
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
