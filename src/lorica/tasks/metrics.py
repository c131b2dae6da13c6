"""Metrics of predictions: those that GLUE reports, as shares or correlations (1 is perfect)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of equal entries."""
    return float(np.mean(labels == predicted))


def f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """F1 of label 1, as GLUE has it for MRPC and QQP; 0 where label 1 neither occurs nor is predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels == 1, predicted == 1, zero_division=0))


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of the F1 of every label that occurs or is predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro", zero_division=0))


def matthews(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews' correlation, GLUE's metric for CoLA; 0 where either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def pearson(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation, for STS-B; 0 where either side is constant."""
    from scipy import stats

    return _correlation(stats.pearsonr, labels, predicted)


def spearman(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Spearman's rank correlation, for STS-B; 0 where either side is constant."""
    from scipy import stats

    return _correlation(stats.spearmanr, labels, predicted)


Metric = Callable[[np.ndarray, np.ndarray], float]

OF_CLASSES: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "macro_f1": macro_f1, "matthews": matthews}
OF_NUMBERS: dict[str, Metric] = {"pearson": pearson, "spearman": spearman}


def _correlation(function: Callable[..., tuple[float, float]], labels: np.ndarray, predicted: np.ndarray) -> float:
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float(function(labels, predicted)[0])
