"""Estimates of classification metrics with 95 % intervals that hold for slices of few simulations.

Slices of one seed share its initial conditions, and so do twins: only seeds are independent. Every interval
comes from the scatter between seeds.

Smooth statistics use the delete-one-seed jackknife (Arvesen 1969, Ann. Math. Stat. 40, 2076) and a t quantile
with seeds - 1 degrees of freedom; for a mean over seeds this is the ordinary t interval. Areas under ROC
curves count only pairs of slices, or cubes, from different seeds, because the two of a pair are then
independent (compare Obuchowski 1997, Biometrics 53, 567).

Intervals of rates, and of differences of rates, are Wilson score intervals (Wilson 1927, J. Am. Stat. Assoc.
22, 209) with the effective number of trials that has the jackknife's variance. They agree asymptotically with
intervals on the logit scale (Kott 2017, Survey Methodology 43, no. 2), cannot leave the range, and exist at
its ends, where a logit is infinite. Franco et al. 2019 (J. Surv. Stat. Methodol. 7, 334) recommend them for
clustered data. Positive numbers use the log scale.

An interval describes the variation over other test seeds, not over other trainings. `low` and `high` are None
with fewer than MIN_SEEDS seeds, and where the statistic is undefined without one of the seeds.
`benchmarks/interval_coverage.py` measures how often the intervals contain the true value.
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
RANGES = {"rate": (0, 1), "difference": (-1, 2)}  # start and width


class Estimate(TypedDict):
    """A value and the ends of its 95 % interval, None where the interval is undefined."""

    value: float
    low: float | None
    high: float | None


# Intervals


def wilson(rate: Floats, trials: Floats, quantile: float) -> tuple[Floats, Floats]:
    """Ends of the score interval of a rate in [0, 1] from a number of trials, which may be infinite."""
    shrink = 1 / (1 + quantile**2 / trials)
    centre = (rate + quantile**2 / (2 * trials)) * shrink
    half = quantile * shrink * np.sqrt(rate * (1 - rate) / trials + quantile**2 / (4 * trials**2))
    # The ends touch 0 and 1 at rates of 0 and 1; rounding must not carry them beyond.
    return np.maximum(centre - half, 0) * (rate > 0), np.where(rate < 1, np.minimum(centre + half, 1), 1)


def interval(
    value: Floats, leave_one_out: Floats, scale: Scale, trials_per_seed: float = 1
) -> tuple[Floats, Floats]:
    """Ends of the jackknife interval: arrays of the shape of `value`.

    `leave_one_out` (seeds, ...) is the statistic without each seed. At the ends of a range the jackknife
    variance vanishes; each seed then counts as `trials_per_seed` independent trials.
    """
    seeds = len(leave_one_out)
    quantile = float(t.ppf((1 + LEVEL) / 2, seeds - 1))
    variance = (seeds - 1) / seeds * np.sum((leave_one_out - leave_one_out.mean(0)) ** 2, axis=0)
    if scale == "real":
        half = quantile * np.sqrt(variance)
        return value - half, value + half
    if scale == "positive":
        factor = np.exp(quantile * np.sqrt(variance) / np.where(value > 0, value, 1))
        return value / factor, value * factor
    start, width = RANGES[scale]
    rate = (value - start) / width
    with np.errstate(divide="ignore", invalid="ignore"):
        trials = np.where(
            (rate > 0) & (rate < 1), rate * (1 - rate) * width**2 / variance, trials_per_seed * seeds
        )
    low, high = wilson(rate, trials, quantile)
    return start + width * low, start + width * high


def jackknife(
    value: float, leave_one_out: Floats, scale: Scale = "rate", trials_per_seed: float = 1
) -> Estimate:
    """A statistic of all seeds with its interval; `leave_one_out` (seeds,) is the statistic without each."""
    if len(leave_one_out) < MIN_SEEDS or not np.isfinite(leave_one_out).all():
        return {"value": float(value), "low": None, "high": None}
    low, high = interval(np.asarray(value, dtype=np.float64), leave_one_out, scale, trials_per_seed)
    return {"value": float(value), "low": float(low), "high": float(high)}


def ratio_estimate(numerator: Floats, denominator: Floats, scale: Scale = "rate") -> Estimate:
    """sum(numerator) / sum(denominator) with its jackknife interval, from sums per seed (seeds,).

    The value is 0 where the denominator is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        leave_one_out = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    return jackknife(numerator.sum() / denominator.sum() if denominator.sum() else 0.0, leave_one_out, scale)


