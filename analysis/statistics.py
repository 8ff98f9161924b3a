"""Estimates with 95 % intervals for classifiers of slices.

Slices of one seed share its initial conditions, and so do twins: only seeds are independent. Every interval
comes from the scatter between seeds.

Smooth statistics use the delete-one-seed jackknife (Arvesen 1969, Ann. Math. Stat. 40, 2076) and a t quantile
with seeds - 1 degrees of freedom. For a mean over seeds this is the ordinary t interval. Areas under ROC curves
count only pairs of slices (or cubes) from different seeds, the independent ones, as in Obuchowski 1997
(Biometrics 53, 567).

Intervals of rates and of differences of rates are Wilson score intervals (Wilson 1927, J. Am. Stat. Assoc. 22,
209) with an effective number of trials, chosen to reproduce the jackknife variance. They agree with intervals
on the logit scale where both exist (Kott 2017, Survey Methodology 43), stay inside the range, and exist at its
ends too. Franco et al. 2019 (J. Surv. Stat. Methodol. 7, 334) recommend them for clustered data. Positive
numbers use the log scale.

An interval describes the variation over other test seeds, not over other trainings. With fewer than MIN_SEEDS
seeds, or where the statistic is undefined without one of the seeds, `low` and `high` are None.
`benchmarks/coverage.py` measures how often the intervals contain the true value.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binomtest, norm, t

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LEVEL = 0.95
MIN_SEEDS = 3
CALIBRATION_BINS = 15

Scale = Literal["rate", "difference", "positive", "real"]
"""Range of a statistic: [0, 1], [-1, 1], above 0, or unbounded."""


class Estimate(TypedDict):
    """A value and the ends of its 95 % interval, None where the interval is undefined."""

    value: float
    low: float | None
    high: float | None


# Intervals


def wilson(rate: Floats, trials: Floats, quantile: float) -> tuple[Floats, Floats]:
    """The score interval of a rate in [0, 1] from a (possibly effective) number of trials."""
    shrink = 1 / (1 + quantile**2 / trials)
    centre = (rate + quantile**2 / (2 * trials)) * shrink
    half = quantile * shrink * np.sqrt(rate * (1 - rate) / trials + quantile**2 / (4 * trials**2))
    # At a rate of 0 or 1, centre and half width cancel, or add up to 1, only up to rounding.
    low = np.where(rate > 0, centre - half, 0.0)
    return np.maximum(low, 0.0), np.where(rate < 1, np.minimum(centre + half, 1.0), 1.0)


def interval(
    value: Floats, leave_one_out: Floats, scale: Scale, trials_per_seed: float = 1
) -> tuple[Floats, Floats]:
    """Ends of the jackknife interval: arrays of the shape of `value`.

    `leave_one_out` (seeds, ...) is the statistic without each seed. At the ends of the range the jackknife
    variance is zero; there each seed counts as `trials_per_seed` independent trials.
    """
    seeds = len(leave_one_out)
    quantile = float(t.ppf((1 + LEVEL) / 2, seeds - 1))
    variance = (seeds - 1) / seeds * np.sum((leave_one_out - leave_one_out.mean(0)) ** 2, axis=0)
    variance = np.where(np.ptp(leave_one_out, axis=0) > 0, variance, 0.0)  # the mean of equal numbers rounds
    if scale == "real":
        half = quantile * np.sqrt(variance)
        return value - half, value + half
    with np.errstate(divide="ignore", invalid="ignore"):
        if scale == "positive":
            ratio = np.exp(np.where(variance > 0, quantile * np.sqrt(variance) / value, 0.0))
            return value / ratio, value * ratio
        start, width = (0, 1) if scale == "rate" else (-1, 2)
        rate = (value - start) / width
        trials = np.where(
            (rate > 0) & (rate < 1), rate * (1 - rate) * width**2 / variance, trials_per_seed * seeds
        )
    low, high = wilson(rate, np.where(np.isinf(trials), 1.0, trials), quantile)
    exact = np.isinf(trials)  # all seeds agree exactly, for example on a constant network
    return (
        start + width * np.where(exact, rate, low),
        start + width * np.where(exact, rate, high),
    )


def jackknife(
    value: float, leave_one_out: Floats, scale: Scale = "rate", trials_per_seed: float = 1
) -> Estimate:
    """A statistic of all seeds with its interval; `leave_one_out` (seeds,) is the statistic without each."""
    if len(leave_one_out) < MIN_SEEDS or not np.isfinite(leave_one_out).all():
        return {"value": float(value), "low": None, "high": None}
    low, high = interval(np.asarray(value, dtype=np.float64), leave_one_out, scale, trials_per_seed)
    return {"value": float(value), "low": float(low), "high": float(high)}


def ratio_estimate(above: Floats, below: Floats, scale: Scale = "rate") -> Estimate:
    """sum(above) / sum(below) with its jackknife interval, from sums per seed (seeds,).

    The value is 0 where the denominator is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        leave_one_out = (above.sum() - above) / (below.sum() - below)
    return jackknife(above.sum() / below.sum() if below.sum() else 0.0, leave_one_out, scale)


