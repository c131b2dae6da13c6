"""How to load an adapter, as the section of its model card: the lines differ by kind of task and base model."""

from __future__ import annotations

import json
from pathlib import Path

from lorica.adapters.base_files import EMBEDDED, resolve_base
from lorica.adapters.export import Export
from lorica.markdown import code, fenced
from lorica.pretrained import from_pretrained
from lorica.tasks.kind import TaskKind, kind_of

HEADING = "How to load it"
# Longer lists of labels are left to `lorica.json`.
MOST_NAMES = 10


def loading_section(export: Export, folder: str) -> str:
    """Markdown with the lines for Lorica and, where PEFT alone gives the same model, for PEFT.

    Args:
        folder: the adapter, as the lines call it.
    """
    kind = kind_of(export.task)
    shown = "image.png" if "image" in kind.columns else " ".join(f'"{name} …"' for name in kind.input_keys())
    with_lorica = f'import lorica\n\nmodel = lorica.load_adapter("{folder}")'
    parts = [
        "With Lorica, as a model of transformers with the adapter merged into its weights:",
        fenced(with_lorica),
        f"`lorica predict {folder} {code(shown)}` predicts on the command line.",
    ]
    if export.model.pooling == "mean":
        parts.append(
            "The model puts a head on the mean of the hidden states, which no model of transformers does: PEFT alone "
            f"refuses the adapter. `lorica export {folder} DIR --merge` writes a whole model for transformers."
        )
    else:
        parts += ["With PEFT:", fenced(_peft_lines(export, kind, folder))]
    return "\n\n".join(parts)


def _peft_lines(export: Export, kind: TaskKind, folder: str) -> str:
    base = export.model.base
    imports = ["from peft import PeftModel", f"from transformers import {kind.model_class}"]
    name = json.dumps(base)
    if base.startswith(EMBEDDED):
        imports.insert(0, "from lorica.adapters.base_files import resolve_base")
        name = f"resolve_base({json.dumps(base)})"
    elif Path(resolve_base(base)).is_dir():
        # Cards are published, so they do not show where the model was.
        name = json.dumps(Path(resolve_base(base)).absolute().name, ensure_ascii=False)
    names = export.label_names
    labels = f"num_labels={len(names)}" if len(names) > MOST_NAMES else f"id2label={dict(enumerate(names))!r}"
    # The checkpoint's own head may be for other labels; the adapter contains the right one.
    options = f", {labels}, ignore_mismatched_sizes=True" if names else ""
    lines = [f"base = {kind.model_class}.from_pretrained({name}{options})"]
    if kind.peft_task == "SEQ_CLS" and _pads_otherwise(export):
        imports[-1] += ", AutoTokenizer"
        lines.append(f'base.config.pad_token_id = AutoTokenizer.from_pretrained("{folder}").pad_token_id')
    lines.append(f'model = PeftModel.from_pretrained(base, "{folder}").eval()')
    return "\n".join([*imports, "", *lines])


def _pads_otherwise(export: Export) -> bool:
    """Whether the base's configuration names no padding, or another one than its tokenizer: classifiers of decoders
    read the last token that is not padding.
    """
    from transformers import AutoConfig

    base = resolve_base(export.model.base)
    config = from_pretrained(AutoConfig.from_pretrained, base, "its configuration", "give a model folder or a hub id")
    tokenizer = kind_of(export.task).processor(base)
    return bool(config.get_text_config().pad_token_id != tokenizer.pad_token_id)
