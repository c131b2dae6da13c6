"""Create a package for a new method: its class, entry point, tests and README."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorica.errors import UserError
from lorica.files import write_atomically
from lorica.paths import user_path
from lorica.registry import METHODS, registered

TEMPLATES = Path(__file__).parent / "method"
LONGEST_NAME = 40


def write_package(name: str, folder: Path) -> Path:
    """Create the package `folder/lorica-NAME` with a working method, and return its path.

    Args:
        name: the value of `method.name`.
        folder: created if needed.

    Raises:
        UserError: an invalid or existing name, or the package's folder exists (in these cases nothing is written); or
            a file cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST_NAME:
        problem = f"not lower-case words joined by dashes, of at most {LONGEST_NAME} characters"
        raise UserError("NAME", name, problem, "write it as my-lora")
    if name in registered(METHODS):
        raise UserError(
            "NAME", name, "a method of this name is installed", "choose a name that `lorica methods` does not list"
        )
    package = user_path("--folder", folder) / f"lorica-{name}"
    if os.path.lexists(package):
        raise UserError("--folder", str(folder), f"{package} exists", "choose another folder or another name")
    for path, content in _files(name).items():
        write_atomically(package / path, content.encode())
    return package


def class_name(name: str) -> str:
    """`my-lora` -> `MyLoRA`, `fed-avg2` -> `FedAvg2LoRA`: with "LoRA" in it, no name is a keyword or an import."""
    words = "".join(word.capitalize() for word in name.split("-")).replace("Lora", "LoRA")
    return words if "LoRA" in words else f"{words}LoRA"


def _files(name: str) -> dict[str, str]:
    """Path within the package -> content."""
    package = f"lorica_{name.replace('-', '_')}"
    values = {"name": name, "package": package, "class_name": class_name(name), "version": version("lorica")}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    return {
        path.removesuffix(".j2").replace("/package/", f"/{package}/"): environment.get_template(path).render(values)
        for path in environment.list_templates(extensions=["j2"])
    }