def mean_estimate(values: Floats, scale: Scale = "real") -> Estimate:
    """Mean over seeds of one number per seed (seeds,), with the t interval."""
    return ratio_estimate(np.asarray(values, dtype=np.float64), np.ones(len(values)), scale)


def score_estimate(scores: Floats, scale: Scale = "rate") -> Estimate:
    """Mean of one bounded score with few possible values per seed (seeds,), with a score interval.

    A Wilson interval whose effective number of trials is seeds over the design effect. The design effect is
    the variance of the scores over that of a binary score of the same mean, both with half a seed added at each
    end of the range: without it the interval collapses when all seeds have the same score. Binary scores have a
    design effect of 1.
    """
    seeds = len(scores)
    value = float(np.mean(scores))
    if seeds < MIN_SEEDS:
        return {"value": value, "low": None, "high": None}
    start, width = (0, 1) if scale == "rate" else (-1, 2)
    rates = (np.asarray(scores) - start) / width
    mean = (rates.sum() + 0.5) / (seeds + 1)
    variance = (np.sum((rates - mean) ** 2) + 0.5 * mean**2 + 0.5 * (1 - mean) ** 2) / (seeds + 1)
    trials = np.asarray(seeds * mean * (1 - mean) / variance)
    low, high = wilson(np.asarray(rates.mean()), trials, float(norm.ppf((1 + LEVEL) / 2)))
    return {"value": value, "low": start + width * float(low), "high": start + width * float(high)}


# Areas under ROC curves


def mann_whitney(label: Integers, logit: Floats, seed_index: Integers) -> Floats:
    """Mann-Whitney counts between the slices of all cubes: (2 seeds, 2 seeds), Newton of all seeds first.

    Entry (a, b) is the number of pairs of a slice of cube a and one of cube b in which the first has the higher
    logit; ties count one half. `label` (1 = GR), `logit` and `seed_index` (0 to seeds - 1) are (slices,).
    """
    seeds = int(seed_index.max()) + 1
    order = np.argsort(logit, kind="stable")
    cube, ordered = (label * seeds + seed_index)[order], logit[order]
    first = np.flatnonzero(np.diff(ordered, prepend=np.nan) != 0)  # first slice of each run of equal logits
    length = np.diff(first, append=len(ordered))
    wins = np.empty((2 * seeds, 2 * seeds))
    for other in range(2 * seeds):
        # slices of `other` below each run, and half of those in it
        upto = np.append(0, np.cumsum(cube == other))
        below = (upto[first] + upto[first + length]) / 2
        wins[:, other] = np.bincount(cube, np.repeat(below, length), 2 * seeds)
    return wins


def cube_wins(cube_logits: Floats) -> Floats:
    """Mann-Whitney counts of cubes, as `mann_whitney` for one slice per cube; logits (seeds, 2), Newton first."""
    logits = cube_logits.T.ravel()
    return np.sign(logits[:, None] - logits) / 2 + 0.5


