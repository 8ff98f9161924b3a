"""How well a network tells the gravities apart, with errors that respect how the slices were made.

The slices of one simulation share its initial conditions, so they are not independent; the seeds are. Every
95 % interval therefore comes from a bootstrap that draws whole seeds, both twins with all their slices,
with replacement (a cluster bootstrap: Field & Welsh 2007, J. R. Stat. Soc. B 69, 369). Those of shares of
cubes and of twins are exact binomial ones, with one trial per seed.

Values are computed by scikit-learn (the calibration error by torchmetrics, the log loss by torch). The
resampled ones come from sums per seed, which is exact for everything that is a mean or a ratio of means;
the resampled areas under curves are taken on at most THRESHOLDS thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta, binomtest
from sklearn import metrics as sk
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_calibration_error

from metrics import Predictions

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Estimate = dict[str, float]  # value, low, high: the value and the ends of its 95 % interval

RESAMPLES = 1000
THRESHOLDS = 1024
CALIBRATION_BINS = 15
LEVEL = 0.95
CUBE_CHANCE = ("cube_accuracy", "cube_auc", "pair_accuracy")  # twins come in pairs: chance is one half


class SeedBootstrap:
    """Resamples of a set of seeds: how often each of them was drawn, (resamples, seeds)."""

    def __init__(self, seeds: Integers, resamples: int = RESAMPLES) -> None:
        self.seeds = seeds
        rng = np.random.default_rng(20240229)  # fixed: the same predictions always give the same report
        equal = np.full(len(seeds), 1 / len(seeds))
        self.draws = rng.multinomial(len(seeds), equal, size=resamples).astype(np.float64)

    def per_seed(self, slices: Predictions, values: NDArray[Any]) -> Floats:
        """Sums of `values` (slices,) over the slices of each seed; the slices must hold all seeds."""
        return np.bincount(slices.seed_index, values, len(self.seeds)).astype(np.float64)

    def ratio(self, above: Floats, below: Floats) -> Floats:
        """Resampled ratio of two quantities given as sums per seed; NaN where there is nothing to divide."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.draws @ above) / (self.draws @ below)

    def interval(self, resampled: Floats) -> tuple[float, float]:
        """The percentile interval; NaN with one seed, whose spread nobody knows."""
        if len(self.seeds) < 2 or np.isnan(resampled).all():
            return float("nan"), float("nan")
        low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def estimate(self, value: float, resampled: Floats) -> Estimate:
        """A value with the interval of its resamples, moved so that their mean is the value.

        A seed that is drawn twice is compared with its own twin more often than it should be, so resampled
        areas under curves are too large on average; resampled calibration errors are too.
        """
        if not np.isnan(resampled).all():
            resampled = resampled - np.nanmean(resampled) + value
        low, high = self.interval(resampled)
        return {"value": float(value), "low": low, "high": high}


