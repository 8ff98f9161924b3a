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

Permutation tests exchange the labels of twins. If logits do not depend on gravity, the labels of the two
twins of a seed are exchangeable, whatever else the twins share. The p-values are valid for any number of
seeds and any distribution of logits, also with randomly drawn relabelings, among which the identity is
counted (Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9, 39).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binomtest, norm, t
from sklearn.metrics import average_precision_score

from training.metrics import Floats, Predictions

LEVEL = 0.95
MIN_SEEDS = 3
CALIBRATION_BINS = 15
EXACT_SEEDS = 12  # up to which all relabelings are tried
DRAWS = 10_000
PAIR_METRICS = ("pair_accuracy", "mean_difference")

Bools = NDArray[np.bool_]
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
    center = (rate + quantile**2 / (2 * trials)) * shrink
    half = quantile * shrink * np.sqrt(rate * (1 - rate) / trials + quantile**2 / (4 * trials**2))
    # The ends touch 0 and 1 at rates of 0 and 1; rounding must not carry them beyond.
    return np.maximum(center - half, 0) * (rate > 0), np.where(rate < 1, np.minimum(center + half, 1), 1)


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


# Areas under ROC curves, from Mann-Whitney counts `wins`: `Predictions.wins` of slices, `cube_wins` of cubes


def cube_wins(cube_logits: Floats) -> Floats:
    """Counts as of `Predictions.wins` for one logit per cube: (seeds, 2), Newton first."""
    logits = cube_logits.T.ravel()
    return np.sign(logits[:, None] - logits) / 2 + 0.5


def auc_of(newton: Floats, gr: Floats) -> float:
    """AUC over all pairs of a Newtonian and a GR logit, ties counted half."""
    ordered = np.sort(newton)
    below = np.searchsorted(ordered, gr) + np.searchsorted(ordered, gr, side="right")
    return float(below.mean() / (2 * len(newton)))


