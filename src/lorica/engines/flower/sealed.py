"""A SuperNode that runs only Lorica.

Flower sends the code of an app with its messages, and a SuperNode installs and imports it with the rights of its
account. Anyone who can start a run on the SuperLink could therefore bypass the policy and read the owner's data. This
node runs the `ClientApp` of the owner's own Lorica installation instead, and never unpacks the code that it receives.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from lorica.adapters.base_files import hash_of_base
from lorica.engines.flower.processes import environment
from lorica.engines.flower.status import note_start
from lorica.errors import UserError
from lorica.files import home_folder, write_atomically
from lorica.owner.identity import read_identity
from lorica.owner.settings import NodeSettings
from lorica.privacy.policy import load_policy

NODE_CONFIG = "--node-config"
RUN_CLIENT_APP = "from lorica.engines.flower.sealed import answer\n\nanswer()\n"
REFUSE = 'raise SystemExit("this node runs only Lorica")\n'


def become_node(arguments: Sequence[str]) -> NoReturn:
    """Replace this process with `flower-supernode`, set up to run Lorica's commands instead of Flower's.

    Args:
        arguments: command-line arguments of `flower-supernode`.

    Raises:
        UserError: Flower is not installed, an argument allows apps to install packages, or the node's settings, policy,
            data or base model cannot be used.
    """
    around = environment()
    settings = check_settings(arguments)
    from flwr.supercore.constant import SUPERLINK_DEFAULT_CLIENT_ADDRESS, TASK_TYPE_TO_COMMAND, TaskType

    refused = "--allow-runtime-dependency-installation"
    if any(refused.startswith(given) for given in arguments if given[:3] == "--a"):
        raise UserError("node", refused, "apps could install packages on this machine", "remove this option")
    commands = home_folder().absolute() / "flower-commands"
    for task, name in TASK_TYPE_TO_COMMAND.items():
        script = f"#!{sys.executable}\n{RUN_CLIENT_APP if task == TaskType.CLIENT_APP else REFUSE}"
        write_atomically(commands / name, script.encode())
        (commands / name).chmod(0o755)
    around["PATH"] = os.pathsep.join([str(commands), around["PATH"]])
    program = shutil.which("flower-supernode", path=around["PATH"])
    assert program is not None
    note_start(settings, option(arguments, "--superlink") or SUPERLINK_DEFAULT_CLIENT_ADDRESS)
    os.execve(program, ["flower-supernode", *arguments], around)


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of a command-line option; None if it is not given."""
    values = [value for given, value in pairwise(arguments) if given == name]
    values += [given.partition("=")[2] for given in arguments if given.startswith(f"{name}=")]
    return values[-1] if values else None


def check_settings(arguments: Sequence[str]) -> NodeSettings:
    """Read `--node-config` and check what it names, so that its owner sees a mistake before the server asks.

    Raises:
        UserError: names the key, its value and the remedy.
    """
    from flwr.common.config import parse_config_args

    line = option(arguments, NODE_CONFIG)
    if line is None:
        raise UserError(NODE_CONFIG, None, "required", 'add --node-config \'client=0 data="…" policy="…"\'')
    try:
        given = parse_config_args([line])
    except Exception:
        remedy = "write key=value pairs separated by spaces, and put texts in double quotes"
        raise UserError(NODE_CONFIG, line, "not readable", remedy) from None
    settings = NodeSettings.of(given)
    if settings.data is not None and not Path(settings.data).expanduser().exists():
        raise UserError("node-config.data", settings.data, "no such file or folder", "set data to an existing path")
    if settings.data is not None and settings.policy is None:
        raise UserError("node-config.policy", None, "required with data", "add policy=PATH to --node-config")
    policy = None if settings.policy is None else load_policy(Path(settings.policy).expanduser())
    if settings.identity is not None:
        read_identity(Path(settings.identity).expanduser())
    if settings.base is not None:
        found = hash_of_base(settings.base)
        if policy is not None and policy.base_models is not None and found not in policy.base_models:
            remedy = f"add {found} to base_models in the policy, or set base to another folder"
            raise UserError("node-config.base", settings.base, "the policy does not allow this model", remedy)
    return settings


def answer() -> None:
    """Run Flower's `flwr-clientapp` for one message, with Lorica's `ClientApp` instead of the one received."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    from lorica.engines.flower.client import app

    replaced = {"install_from_fab": lambda *_, **__: None, "get_load_client_app_fn": lambda **_: lambda *_: app}
    for name, function in replaced.items():
        # If a version of Flower moved one of these, it would run the code it received.
        if not hasattr(run_clientapp, name):
            raise SystemExit(f"unsupported version of Flower: run_clientapp has no {name}")
        setattr(run_clientapp, name, function)
    flwr_clientapp()