@dataclass(frozen=True)
class Curves:
    """Rates of a classifier over all thresholds, with the resamples of each: (resamples, thresholds)."""

    tpr: Floats
    fpr: Floats
    precision: Floats

    @classmethod
    def of(cls, slices: Predictions, bootstrap: SeedBootstrap) -> Curves:
        """The resampled curves, on thresholds at quantiles of the logits."""
        thresholds = np.unique(slices.logit)[::-1]
        if len(thresholds) > THRESHOLDS:
            thresholds = np.unique(np.quantile(slices.logit, np.linspace(0, 1, THRESHOLDS), method="lower"))[
                ::-1
            ]
        bins = len(thresholds) - np.searchsorted(thresholds[::-1], slices.logit, "right")
        place = slices.seed_index * len(thresholds) + bins
        shape = (len(bootstrap.seeds), len(thresholds))
        counts = [
            np.bincount(place[slices.label == label], minlength=shape[0] * shape[1]).reshape(shape)
            for label in (0, 1)
        ]
        false, true = (bootstrap.draws @ np.cumsum(count, axis=1) for count in counts)
        with np.errstate(invalid="ignore"):
            return cls(true / true[:, -1:], false / false[:, -1:], true / (true + false))

    @property
    def auc(self) -> Floats:
        """Area under each ROC curve."""
        zero = np.zeros((len(self.tpr), 1))
        return np.trapezoid(np.hstack([zero, self.tpr]), np.hstack([zero, self.fpr]), axis=1)

    @property
    def average_precision(self) -> Floats:
        """Mean precision over recall, without interpolation."""
        return np.nansum(np.diff(self.tpr, prepend=0, axis=1) * self.precision, axis=1)

    def band(self, fpr: Floats) -> tuple[Floats, Floats]:
        """The ends of the interval of the true positive rate at each of these false positive rates."""
        rates = [
            np.interp(fpr, np.append(0, x), np.append(0, y)) for x, y in zip(self.fpr, self.tpr, strict=True)
        ]
        low, high = np.nanquantile(rates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return low, high


def curves(slices: Predictions, bootstrap: SeedBootstrap) -> dict[str, Any]:
    """The ROC and the precision-recall curve, the band of the first, and what chance would give."""
    fpr, tpr, _ = sk.roc_curve(slices.label, slices.logit)
    precision, recall, _ = sk.precision_recall_curve(slices.label, slices.logit)
    grid = np.linspace(0, 1, 201)
    low, high = Curves.of(slices, bootstrap).band(grid)
    return {
        "fpr": fpr,
        "tpr": tpr,
        "auc": float(sk.auc(fpr, tpr)),
        "precision": precision,
        "recall": recall,
        "average_precision": float(sk.average_precision_score(slices.label, slices.logit)),
        "grid": grid,
        "low": low,
        "high": high,
        "share": float(slices.label.mean()),
    }


# name -> (sums per slice of the numerator, of the denominator): every metric that is a ratio of sums. A slice
# said to be GR is one with a positive logit.
Terms = Callable[[Predictions], tuple[NDArray[Any], NDArray[Any]]]
RATIOS: dict[str, Terms] = {
    "accuracy": lambda s: ((s.logit > 0) == (s.label == 1), np.ones(len(s))),
    "precision": lambda s: ((s.logit > 0) & (s.label == 1), s.logit > 0),
    "recall": lambda s: ((s.logit > 0) & (s.label == 1), s.label == 1),
    "f1": lambda s: (2 * ((s.logit > 0) & (s.label == 1)), (s.logit > 0).astype(int) + (s.label == 1)),
    "tpr": lambda s: ((s.logit > 0) & (s.label == 1), s.label == 1),
    "fpr": lambda s: ((s.logit > 0) & (s.label == 0), s.label == 0),
    "log_loss": lambda s: (np.logaddexp(0, s.logit) - s.label * s.logit, np.ones(len(s))),
    "brier_score": lambda s: ((s.probability - s.label) ** 2, np.ones(len(s))),
}


def values(slices: Predictions) -> dict[str, float]:
    """Every number of a set of slices, by scikit-learn and torchmetrics."""
    said, true, logits = slices.logit > 0, slices.label, slices.logit
    # scikit-learn's log loss takes probabilities, which saturate beyond logits of 36; torch's takes logits
    log_loss = binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(true).double())
    # a probability of exactly 1 would get a bin of its own
    probability = np.minimum(slices.probability, np.nextafter(1, 0))
    return {
        "accuracy": float(sk.accuracy_score(true, said)),
        "precision": float(sk.precision_score(true, said, zero_division=0)),
        "recall": float(sk.recall_score(true, said)),
        "f1": float(sk.f1_score(true, said, zero_division=0)),
        "tpr": float(sk.recall_score(true, said)),
        "fpr": 1 - float(sk.recall_score(true, said, pos_label=0)),
        "auc": float(sk.roc_auc_score(true, logits)),
        "average_precision": float(sk.average_precision_score(true, logits)),
        "log_loss": float(log_loss),
        "brier_score": float(sk.brier_score_loss(true, probability)),
        "calibration_error": float(
            binary_calibration_error(
                torch.from_numpy(probability), torch.from_numpy(true), n_bins=CALIBRATION_BINS, norm="l1"
            )
        ),
    }


