"""A first draft of an owner's policy, which allows one experiment and nothing else."""

from __future__ import annotations

import math
from typing import Any

import yaml

from lorica.adapters.base_files import hash_of_base
from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.tasks.kind import kind_of

HEADER = """\
# An owner's limits, drafted from the experiment {name!r}: they allow it and nothing else. Copy this file to the
# machine with the data, read and change it there, and name it in the node's --node-config. The server cannot change
# it. All keys: docs/configuration.md of Lorica.
"""


def draft_policy(config: ExperimentConfig) -> str:
    """The text of a policy under which an owner takes part in this experiment.

    `base_models` holds the hash of the experiment's base model if it is on this machine. Otherwise it is empty, so that
    no model is allowed until the owner adds one.
    """
    privacy, federation = config.privacy, config.federation
    lines = [HEADER.format(name=config.name)]

    def add(key: str, value: Any, comment: str = "") -> None:
        flow = yaml.safe_dump(
            {key: value}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
        )
        # Without the braces around it.
        lines.append("".join(f"# {line}\n" for line in comment.splitlines()) + f"{flow.strip()[1:-1]}\n")

    base = _hash(config.model.base)
    epsilon = 8.0 if privacy.epsilon is None else privacy.epsilon
    add("max_epsilon", float(epsilon), "For everything ever released from the data, all runs together.")
    add("delta", privacy.delta, "It must be below 1/records.")
    add(
        "base_models",
        [] if base is None else [base],
        "The output of `lorica hash FOLDER` for each base model that may be used.",
    )
    kind = kind_of(config.task)
    task = {"type": config.task.type} | {key: getattr(config.task, key) for key in kind.columns}
    comment = "What may be learned, and from which columns."
    if config.task.labels is not None:
        task["labels"] = config.task.labels
    elif kind.labels == "classes":
        comment += "\nAdd the names of all labels, such as labels: ['no', 'yes'], so that no server can choose them."
    add("tasks", [task], comment)
    if privacy.noise != "secure":
        add("noise", [privacy.noise], "This kind of noise protects nothing: after such a run no ε holds for the data.")
    if privacy.private:
        add("max_clip_norm", privacy.clip_norm)
    if privacy.unit == "group":
        add("unit", "group")
        add("group", privacy.group)
        add("max_group_records", privacy.group_records)
    add("min_noise_multiplier", min(0.5, privacy.noise_multiplier or 0.5))
    add("max_sampling_rate", 0.5, "The largest probability that a record is in a batch; batch size / records is usual.")
    if federation.private_test:
        metrics = ["loss", *kind.metrics]
        add("metrics", metrics, "What may be measured on the owner's own held-out records; the results stay here.")
    if federation.secure_sum:
        add("sums_only", True)
        add("min_clients_in_sum", min(3, federation.participants))
        lines.append(
            "# The identity key of every owner, as printed by `lorica flower keys DIR`, your own included:\n"
            '# members: {0: "ed25519:… clinic-a", 1: "ed25519:… clinic-b"}\n'
        )
        if privacy.noise_against == "sums":
            lines.append(
                "# This experiment shares the noise among the owners. To allow it, list the members and remove the #:\n"
                f"# noise_against: sums\n# min_colluding: {privacy.colluding}\n"
            )
    return "".join(lines)


def _hash(base: str) -> str | None:
    """The hash of a base model on this machine; None for a hub id or a missing folder."""
    try:
        return hash_of_base(base)
    except UserError:
        return None
