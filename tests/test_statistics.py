"""Values against scikit-learn, jackknives against recomputing, coverage against a known truth."""

import json
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit
from sklearn import metrics as sk

from analysis import statistics
from analysis.statistics import Estimate

SEEDS, SLICES = 5, 12


def draw(
    rng: np.random.Generator,
    seeds: int = SEEDS,
    slices: int = SLICES,
    gap: float = 1.0,
    shared: float = 1.0,
    own: float = 0.3,
    scatter: float = 2.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits and seed index of slices whose cubes share scatter with their twins."""
    cubes = rng.normal(0, shared, (seeds, 1, 1)) + rng.normal(0, own, (seeds, 2, 1))
    logits = cubes + gap * np.array([-0.5, 0.5])[:, None] + rng.normal(0, scatter, (seeds, 2, slices))
    label = np.broadcast_to(np.array([0, 1])[:, None], logits.shape)
    return label.ravel(), logits.ravel(), np.repeat(np.arange(seeds), 2 * slices)


def cubes_of(logit: np.ndarray, seeds: int) -> np.ndarray:
    return logit.reshape(seeds, 2, -1).mean(2)


def rounded(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with many ties."""
    label, logit, seed_index = data
    return label, np.round(logit), seed_index


@pytest.fixture(params=["distinct", "ties"])
def data(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drawn = draw(np.random.default_rng(1))
    return rounded(drawn) if request.param == "ties" else drawn


# Oracles


def test_counts_equal_comparing_every_pair(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    label, logit, seed_index = data
    cube = label * SEEDS + seed_index
    above = np.sign(logit[:, None] - logit) / 2 + 0.5
    expected = [
        [above[np.ix_(cube == a, cube == b)].sum() for b in range(2 * SEEDS)] for a in range(2 * SEEDS)
    ]
    assert np.array_equal(statistics.mann_whitney(label, logit, seed_index), expected)


def test_cube_counts_are_those_of_one_slice_per_cube() -> None:
    label, logit, seed_index = draw(np.random.default_rng(2), slices=1)
    wins = statistics.mann_whitney(label, logit, seed_index)
    assert np.array_equal(statistics.cube_wins(logit.reshape(SEEDS, 2)), wins)


def auc_between_seeds(label: np.ndarray, logit: np.ndarray, seed_index: np.ndarray) -> float:
    gr, newton = label == 1, label == 0
    above = np.sign(logit[gr][:, None] - logit[newton]) / 2 + 0.5
    return float(above[seed_index[gr][:, None] != seed_index[newton]].mean())


def test_auc_counts_pairs_of_different_seeds(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    value, without = statistics.leave_one_out_auc(statistics.mann_whitney(*data))
    assert value == pytest.approx(auc_between_seeds(*data), rel=1e-12)
    for seed in range(SEEDS):
        keep = data[2] != seed
        assert without[seed] == pytest.approx(auc_between_seeds(*(part[keep] for part in data)), rel=1e-12)


def test_with_one_seed_the_auc_is_that_of_its_twins() -> None:
    data = draw(np.random.default_rng(3), seeds=1)
    estimate = statistics.auc_estimate(statistics.mann_whitney(*data))
    assert estimate["value"] == pytest.approx(sk.roc_auc_score(*data[:2]))


ORACLES = {
    "accuracy": lambda y, x: sk.accuracy_score(y, x > 0),
    "precision": lambda y, x: sk.precision_score(y, x > 0),
    "recall": lambda y, x: sk.recall_score(y, x > 0),
    "tpr": lambda y, x: sk.recall_score(y, x > 0),
    "fpr": lambda y, x: np.mean(x[y == 0] > 0),
    "f1": lambda y, x: sk.f1_score(y, x > 0),
    "brier_score": lambda y, x: sk.brier_score_loss(y, expit(x)),
    "log_loss": lambda y, x: sk.log_loss(y, expit(x)),
    "average_precision": sk.average_precision_score,
}


@pytest.mark.parametrize("name", ORACLES)
def test_values_and_jackknives_equal_recomputing(
    name: str, data: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    label, logit, seed_index = data
    oracle = ORACLES[name]
    without = [oracle(label[seed_index != seed], logit[seed_index != seed]) for seed in range(SEEDS)]
    scale = "positive" if name == "log_loss" else "rate"
    expected = statistics.jackknife(oracle(label, logit), np.array(without), scale)
    assert statistics.slice_estimates(*data)[name] == pytest.approx(expected)


def test_calibration_error_compares_probabilities_with_shares() -> None:
    # Two bins: 4 slices of probability 0.75, half of them GR; 2 of probability 0.1, none of them GR.
    logit = np.log(np.array([3, 3, 3, 3, 1 / 9, 1 / 9]))
    error = statistics.calibration_error(np.array([1, 0, 1, 0, 0, 0]), logit)
    assert error == pytest.approx((4 * 0.25 + 2 * 0.1) / 6)


def test_the_interval_of_a_mean_is_the_t_interval() -> None:
    values = np.array([0.2, -1.0, 3.0, 0.7])
    expected = stats.t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    found = statistics.mean_estimate(values)
    assert (found["low"], found["high"]) == pytest.approx(expected)


@pytest.mark.parametrize("right", range(9))
def test_the_interval_of_binary_scores_is_the_wilson_interval(right: int) -> None:
    found = statistics.score_estimate(np.arange(8) < right)
    expected = stats.binomtest(right, 8).proportion_ci(method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_rates_far_from_the_ends_agree_with_the_logit_scale() -> None:
    without = np.random.default_rng(4).normal(0.7, 0.0002, 50)
    found = statistics.jackknife(0.7, without)
    error = np.sqrt(49 / 50 * np.sum((without - without.mean()) ** 2)) / (0.7 * 0.3)
    expected = expit(np.log(0.7 / 0.3) + stats.t.ppf([0.025, 0.975], 49) * error)
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=1e-4)


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(5)
    label, logit, seed_index = draw(rng)
    baseline = logit + rng.normal(0, 0.1, len(logit))
    found = statistics.slice_difference(label, logit, baseline, seed_index)
    apart = [statistics.slice_estimates(label, some, seed_index) for some in (logit, baseline)]
    for name in ("accuracy", "auc"):
        assert found[name]["value"] == pytest.approx(apart[0][name]["value"] - apart[1][name]["value"])
        assert width(found[name]) < width(apart[0][name]) / 3
    same = statistics.slice_difference(label, logit, logit, seed_index)
    assert same["auc"] == same["accuracy"] == {"value": 0, "low": 0, "high": 0}


def width(estimate: Estimate) -> float:
    assert estimate["low"] is not None
    assert estimate["high"] is not None
    return estimate["high"] - estimate["low"]


def test_the_roc_band_equals_recomputing(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    label, logit, seed_index = data
    fpr = np.linspace(0, 1, 7)

    def tpr(keep: np.ndarray) -> np.ndarray:
        x, y, _ = sk.roc_curve(label[keep], logit[keep], drop_intermediate=False)
        return np.interp(fpr, x, y)

    value, low, high = statistics.roc_band(label, logit, seed_index, fpr)
    without = np.stack([tpr(seed_index != seed) for seed in range(SEEDS)])
    assert value == pytest.approx(tpr(seed_index >= 0))
    expected = [statistics.jackknife(v, w) for v, w in zip(value, without.T, strict=True)]
    assert low == pytest.approx([e["low"] for e in expected])
    assert high == pytest.approx([e["high"] for e in expected])


def test_bins_of_the_reliability_hold_all_slices() -> None:
    label, logit, seed_index = draw(np.random.default_rng(6), slices=60)
    rows = statistics.reliability(label, logit, seed_index)
    assert [row["slices"] for row in rows] == [40] * 15
    assert sum(row["value"] * row["slices"] for row in rows) == pytest.approx(label.sum())


# Cubes


def test_mcnemar_compares_seeds_with_both_twins_right_and_both_wrong() -> None:
    right, wrong, split = [-1, 1], [1, -1], [1, 2]
    cubes = np.array([right] * 6 + [wrong] + [split] * 9, dtype=float)
    assert statistics.mcnemar_p_value(cubes) == pytest.approx(8 / 2**7)
    assert statistics.mcnemar_p_value(cubes[7:]) == 1


def test_cube_accuracy_stays_uncertain_where_all_seeds_agree() -> None:
    split = statistics.cube_estimates(np.array([[1.0, 2.0]] * 8))["cube_accuracy"]
    assert split["value"] == 0.5
    assert width(split) > 0.2
    right = statistics.cube_estimates(np.array([[-1.0, 2.0]] * 8))["cube_accuracy"]
    assert (right["value"], right["high"]) == (1, 1)
    assert right["low"] == pytest.approx(stats.binomtest(8, 8).proportion_ci(method="wilson").low)


def test_cubes_that_separate_perfectly_leave_the_auc_uncertain() -> None:
    estimate = statistics.auc_estimate(statistics.cube_wins(np.array([[-1.0, 1.0]] * 8)))
    assert (estimate["value"], estimate["high"]) == (1, 1)
    # Eight of each separate perfectly in 2.5 % of draws at a binormal AUC of about 0.84.
    assert 0.65 < estimate["low"] < 0.85


def test_separation_and_contrast_divide_by_their_scatter() -> None:
    cubes = np.random.default_rng(7).normal([0.0, 1.0], 1, (6, 2))
    difference = cubes[:, 1] - cubes[:, 0]
    found = statistics.cube_estimates(cubes)
    pooled = np.sqrt((cubes[:, 0].var(ddof=1) + cubes[:, 1].var(ddof=1)) / 2)
    assert found["separation"]["value"] == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert found["contrast"]["value"] == pytest.approx(difference.mean() / pooled)


# Ranges and undefined intervals


def extreme_logits(rng: np.random.Generator, kind: str, seeds: int) -> np.ndarray:
    label, logit, seed_index = draw(rng, seeds, 3)
    if kind == "constant":
        return np.zeros(len(logit))
    if kind == "perfect":
        return np.where(label == 1, 1e3, -1e3) + logit
    if kind == "reversed":
        return np.where(label == 1, -1e3, 1e3) + logit
    if kind == "nearly perfect":
        return np.where((label == 1) ^ (np.arange(len(label)) == 1), 1.0, -1.0)
    if kind == "one seed differs":
        return np.where(seed_index == 0, logit, -1.0)
    if kind == "overconfident":
        return 1e6 * logit
    return logit if kind == "ordinary" else np.round(logit)


KINDS = ["constant", "perfect", "reversed", "nearly perfect", "one seed differs", "overconfident", "ordinary"]
UNBOUNDED = {"mean_difference", "separation", "contrast"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seeds", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", [*KINDS, "ties"])
def test_intervals_stay_in_the_range_and_contain_the_value(kind: str, seeds: int) -> None:
    rng = np.random.default_rng(8)
    for _ in range(10):
        logit, other = (extreme_logits(rng, some, seeds) for some in (kind, rng.choice(KINDS)))
        label, _, seed_index = draw(rng, seeds, 3)
        found = statistics.slice_estimates(label, logit, seed_index)
        found |= statistics.cube_estimates(cubes_of(logit, seeds))
        found |= statistics.headline_estimates(label, logit, seed_index)
        gains = statistics.slice_difference(label, logit, other, seed_index)
        gains |= statistics.cube_difference(cubes_of(logit, seeds), cubes_of(other, seeds))
        found |= {f"gain in {name}": gain for name, gain in gains.items()}
        json.dumps(found, allow_nan=False)
        for name, estimate in found.items():
            floor = -1 if name.startswith("gain") else -np.inf if name in UNBOUNDED else 0
            ceiling = np.inf if name in UNBOUNDED | {"log_loss"} else 1
            value, low, high = estimate["value"], estimate["low"], estimate["high"]
            assert floor <= value <= ceiling
            assert (low is None) == (high is None)
            if low is not None and high is not None:
                assert floor <= low <= value + 1e-12, name
                assert value - 1e-12 <= high <= ceiling, name
            if seeds < statistics.MIN_SEEDS:
                assert low is None
        value, low, high = statistics.roc_band(label, logit, seed_index, np.linspace(0, 1, 5))
        if seeds < statistics.MIN_SEEDS:
            assert np.isnan([low, high]).all()
        else:
            assert np.all((low >= 0) & (low <= value + 1e-12) & (value - 1e-12 <= high) & (high <= 1))


def test_a_rate_that_no_other_seed_defines_has_no_interval() -> None:
    label, logit, seed_index = draw(np.random.default_rng(9))
    only_first = np.where(seed_index == 0, np.abs(logit), -1.0)  # predicts GR in one seed
    assert statistics.slice_estimates(label, only_first, seed_index)["precision"]["low"] is None


# Coverage


def test_intervals_contain_the_truth_about_19_times_in_20() -> None:
    """Eight seeds whose twins share most of their scatter; the standard error of each share is 0.011."""
    gap, shared, own, scatter, slices, seeds = 1.0, 1.2, 0.3, 2.0, 20, 8
    weaker, noise = 0.6, 2.5
    cube = np.sqrt(shared**2 + own**2 + scatter**2 / slices)
    single = np.sqrt(shared**2 + own**2 + scatter**2)
    auc, accuracy = stats.norm.cdf([gap / single / np.sqrt(2), gap / 2 / single])
    other = np.sqrt(single**2 + noise**2)
    weaker_auc, weaker_accuracy = stats.norm.cdf(
        [weaker * gap / other / np.sqrt(2), weaker * gap / 2 / other]
    )
    truths = {
        "auc": auc,
        "accuracy": accuracy,
        "cube_auc": stats.norm.cdf(gap / cube / np.sqrt(2)),
        "cube_accuracy": stats.norm.cdf(gap / 2 / cube),
        "mean_difference": gap,
        "contrast": gap / cube,
        "gain in auc": auc - weaker_auc,
        "gain in accuracy": accuracy - weaker_accuracy,
    }
    rng, covered = np.random.default_rng(10), defaultdict(list)
    for _ in range(400):
        label, logit, seed_index = draw(rng, seeds, slices, gap, shared, own, scatter)
        baseline = logit - (1 - weaker) * gap * (label - 0.5) + rng.normal(0, noise, len(logit))
        found = statistics.headline_estimates(label, logit, seed_index)
        found |= statistics.cube_estimates(cubes_of(logit, seeds))
        gains = statistics.slice_difference(label, logit, baseline, seed_index)
        found |= {f"gain in {name}": gain for name, gain in gains.items()}
        for name, truth in truths.items():
            covered[name].append(found[name]["low"] <= truth <= found[name]["high"])
    shares = {name: np.mean(hits) for name, hits in covered.items()}
    assert all(0.92 <= share <= 0.985 for share in shares.values()), shares
