"""Classification: its loss, and how well a model does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.tasks.records import Records


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each example, in nats, computed in fp32 whatever the logits' precision.

    Args:
        logits: (n, labels).
        labels: (n,) int64.

    Returns:
        (n,) float32.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def evaluate(model: Any, records: Records, tokens: int, device: torch.device | str) -> dict[str, float]:
    """Accuracy (a share) and mean cross entropy (nats) of a model over all records, of which there is at least one.

    Every module is in evaluation mode meanwhile and gets its previous mode back, also after an error.

    Args:
        model: called as `model(**batch.inputs).logits`, (n, labels).
        tokens: padded tokens or patches in one forward pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            loss = torch.zeros((), dtype=torch.float64, device=device)
            correct = torch.zeros((), dtype=torch.int64, device=device)
            for batch in records.micro_batches(np.arange(len(records)), tokens):
                batch = batch.to(device)
                logits = model(**batch.inputs).logits
                loss += losses(logits, batch.labels).sum(dtype=torch.float64)
                correct += (logits.argmax(dim=-1) == batch.labels).sum()
    finally:
        for module, training in modes:
            module.training = training
    return {"accuracy": correct.item() / len(records), "loss": loss.item() / len(records)}