def mean_estimate(values: Floats, scale: Scale = "real") -> Estimate:
    """Mean over seeds of one number per seed (seeds,), with the t interval."""
    return ratio_estimate(np.asarray(values, dtype=np.float64), np.ones(len(values)), scale)


def score_estimate(scores: Floats, scale: Literal["rate", "difference"] = "rate") -> Estimate:
    """Mean over seeds of a score with few possible values, one per seed (seeds,), with a score interval.

    A jackknife interval collapses when all seeds have the same score, for example with one right cube each.
    This is a Wilson interval with seeds / (design effect) trials. The design effect is the variance of the
    scores over that of a binary score of the same mean, both after adding half a seed at each end of the
    range (at -1/2 and 1/2 for a difference). It is 1 for binary scores.
    """
    seeds = len(scores)
    value = float(np.mean(scores))
    if seeds < MIN_SEEDS:
        return {"value": value, "low": None, "high": None}
    start, width = RANGES[scale]
    rates = (np.asarray(scores) - start) / width
    added = np.array([0.0, 1.0] if scale == "rate" else [0.25, 0.75])
    mean = (rates.sum() + added.sum() / 2) / (seeds + 1)
    variance = (np.sum((rates - mean) ** 2) + np.sum((added - mean) ** 2) / 2) / (seeds + 1)
    trials = np.asarray(seeds * mean * (1 - mean) / variance)
    low, high = wilson(np.asarray(rates.mean()), trials, float(norm.ppf((1 + LEVEL) / 2)))
    return {"value": value, "low": start + width * float(low), "high": start + width * float(high)}


# Areas under ROC curves


def mann_whitney(label: Integers, logit: Floats, seed_index: Integers) -> Floats:
    """Mann-Whitney counts between the slices of all cubes: (2 seeds, 2 seeds), all Newtonian cubes first.

    Entry (a, b) counts the pairs of a slice of cube a and a slice of cube b in which the first has the higher
    logit; ties count one half. `label` (1 = GR), `logit` and `seed_index` (0 to seeds - 1) are (slices,).
    """
    seeds = int(seed_index.max()) + 1
    order = np.argsort(logit, kind="stable")
    cube, ordered = (label * seeds + seed_index)[order], logit[order]
    first = np.flatnonzero(np.diff(ordered, prepend=np.nan) != 0)  # first slice of each run of equal logits
    length = np.diff(first, append=len(ordered))
    wins = np.empty((2 * seeds, 2 * seeds))
    for other in range(2 * seeds):
        # Slices of `other` below each run, and half of those in it.
        upto = np.append(0, np.cumsum(cube == other))
        below = (upto[first] + upto[first + length]) / 2
        wins[:, other] = np.bincount(cube, np.repeat(below, length), 2 * seeds)
    return wins


def cube_wins(cube_logits: Floats) -> Floats:
    """Mann-Whitney counts as of `mann_whitney` for one logit per cube: (seeds, 2), Newton first."""
    logits = cube_logits.T.ravel()
    return np.sign(logits[:, None] - logits) / 2 + 0.5


def leave_one_out_auc(wins: Floats) -> tuple[float, Floats]:
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
    return jackknife(*leave_one_out_auc(wins), trials_per_seed=2)


