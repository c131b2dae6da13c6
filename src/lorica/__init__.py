"""Federated LoRA fine-tuning under differential privacy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Experiment", "Result", "__version__", "load_adapter"]

_MODULES = {"Experiment": "lorica.experiment", "Result": "lorica.run.result", "load_adapter": "lorica.adapters.export"}

if TYPE_CHECKING:
    from lorica.adapters.export import load_adapter
    from lorica.experiment import Experiment
    from lorica.run.result import Result

    __version__: str
else:
    # Hidden from type checkers, which would take every misspelt name for one of type Any.
    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used (PEP 562): PyTorch and transformers take seconds."""
        if name == "__version__":
            from importlib.metadata import version

            return version("lorica")
        if name in _MODULES:
            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module 'lorica' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