def leave_one_out_auc(wins: Floats) -> tuple[float, Floats]:
    """AUC over pairs of different seeds, and the same without each seed: (seeds,).

    With one seed, the AUC is that of its twins.
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
    """AUC over pairs of different seeds, with its jackknife interval."""
    return jackknife(*leave_one_out_auc(wins), trials_per_seed=2)


def within_axis(predictions: Predictions) -> tuple[float, Floats]:
    """Mean over axes of the AUC among slices of one axis, and the same without each seed: (seeds,).

    Slices perpendicular to different axes may differ by more than the gravities do: pooled, that is noise.
    """
    parts = [predictions.where(predictions.axis == axis).wins for axis in np.unique(predictions.axis)]
    values, without = zip(*map(leave_one_out_auc, parts), strict=True)
    return float(np.mean(values)), np.mean(without, axis=0)


def within_axis_estimate(predictions: Predictions) -> Estimate:
    """The AUC within an axis with its jackknife interval."""
    return jackknife(*within_axis(predictions), trials_per_seed=2)


def auc_difference(wins: Floats, baseline: Floats) -> Estimate:
    """AUC of `wins` minus AUC of `baseline` on the same seeds, with the paired jackknife interval."""
    (value, leave_one_out), (other, without) = map(leave_one_out_auc, (wins, baseline))
    return jackknife(value - other, leave_one_out - without, "difference")


# Permutation tests


def relabelings(seeds: int) -> Bools:
    """Seeds whose twins are exchanged in each relabeling: (relabelings, seeds), the identity first.

    All 2^seeds up to EXACT_SEEDS seeds, otherwise the identity and DRAWS random ones, always the same.
    """
    if seeds <= EXACT_SEEDS:
        return (np.arange(2**seeds)[:, None] >> np.arange(seeds) & 1).astype(bool)
    drawn = np.random.default_rng(0).integers(0, 2, (DRAWS, seeds)).astype(bool)
    return np.concatenate([np.zeros((1, seeds), dtype=bool), drawn])


def relabeled_auc(wins: Floats, exchanged: Bools) -> Floats:
    """Slice AUC over pairs of different seeds under each relabeling: (relabelings,).

    Under any relabeling the AUC is a sum of entries of `wins`. `exchanged` is (relabelings, seeds).
    """
    seeds = len(wins) // 2
    if seeds > 1:
        wins = wins * np.tile(1 - np.eye(seeds), (2, 2))
    # Counts are multiples of 1/2, so that float64 sums are exact and equal areas compare equal.
    gr = np.concatenate([exchanged, ~exchanged], axis=1).astype(np.float64)
    newton = 1 - gr
    above, pairs = (np.einsum("rs,rs->r", gr @ counts, newton) for counts in (wins, wins + wins.T))
    return above / pairs


def max_p_values(trials: Sequence[Floats]) -> list[float]:
    """One-sided p-values of the AUC of several trials on the same seeds, adjusted for the choice among them.

    `trials` are the `wins` of each network. A p-value is the share of relabelings, the identity included, in
    which the largest statistic of all trials reaches the trial's (Westfall & Young 1993, Resampling-Based
    Multiple Testing). AUCs are standardized by their scatter over relabelings, so that all trials have the
    same weight. With one trial this is the ordinary p-value.
    """
    exchanged = relabelings(len(trials[0]) // 2)
    areas = np.stack([relabeled_auc(wins, exchanged) for wins in trials])
    excess, scatter = areas - 0.5, areas.std(axis=1, keepdims=True)
    standardized = np.divide(excess, scatter, out=np.zeros_like(excess), where=scatter > 0)
    largest = standardized.max(axis=0)
    return [float(np.mean(largest >= row[0])) for row in standardized]


def mcnemar_p_value(cube_logits: Floats) -> float:
    """One-sided exact p-value that cubes are classified better than by chance (McNemar 1947).

    A classifier that ignores gravity treats twins alike on average: seeds with both twins right are then as
    frequent as seeds with both wrong. Seeds with one right twin carry no information.
    """
    correct = _correct(cube_logits)
    right, wrong = int(np.sum(correct == 1)), int(np.sum(correct == 0))
    return float(binomtest(right, right + wrong, 0.5, "greater").pvalue) if right + wrong else 1.0


# Slices


def _positives(predictions: Predictions) -> Iterator[tuple[Floats, Floats]]:
    """True and false positives at every distinct logit, descending: of all slices, then without each seed."""
    order = np.argsort(-predictions.logit, kind="stable")
    label, seed = predictions.label[order], predictions.seed_index[order]
    last = np.flatnonzero(np.diff(predictions.logit[order], append=np.nan) != 0)
    for without in range(-1, len(predictions.seeds)):
        true, false = (np.cumsum((seed != without) & (label == gravity))[last] for gravity in (1, 0))
        yield true.astype(np.float64), false.astype(np.float64)


def curves(predictions: Predictions, fpr: Floats) -> dict[str, Floats]:
    """ROC curve with the ends of its pointwise interval, and precision-recall curve.

    `tpr`, `low` and `high` at each false positive rate `fpr`, NaN where undefined; `recall`, `precision`.
    """
    tpr: list[Floats] = []
    for true, false in _positives(predictions):
        if not tpr:
            recall, precision = true / true[-1], true / (true + false)
        tpr.append(np.interp(fpr, np.append(0, false / false[-1]), np.append(0, true / true[-1])))
        if len(predictions.seeds) < MIN_SEEDS:
            break
    value, *without = tpr
    low, high = interval(value, np.stack(without), "rate") if without else (np.full_like(value, np.nan),) * 2
    return {"fpr": fpr, "tpr": value, "low": low, "high": high, "recall": recall, "precision": precision}


def slice_metrics(predictions: Predictions) -> dict[str, Estimate]:
    """Every metric of slices; GR (label 1) is the positive class, predicted by a positive logit."""
    label, logit = predictions.label, predictions.logit
    predicted, true, every = logit > 0, label == 1, np.ones(len(logit))
    sums = {
        "accuracy": (predicted == true, every),
        "precision": (predicted & true, predicted),
        "recall": (predicted & true, true),
        "f1": (2.0 * (predicted & true), predicted.astype(float) + true),
        "tpr": (predicted & true, true),
        "fpr": (predicted & ~true, ~true),
        "brier_score": ((expit(logit) - label) ** 2, every),
        "log_loss": (np.logaddexp(0, logit) - label * logit, every),
    }
    estimates = {}
    for name, parts in sums.items():
        numerator, denominator = (per_seed(predictions, part) for part in parts)
        estimates[name] = ratio_estimate(numerator, denominator, "positive" if name == "log_loss" else "rate")
    estimates["auc"] = auc_estimate(predictions.wins)
    # Without an interval: that of the jackknife covers the true value in 77 % of simulations with 8 seeds.
    area = float(average_precision_score(label, logit))
    estimates["average_precision"] = {"value": area, "low": None, "high": None}
    estimates["calibration_error"] = {"value": calibration_error(predictions), "low": None, "high": None}
    return estimates


def per_seed(predictions: Predictions, values: NDArray[Any]) -> Floats:
    """Sums of `values` (slices,) over the slices of each seed: (seeds,)."""
    return np.bincount(predictions.seed_index, values.astype(np.float64)).astype(np.float64)


def calibration_error(predictions: Predictions) -> float:
    """Expected calibration error: mean |predicted probability - share of GR| over bins of equal width.

    It has no interval. Sums of absolute values are biased upwards, most where the network is well calibrated,
    and intervals by the jackknife, with or without correction of the bias, cover 60 to 85 % instead of 95 %.
    The Brier score, the log loss and the bins of `reliability` have intervals.
    """
    probability = expit(predictions.logit)
    bins = np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    return float(np.abs(np.bincount(bins, probability - predictions.label)).sum() / len(predictions))


def reliability(predictions: Predictions) -> list[dict[str, Any]]:
    """Mean predicted probability and share of GR, with its interval, in bins of equally many slices."""
    probability = expit(predictions.logit)
    edges = np.quantile(probability, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1])
    bins = np.searchsorted(edges, probability, "right")
    rows = []
    for inside in (bins == b for b in np.unique(bins)):
        gr, every = (per_seed(predictions, mask) for mask in (inside & (predictions.label == 1), inside))
        mean = {"probability": float(probability[inside].mean()), "slices": int(inside.sum())}
        rows.append({**mean, **ratio_estimate(gr, every)})
    return rows


# Cubes: logits (seeds, 2), the mean logit of the slices of each cube, Newton first


def _correct(cube_logits: Floats) -> Floats:
    """Share of the two cubes of each seed on the right side of zero: 0, 1/2 or 1."""
    return ((cube_logits > 0) == [False, True]).mean(1)


def cube_metrics(cube_logits: Floats) -> dict[str, Estimate]:
    """Metrics of cubes and of pairs of twins, with intervals.

    `mean_difference` is the mean over twins of GR minus Newton. `pair_accuracy` is a description, not
    evidence: the few modes of the largest scales suffice to rank every pair of twins.
    """
    difference = cube_logits[:, 1] - cube_logits[:, 0]
    return {
        "cube_accuracy": score_estimate(_correct(cube_logits)),
        "cube_auc": auc_estimate(cube_wins(cube_logits)),
        "pair_accuracy": score_estimate((difference > 0).astype(np.float64)),
        "mean_difference": mean_estimate(difference),
    }


# Slices and cubes


def headline(predictions: Predictions) -> dict[str, Estimate]:
    """Accuracy and AUC of slices, also within an axis, and AUC of cubes: enough to compare predictions."""
    right = per_seed(predictions, (predictions.logit > 0) == (predictions.label == 1))
    return {
        "accuracy": ratio_estimate(right, per_seed(predictions, np.ones(len(predictions)))),
        "auc": auc_estimate(predictions.wins),
        "within_axis": within_axis_estimate(predictions),
        "cube_auc": auc_estimate(cube_wins(predictions.cube_logits)),
    }


def difference(network: Predictions, baseline: Predictions) -> dict[str, Estimate]:
    """Metrics of the network minus those of a baseline on the same slices, with paired intervals."""
    right = [(some.logit > 0) == (some.label == 1) for some in (network, baseline)]
    gain = per_seed(network, right[0].astype(float) - right[1])
    cubes = network.cube_logits, baseline.cube_logits
    (area, areas), (other, others) = map(within_axis, (network, baseline))
    return {
        "accuracy": ratio_estimate(gain, per_seed(network, np.ones(len(network))), "difference"),
        "auc": auc_difference(network.wins, baseline.wins),
        "within_axis": jackknife(area - other, areas - others, "difference"),
        "cube_accuracy": score_estimate(_correct(cubes[0]) - _correct(cubes[1]), "difference"),
        "cube_auc": auc_difference(*map(cube_wins, cubes)),
    }


def summarize(predictions: Predictions) -> dict[str, Any]:
    """Every metric of slices, cubes and pairs of twins, and whether they exceed chance."""
    balance = float(predictions.label.mean())
    axes = {int(axis): predictions.where(predictions.axis == axis) for axis in np.unique(predictions.axis)}
    cubes = cube_metrics(predictions.cube_logits)
    return {
        "chance": {
            "balance": balance,
            "accuracy": max(balance, 1 - balance),
            "average_precision": balance,
            "log_loss": float(np.log(2)),
            "brier_score": 0.25,
            **dict.fromkeys(("auc", "within_axis", "cube_accuracy", "cube_auc", "pair_accuracy"), 0.5),
        },
        "slices": slice_metrics(predictions),
        "within_axis": within_axis_estimate(predictions),
        "axes": {axis: slice_metrics(part) for axis, part in axes.items()},
        "cubes": {key: estimate for key, estimate in cubes.items() if key not in PAIR_METRICS},
        "pairs": {key: cubes[key] for key in PAIR_METRICS},
        "confusion": predictions.confusion,
        "reliability": reliability(predictions),
        "significance": {
            "p_value": max_p_values([predictions.wins])[0],
            "relabellings": len(relabelings(len(predictions.seeds))),
            "mcnemar_p_value": mcnemar_p_value(predictions.cube_logits),
        },
    }