def auc_difference(wins: Floats, baseline: Floats) -> Estimate:
    """AUC of `wins` minus AUC of `baseline` on the same seeds, with the paired jackknife interval."""
    (value, leave_one_out), (other, without) = map(leave_one_out_auc, (wins, baseline))
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
    if not true[-1]:
        return float("nan")
    found = np.maximum(true + false, 1)  # without a seed, the highest thresholds may hold no slice
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
    return np.bincount(seed_index, values.astype(np.float64)).astype(np.float64)


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
        numerator, denominator = (_per_seed(seed_index, part) for part in parts)
        estimates[name] = ratio_estimate(numerator, denominator, "positive" if name == "log_loss" else "rate")
    estimates["auc"] = auc_estimate(mann_whitney(label, logit, seed_index))
    thresholds = _Thresholds(label, logit, seed_index)
    estimates["average_precision"] = jackknife(
        _average_precision(*thresholds.counts()),
        np.array([_average_precision(*thresholds.counts(seed)) for seed in range(thresholds.seeds)]),
    )
    estimates["calibration_error"] = {"value": calibration_error(label, logit), "low": None, "high": None}
    return estimates


def calibration_error(label: Integers, logit: Floats) -> float:
    """Expected calibration error: mean |predicted probability - share of GR| over bins of equal width.

    It has no interval. Sums of absolute values are biased upwards, most where the network is well calibrated,
    and intervals by the jackknife, with or without correction of the bias, cover 60 to 85 % instead of 95 %.
    The Brier score, the log loss and the bins of `reliability` have intervals.
    """
    probability = expit(logit)
    bins = np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    return float(np.abs(np.bincount(bins, probability - label)).sum() / len(logit))


def headline_estimates(label: Integers, logit: Floats, seed_index: Integers) -> dict[str, Estimate]:
    """Accuracy and AUC of slices: enough to compare many sets of logits."""
    right = _per_seed(seed_index, (logit > 0) == (label == 1))
    return {
        "accuracy": ratio_estimate(right, _per_seed(seed_index, np.ones(len(logit)))),
        "auc": auc_estimate(mann_whitney(label, logit, seed_index)),
    }


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


def _separation(cube_logits: Floats) -> float:
    difference = cube_logits[:, 1] - cube_logits[:, 0]
    scatter = difference.std(ddof=1)
    return float(difference.mean() / scatter) if scatter else 0.0


def _contrast(cube_logits: Floats) -> float:
    scatter = np.sqrt(cube_logits.var(axis=0, ddof=1).mean())
    return float(np.mean(cube_logits[:, 1] - cube_logits[:, 0]) / scatter) if scatter else 0.0


def cube_estimates(cube_logits: Floats) -> dict[str, Estimate]:
    """Metrics of cubes and of pairs of twins, with intervals.

    `mean_difference` is the mean over twins of GR minus Newton. `separation` divides it by the standard
    deviation of that difference, `contrast` (d') by that between cubes of one gravity; both are 0 without
    scatter, and absent with fewer than MIN_SEEDS seeds. `pair_accuracy` is a description, not evidence: the
    few modes of the largest scales suffice to rank every pair of twins.
    """
    seeds = len(cube_logits)
    difference = cube_logits[:, 1] - cube_logits[:, 0]
    estimates = {
        "cube_accuracy": score_estimate(_correct(cube_logits)),
        "cube_auc": auc_estimate(cube_wins(cube_logits)),
        "pair_accuracy": score_estimate((difference > 0).astype(np.float64)),
        "mean_difference": mean_estimate(difference),
    }
    if seeds >= MIN_SEEDS:
        for name, ratio in {"separation": _separation, "contrast": _contrast}.items():
            without = np.array([ratio(np.delete(cube_logits, seed, axis=0)) for seed in range(seeds)])
            estimates[name] = jackknife(ratio(cube_logits), without, "real")
    return estimates


def cube_difference(cube_logits: Floats, baseline: Floats) -> dict[str, Estimate]:
    """Cube accuracy and cube AUC of `cube_logits` minus those of `baseline` on the same seeds."""
    return {
        "cube_accuracy": score_estimate(_correct(cube_logits) - _correct(baseline), "difference"),
        "cube_auc": auc_difference(cube_wins(cube_logits), cube_wins(baseline)),
    }