def auc_without_each_seed(wins: Floats) -> tuple[float, Floats]:
    """AUC over pairs of different seeds, and the same without each seed: (seeds,).

    `wins` comes from `mann_whitney`. With one seed, the AUC is that of its own twins.
    """
    seeds = len(wins) // 2
    above = wins[seeds:, :seeds]  # GR slices over Newtonian slices: (GR seed, Newtonian seed)
    pairs = above + wins[:seeds, seeds:].T
    if seeds > 1:
        different = 1 - np.eye(seeds)
        above, pairs = above * different, pairs * different
    total = [counts.sum() for counts in (above, pairs)]
    own = [counts.sum(0) + counts.sum(1) for counts in (above, pairs)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(total[0] / total[1]), (total[0] - own[0]) / (total[1] - own[1])


def auc_estimate(wins: Floats) -> Estimate:
    """AUC over pairs of different seeds, with its jackknife interval; `wins` comes from `mann_whitney`."""
    return jackknife(*auc_without_each_seed(wins), trials_per_seed=2)


def auc_difference(wins: Floats, baseline: Floats) -> Estimate:
    """AUC of `wins` minus AUC of `baseline` on the same seeds, with the paired jackknife interval."""
    (value, leave_one_out), (other, without) = map(auc_without_each_seed, (wins, baseline))
    return jackknife(value - other, leave_one_out - without, "difference")


# Curves


class _Thresholds:
    """Counts of slices at or above every distinct logit, descending, with any seed left out."""

    def __init__(self, label: Integers, logit: Floats, seed_index: Integers) -> None:
        order = np.argsort(-logit, kind="stable")
        self.label, self.seed = label[order], seed_index[order]
        self.last = np.flatnonzero(np.diff(logit[order], append=np.nan) != 0)
        self.seeds = int(seed_index.max()) + 1

    def counts(self, without: int | None = None) -> tuple[Floats, Floats]:
        """True and false positives at each threshold: (thresholds,)."""
        keep = self.seed != without if without is not None else np.ones(len(self.seed), dtype=bool)
        true, false = (np.cumsum(keep & (self.label == label))[self.last] for label in (1, 0))
        return true.astype(np.float64), false.astype(np.float64)


def _average_precision(true: Floats, false: Floats) -> float:
    found = np.maximum(true + false, 1)  # no slice is left above the highest thresholds of a seed left out
    return float(np.sum(np.diff(true, prepend=0) * true / found) / true[-1])


def roc_band(
    label: Integers, logit: Floats, seed_index: Integers, fpr: Floats
) -> tuple[Floats, Floats, Floats]:
    """True positive rate at each false positive rate `fpr`, with the ends of its pointwise interval.

    The interval is NaN with fewer than MIN_SEEDS seeds.
    """
    thresholds = _Thresholds(label, logit, seed_index)

    def tpr(without: int | None = None) -> Floats:
        true, false = thresholds.counts(without)
        return np.interp(fpr, np.append(0, false / false[-1]), np.append(0, true / true[-1]))

    value = tpr()
    if thresholds.seeds < MIN_SEEDS:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    return value, *interval(value, np.stack([tpr(seed) for seed in range(thresholds.seeds)]), "rate")


# Slices


def _per_seed(seed_index: Integers, values: NDArray[np.generic]) -> Floats:
    return np.bincount(seed_index, values.astype(np.float64))


def slice_estimates(label: Integers, logit: Floats, seed_index: Integers) -> dict[str, Estimate]:
    """Metrics of slices with intervals; GR (label 1) is the positive class, predicted by a positive logit.

    `label`, `logit` and `seed_index` (0 to seeds - 1, each with both twins) are (slices,).
    """
    predicted, true = logit > 0, label == 1
    probability = expit(logit)
    sums = {
        "accuracy": (predicted == true, np.ones(len(logit))),
        "precision": (predicted & true, predicted),
        "recall": (predicted & true, true),
        "f1": (2.0 * (predicted & true), predicted.astype(float) + true),
        "tpr": (predicted & true, true),
        "fpr": (predicted & ~true, ~true),
        "brier_score": ((probability - label) ** 2, np.ones(len(logit))),
        "log_loss": (np.logaddexp(0, logit) - label * logit, np.ones(len(logit))),
    }
    estimates = {}
    for name, parts in sums.items():
        above, below = (_per_seed(seed_index, part) for part in parts)
        estimates[name] = ratio_estimate(above, below, "positive" if name == "log_loss" else "rate")
    estimates["auc"] = auc_estimate(mann_whitney(label, logit, seed_index))
    thresholds = _Thresholds(label, logit, seed_index)
    estimates["average_precision"] = jackknife(
        _average_precision(*thresholds.counts()),
        np.array([_average_precision(*thresholds.counts(seed)) for seed in range(thresholds.seeds)])
        if thresholds.seeds >= MIN_SEEDS
        else np.empty(0),
    )
    estimates["calibration_error"] = calibration_error(label, logit, seed_index)
    return estimates


def calibration_error(label: Integers, logit: Floats, seed_index: Integers) -> Estimate:
    """Expected calibration error: mean |predicted probability - share of GR| over bins of equal width."""
    probability = expit(logit)
    bins = np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    seeds = int(seed_index.max()) + 1
    gaps = np.bincount(bins * seeds + seed_index, probability - label, CALIBRATION_BINS * seeds).reshape(
        CALIBRATION_BINS, seeds
    )
    count = _per_seed(seed_index, np.ones(len(logit)))
    with np.errstate(divide="ignore", invalid="ignore"):
        without = np.abs(gaps.sum(1, keepdims=True) - gaps).sum(0) / (count.sum() - count)
    return jackknife(np.abs(gaps.sum(1)).sum() / count.sum(), without)


def slice_difference(
    label: Integers, logit: Floats, baseline: Floats, seed_index: Integers
) -> dict[str, Estimate]:
    """Accuracy and AUC of `logit` minus those of `baseline` on the same slices; all arrays (slices,)."""
    right = [(logits > 0) == (label == 1) for logits in (logit, baseline)]
    gain = _per_seed(seed_index, right[0].astype(float) - right[1])
    wins = [mann_whitney(label, logits, seed_index) for logits in (logit, baseline)]
    return {
        "accuracy": ratio_estimate(gain, _per_seed(seed_index, np.ones(len(label))), "difference"),
        "auc": auc_difference(*wins),
    }


def reliability(label: Integers, logit: Floats, seed_index: Integers) -> list[dict[str, float | None]]:
    """Mean predicted probability and share of GR, with its interval, in bins of equally many slices."""
    probability = expit(logit)
    edges = np.quantile(probability, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1])
    bins = np.searchsorted(edges, probability, "right")
    rows = []
    for b in np.unique(bins):
        inside = bins == b
        share = ratio_estimate(_per_seed(seed_index, inside & (label == 1)), _per_seed(seed_index, inside))
        rows.append(
            {
                "probability": float(probability[inside].mean()),
                "value": share["value"],
                "low": share["low"],
                "high": share["high"],
                "slices": int(inside.sum()),
            }
        )
    return rows