def slice_estimates(slices: Predictions, bootstrap: SeedBootstrap) -> dict[str, Estimate]:
    """Every number of the slices with its interval."""
    estimates = {}
    curves = Curves.of(slices, bootstrap)
    resampled = {"auc": curves.auc, "average_precision": curves.average_precision}
    resampled["calibration_error"] = _calibration_error(slices, bootstrap)
    for name, terms in RATIOS.items():
        above, below = (bootstrap.per_seed(slices, part) for part in terms(slices))
        resampled[name] = bootstrap.ratio(above, below)
    for name, value in values(slices).items():
        estimates[name] = bootstrap.estimate(value, resampled[name])
    return estimates


def _calibration_bin(slices: Predictions) -> Integers:
    return np.clip((slices.probability * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)


def _calibration_error(slices: Predictions, bootstrap: SeedBootstrap) -> Floats:
    """Resampled expected calibration error: mean |stated probability - share of GR| over bins."""
    bins, gap = _calibration_bin(slices), slices.probability - slices.label
    sums = [bootstrap.draws @ bootstrap.per_seed(slices, gap * (bins == b)) for b in range(CALIBRATION_BINS)]
    return np.abs(sums).sum(0) / (bootstrap.draws @ bootstrap.per_seed(slices, np.ones(len(slices))))


def verdicts(slices: Predictions, bootstrap: SeedBootstrap) -> dict[str, Estimate]:
    """Accuracy and AUC of slices, share of pairs ranked correctly: enough to compare sets of slices."""
    correct, count = (bootstrap.per_seed(slices, part) for part in RATIOS["accuracy"](slices))
    newton, gr = slices.cube_logits.T
    area = float(sk.roc_auc_score(slices.label, slices.logit))
    return {
        "accuracy": bootstrap.estimate(float(correct.sum() / count.sum()), bootstrap.ratio(correct, count)),
        "auc": bootstrap.estimate(area, Curves.of(slices, bootstrap).auc),
        "pair_accuracy": _exact(int(np.sum(gr > newton)), len(gr)),
    }


def _exact(right: float, trials: int) -> Estimate:
    """A share with its exact binomial interval (Clopper & Pearson 1934), honest also if all are right."""
    tail = (1 - LEVEL) / 2
    low = float(beta.ppf(tail, right, trials - right + 1)) if right else 0.0
    high = float(beta.ppf(1 - tail, right + 1, trials - right)) if right < trials else 1.0
    return {"value": right / trials, "low": low, "high": high}


def reliability(slices: Predictions, bootstrap: SeedBootstrap) -> list[dict[str, float]]:
    """Of bins of stated probability with about equally many slices: mean probability, share of GR, slices."""
    edges = np.quantile(slices.probability, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1])
    bins, rows = np.searchsorted(edges, slices.probability, "right"), []
    for b in np.unique(bins):
        inside = bins == b
        share = bootstrap.ratio(
            bootstrap.per_seed(slices, inside * slices.label), bootstrap.per_seed(slices, inside)
        )
        estimate = bootstrap.estimate(float(slices.label[inside].mean()), share)
        rows.append(
            {"probability": float(slices.probability[inside].mean()), **estimate, "slices": int(inside.sum())}
        )
    return rows


def confusion(slices: Predictions) -> dict[str, int]:
    """Counts at the threshold logit > 0; GR is the positive class."""
    tn, fp, fn, tp = sk.confusion_matrix(slices.label, slices.logit > 0, labels=[0, 1]).ravel()
    return {"tp": int(tp), "tn": int(tn), "fp": int(fp), "fn": int(fn)}


