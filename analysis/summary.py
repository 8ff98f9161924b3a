"""The metrics of a set of predictions with their intervals, as a report holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from analysis import significance, statistics
from analysis.statistics import Estimate
from training import metrics
from training.metrics import Predictions

PAIR_METRICS = ("pair_accuracy", "mean_difference", "separation", "contrast")


def arrays(predictions: Predictions) -> tuple[Any, Any, Any]:
    """Label, logit and seed index (slices,), as the functions of statistics.py take them."""
    return predictions.label, predictions.logit, predictions.seed_index


def slice_metrics(predictions: Predictions) -> dict[str, Estimate]:
    """Every metric of the slices."""
    return statistics.slice_estimates(*arrays(predictions))


def cube_metrics(predictions: Predictions) -> dict[str, Estimate]:
    """The metrics of cubes and pairs by the mean logits of their slices."""
    return statistics.cube_estimates(predictions.cube_logits)


def headline(predictions: Predictions) -> dict[str, Estimate]:
    """Accuracy and AUC of slices, AUC of cubes: enough to compare sets of predictions."""
    cubes = statistics.cube_wins(predictions.cube_logits)
    return statistics.headline_estimates(*arrays(predictions)) | {"cube_auc": statistics.auc_estimate(cubes)}


def at_threshold(predictions: Predictions, threshold: float) -> dict[str, float | Estimate]:
    """Accuracy of slices and of cubes, by their mean logit, at a `threshold` of the logit other than 0."""
    shifted = predictions.with_logits(predictions.logit - threshold)
    return {
        "threshold": threshold,
        "accuracy": slice_metrics(shifted)["accuracy"],
        "cube_accuracy": cube_metrics(shifted)["cube_accuracy"],
    }


def difference(network: Predictions, baseline: Predictions) -> dict[str, Estimate]:
    """Metrics of the network minus those of a baseline on the same slices, with paired intervals."""
    label, logit, index = arrays(network)
    return statistics.slice_difference(label, logit, baseline.logit, index) | statistics.cube_difference(
        network.cube_logits, baseline.cube_logits
    )


def curves(predictions: Predictions) -> dict[str, Any]:
    """ROC curve with its pointwise 95 % band over seeds, and precision-recall curve."""
    fpr = np.linspace(0, 1, 201)
    tpr, low, high = statistics.roc_band(*arrays(predictions), fpr)
    order = np.argsort(-predictions.logit, kind="stable")
    last = np.flatnonzero(np.diff(predictions.logit[order], append=np.nan) != 0)  # of each distinct logit
    true = np.cumsum(predictions.label[order])[last]
    return {
        "fpr": fpr,
        "tpr": tpr,
        "low": low,
        "high": high,
        "recall": true / true[-1],
        "precision": true / (last + 1),
        "auc": metrics.auc(predictions),
        "average_precision": float(average_precision_score(predictions.label, predictions.logit)),
        "balance": float(predictions.label.mean()),
    }


def summarize(predictions: Predictions) -> dict[str, Any]:
    """Every metric of slices, cubes and pairs of twins, and whether they exceed chance."""
    balance = float(predictions.label.mean())
    axes = {int(axis): predictions.where(predictions.axis == axis) for axis in np.unique(predictions.axis)}
    cubes = cube_metrics(predictions)
    wins = statistics.mann_whitney(*arrays(predictions))
    return {
        "chance": {
            "balance": balance,
            "accuracy": max(balance, 1 - balance),
            "auc": 0.5,
            "average_precision": balance,
            "log_loss": float(np.log(2)),
            "brier_score": 0.25,
            "cube_accuracy": 0.5,
            "cube_auc": 0.5,
            "pair_accuracy": 0.5,
        },
        "slices": slice_metrics(predictions),
        "axes": {axis: slice_metrics(part) for axis, part in axes.items()},
        "cubes": {key: estimate for key, estimate in cubes.items() if key not in PAIR_METRICS},
        "pairs": {key: cubes[key] for key in PAIR_METRICS if key in cubes},
        "confusion": predictions.confusion,
        "reliability": statistics.reliability(*arrays(predictions)),
        "significance": {
            "p_value": significance.swap_p_value(wins),
            "relabellings": len(significance.relabellings(len(predictions.seeds))),
            "mcnemar_p_value": statistics.mcnemar_p_value(predictions.cube_logits),
        },
    }