# Cubes: logits (seeds, 2), the mean logit of the slices of each cube, Newton first


def _correct(cube_logits: Floats) -> Floats:
    """Share of the two cubes of each seed on the right side of zero: 0, 1/2 or 1."""
    return ((cube_logits > 0) == [False, True]).mean(1)


def mcnemar_p_value(cube_logits: Floats) -> float:
    """One-sided exact p-value that cubes are classified better than by chance (McNemar 1947).

    A classifier that ignores gravity treats twins alike on average: seeds with both twins right are then as
    frequent as seeds with both wrong. Seeds with one right twin carry no information.
    """
    correct = _correct(cube_logits)
    right, wrong = int(np.sum(correct == 1)), int(np.sum(correct == 0))
    return float(binomtest(right, right + wrong, 0.5, "greater").pvalue) if right + wrong else 1.0


def cube_estimates(cube_logits: Floats) -> dict[str, Estimate]:
    """Metrics of cubes and of pairs of twins with intervals.

    `mean_difference` is the mean of GR minus Newton over twins; `separation` divides it by the standard
    deviation of that difference, `contrast` by that of the cubes of one gravity. Pair accuracy says little: one
    mode of large scale ranks twins.
    """
    newton, gr = cube_logits.T
    difference = gr - newton
    return {
        "cube_accuracy": score_estimate(_correct(cube_logits)),
        "cube_auc": auc_estimate(cube_wins(cube_logits)),
        "pair_accuracy": score_estimate((difference > 0).astype(np.float64)),
        "mean_difference": mean_estimate(difference),
    }


def cube_difference(cube_logits: Floats, baseline: Floats) -> dict[str, Estimate]:
    """Cube accuracy and cube AUC of `cube_logits` minus those of `baseline` on the same seeds."""
    return {
        "cube_accuracy": score_estimate(_correct(cube_logits) - _correct(baseline), "difference"),
        "cube_auc": auc_difference(cube_wins(cube_logits), cube_wins(baseline)),
    }