def cube_estimates(cube_logits: Floats, bootstrap: SeedBootstrap) -> dict[str, Estimate]:
    """Accuracy and AUC of cubes by their logits (seeds, 2), Newton first, and the pairs ranked correctly.

    Pairs are independent of each other, so their interval is the exact binomial one; that of the cubes is
    the same as if twins always stood or fell together. `separation` is the mean difference of twins over
    the scatter (standard deviation) of the differences, `contrast` the same difference over the scatter
    between simulations of one gravity.
    """
    newton, gr = cube_logits.T
    right = (gr > 0).astype(float) + (newton <= 0)
    ordered = int(np.sum(gr > newton))
    labels = np.tile([0, 1], len(gr))
    ones = np.ones(len(gr))
    above = np.sign(gr[:, None] - newton[None, :]) / 2 + 0.5  # (GR seed, Newtonian seed)
    areas = np.einsum("bi,ij,bj->b", bootstrap.draws, above, bootstrap.draws) / len(gr) ** 2
    estimates = {
        "cube_accuracy": _exact(float(right.sum() / 2), len(gr)),
        "cube_auc": bootstrap.estimate(float(sk.roc_auc_score(labels, cube_logits.ravel())), areas),
        "pair_accuracy": _exact(ordered, len(gr)),
        "pair_p_value": {"value": float(binomtest(ordered, len(gr), 0.5, "greater").pvalue)},
        "mean_difference": bootstrap.estimate(
            float(np.mean(gr - newton)), bootstrap.ratio(gr - newton, ones)
        ),
    }
    if len(gr) > 1:
        spread = np.sqrt((newton.var(ddof=1) + gr.var(ddof=1)) / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            estimates["separation"] = {"value": float(np.mean(gr - newton) / np.std(gr - newton, ddof=1))}
            estimates["contrast"] = {"value": float(np.mean(gr - newton) / spread)}
    return estimates


def difference(first: Predictions, second: Predictions, bootstrap: SeedBootstrap) -> dict[str, Estimate]:
    """What `first` has over `second` on the same slices, resampled together: accuracy, AUC, cube accuracy."""
    ones = np.ones(len(bootstrap.seeds))
    correct = [bootstrap.per_seed(s, (s.logit > 0) == (s.label == 1)) for s in (first, second)]
    count = bootstrap.per_seed(first, np.ones(len(first)))
    areas = [Curves.of(s, bootstrap).auc for s in (first, second)]
    cubes = [((s.cube_logits > 0) == [False, True]).mean(1) for s in (first, second)]
    accuracy = (correct[0].sum() - correct[1].sum()) / count.sum()
    auc = float(sk.roc_auc_score(first.label, first.logit) - sk.roc_auc_score(second.label, second.logit))
    return {
        "accuracy": bootstrap.estimate(accuracy, bootstrap.ratio(correct[0] - correct[1], count)),
        "auc": bootstrap.estimate(auc, areas[0] - areas[1]),
        "cube_accuracy": bootstrap.estimate(
            float(np.mean(cubes[0] - cubes[1])), bootstrap.ratio(cubes[0] - cubes[1], ones)
        ),
    }


def summary(slices: Predictions, bootstrap: SeedBootstrap) -> dict[str, Any]:
    """Every number of the slices and their cubes, as the report holds them."""
    balance = float(slices.label.mean())
    frequent = max(balance, 1 - balance)
    by_chance = {"auc": 0.5, "average_precision": balance, "log_loss": float(np.log(2)), "brier_score": 0.25}
    axes = {int(axis): slices.where(slices.axis == axis) for axis in np.unique(slices.axis)}
    return {
        "chance": {"balance": balance, "accuracy": frequent, **by_chance, **dict.fromkeys(CUBE_CHANCE, 0.5)},
        "slices": slice_estimates(slices, bootstrap),
        "axes": {axis: slice_estimates(some, bootstrap) for axis, some in axes.items()},
        "cubes": cube_estimates(slices.cube_logits, bootstrap),
        "confusion": confusion(slices),
        "reliability": reliability(slices, bootstrap),
    }
