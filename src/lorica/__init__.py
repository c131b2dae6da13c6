"""Federated LoRA fine-tuning under differential privacy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorica.adapters.export import load_adapter
    from lorica.experiment import Experiment
    from lorica.run.result import Result

__all__ = ["Experiment", "Result", "load_adapter"]


def __getattr__(name: str) -> Any:
    # PyTorch and transformers take seconds to import; `lorica --help` needs neither.
    if name in ("Experiment", "Result"):
        from lorica import experiment

        return getattr(experiment, name)
    if name == "load_adapter":
        from lorica.adapters.export import load_adapter

        return load_adapter
    raise AttributeError(f"module 'lorica' has no attribute {name!r}")
