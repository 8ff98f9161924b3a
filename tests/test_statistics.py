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
from training.metrics import Predictions

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


def predictions(label: np.ndarray, logit: np.ndarray, seed_index: np.ndarray) -> Predictions:
    """Slices whose ids, axes and positions do not matter."""
    zeros = np.zeros_like(seed_index)
    return Predictions(zeros, seed_index, label, zeros, zeros, logit)


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
    assert np.array_equal(predictions(label, logit, seed_index).wins, expected)


def auc_between_seeds(label: np.ndarray, logit: np.ndarray, seed_index: np.ndarray) -> float:
    gr, newton = label == 1, label == 0
    above = np.sign(logit[gr][:, None] - logit[newton]) / 2 + 0.5
    return float(above[seed_index[gr][:, None] != seed_index[newton]].mean())


def test_auc_counts_pairs_of_different_seeds(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    value, without = statistics.leave_one_out_auc(predictions(*data).wins)
    assert value == pytest.approx(auc_between_seeds(*data), rel=1e-12)
    for seed in range(SEEDS):
        keep = data[2] != seed
        assert without[seed] == pytest.approx(auc_between_seeds(*(part[keep] for part in data)), rel=1e-12)


ORACLES = {
    "accuracy": lambda y, x: sk.accuracy_score(y, x > 0),
    "precision": lambda y, x: sk.precision_score(y, x > 0),
    "recall": lambda y, x: sk.recall_score(y, x > 0),
    "tpr": lambda y, x: sk.recall_score(y, x > 0),
    "fpr": lambda y, x: np.mean(x[y == 0] > 0),
    "f1": lambda y, x: sk.f1_score(y, x > 0),
    "brier_score": lambda y, x: sk.brier_score_loss(y, expit(x)),
    "log_loss": lambda y, x: sk.log_loss(y, expit(x)),
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
    assert statistics.slice_metrics(predictions(*data))[name] == pytest.approx(expected)


def test_calibration_error_compares_probabilities_with_shares() -> None:
    # Two bins: 4 slices of probability 0.75, half of them GR; 2 of probability 0.1, none of them GR.
    logit = np.log(np.array([3, 3, 3, 3, 1 / 9, 1 / 9]))
    error = statistics.calibration_error(predictions(np.array([1, 0, 1, 0, 0, 0]), logit, np.arange(6)))
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


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(5)
    label, logit, seed_index = draw(rng)
    baseline = logit + rng.normal(0, 0.1, len(logit))
    found = statistics.difference(
        predictions(label, logit, seed_index), predictions(label, baseline, seed_index)
    )
    apart = [statistics.slice_metrics(predictions(label, some, seed_index)) for some in (logit, baseline)]
    for name in ("accuracy", "auc"):
        assert found[name]["value"] == pytest.approx(apart[0][name]["value"] - apart[1][name]["value"])
        assert width(found[name]) < width(apart[0][name]) / 3
    same = statistics.difference(*[predictions(label, logit, seed_index)] * 2)
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

    curves = statistics.curves(predictions(label, logit, seed_index), fpr)
    value, low, high = (curves[key] for key in ("tpr", "low", "high"))
    without = np.stack([tpr(seed_index != seed) for seed in range(SEEDS)])
    assert value == pytest.approx(tpr(seed_index >= 0))
    expected = [statistics.jackknife(v, w) for v, w in zip(value, without.T, strict=True)]
    assert low == pytest.approx([e["low"] for e in expected])
    assert high == pytest.approx([e["high"] for e in expected])


# Cubes


def test_mcnemar_compares_seeds_with_both_twins_right_and_both_wrong() -> None:
    right, wrong, split = [-1, 1], [1, -1], [1, 2]
    cubes = np.array([right] * 6 + [wrong] + [split] * 9, dtype=float)
    assert statistics.mcnemar_p_value(cubes) == pytest.approx(8 / 2**7)
    assert statistics.mcnemar_p_value(cubes[7:]) == 1


def test_cube_accuracy_stays_uncertain_where_all_seeds_agree() -> None:
    split = statistics.cube_metrics(np.array([[1.0, 2.0]] * 8))["cube_accuracy"]
    assert split["value"] == 0.5
    assert width(split) > 0.2
    right = statistics.cube_metrics(np.array([[-1.0, 2.0]] * 8))["cube_accuracy"]
    assert (right["value"], right["high"]) == (1, 1)
    assert right["low"] == pytest.approx(stats.binomtest(8, 8).proportion_ci(method="wilson").low)


def test_the_auc_within_an_axis_does_not_see_offsets_of_axes() -> None:
    label, logit, seed_index = draw(np.random.default_rng(11), slices=12)
    axis = np.tile([0, 1, 2], len(label) // 3)
    zeros = np.zeros_like(label)
    plain = Predictions(zeros, seed_index, label, axis, zeros, logit)
    shifted = plain.with_logits(logit + 10.0 * axis)
    found = statistics.headline(shifted)
    areas = [statistics.auc_estimate(plain.where(axis == a).wins)["value"] for a in range(3)]
    assert found["within_axis"]["value"] == pytest.approx(np.mean(areas))
    assert found["within_axis"] == statistics.headline(plain)["within_axis"]
    assert found["auc"]["value"] < found["within_axis"]["value"] - 0.05


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
UNBOUNDED = {"mean_difference"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seeds", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", [*KINDS, "ties"])
def test_intervals_stay_in_the_range_and_contain_the_value(kind: str, seeds: int) -> None:
    rng = np.random.default_rng(8)
    for _ in range(10):
        logit, other = (extreme_logits(rng, some, seeds) for some in (kind, rng.choice(KINDS)))
        label, _, seed_index = draw(rng, seeds, 3)
        network, baseline = (predictions(label, some, seed_index) for some in (logit, other))
        found = statistics.slice_metrics(network) | statistics.cube_metrics(network.cube_logits)
        gains = statistics.difference(network, baseline)
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
        curves = statistics.curves(network, np.linspace(0, 1, 5))
        value, low, high = (curves[key] for key in ("tpr", "low", "high"))
        if seeds < statistics.MIN_SEEDS:
            assert np.isnan([low, high]).all()
        else:
            assert np.all((low >= 0) & (low <= value + 1e-12) & (value - 1e-12 <= high) & (high <= 1))


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
        "gain in auc": auc - weaker_auc,
        "gain in accuracy": accuracy - weaker_accuracy,
    }
    rng, covered = np.random.default_rng(10), defaultdict(list)
    for _ in range(400):
        label, logit, seed_index = draw(rng, seeds, slices, gap, shared, own, scatter)
        baseline = logit - (1 - weaker) * gap * (label - 0.5) + rng.normal(0, noise, len(logit))
        network, other = (predictions(label, some, seed_index) for some in (logit, baseline))
        found = statistics.headline(network) | statistics.cube_metrics(network.cube_logits)
        gains = statistics.difference(network, other)
        found |= {f"gain in {name}": gain for name, gain in gains.items()}
        for name, truth in truths.items():
            covered[name].append(found[name]["low"] <= truth <= found[name]["high"])
    shares = {name: np.mean(hits) for name, hits in covered.items()}
    assert all(0.92 <= share <= 0.985 for share in shares.values()), shares


# Permutation tests


def wins_of(label: np.ndarray, logit: np.ndarray, seed_index: np.ndarray) -> np.ndarray:
    return predictions(label, logit, seed_index).wins


def swap_p_value(wins: np.ndarray) -> float:
    return statistics.max_p_values([wins])[0]


def draw_twins(
    rng: np.random.Generator, seeds: int, gap: float = 0.0, slices: int = 6
) -> tuple[np.ndarray, ...]:
    """Labels, logits and seed index; twins share most of the scatter between cubes and between slices."""
    shared = rng.normal(0, 2, (seeds, 1, 1)) + rng.normal(0, 1, (seeds, 1, slices))
    own = rng.normal(0, 0.5, (seeds, 2, 1)) + rng.normal(0, 1, (seeds, 2, slices))
    logits = shared + own + gap * np.array([-0.5, 0.5])[:, None]
    label = np.broadcast_to(np.array([0, 1])[:, None], logits.shape)
    return label.ravel(), logits.ravel(), np.repeat(np.arange(seeds), 2 * slices)


def test_relabelings_are_all_of_them_up_to_twelve_seeds() -> None:
    for seeds in (1, 3, 12):
        found = statistics.relabelings(seeds)
        assert len(np.unique(found, axis=0)) == len(found) == 2**seeds
        assert not found[0].any()


def test_relabeling_counts_equals_relabeling_slices() -> None:
    label, logit, seed_index = draw_twins(np.random.default_rng(1), 4)
    logit = np.round(logit)  # with ties
    exchanged = statistics.relabelings(4)
    found = statistics.relabeled_auc(wins_of(label, logit, seed_index), exchanged)
    for area, some in zip(found, exchanged, strict=True):
        relabelled = np.where(some[seed_index], 1 - label, label)
        assert area == statistics.leave_one_out_auc(wins_of(relabelled, logit, seed_index))[0]


@pytest.mark.parametrize(("seeds", "smallest"), [(1, 1 / 2), (8, 1 / 2**8), (20, 1 / 10_001)])
def test_a_clear_signal_has_the_smallest_p_value(seeds: int, smallest: float) -> None:
    label, _, seed_index = draw_twins(np.random.default_rng(2), seeds)
    logit = label.astype(np.float64)
    assert swap_p_value(wins_of(label, logit, seed_index)) == smallest
    assert swap_p_value(wins_of(label, -logit, seed_index)) == 1  # one-sided
    assert swap_p_value(wins_of(label, 0 * logit, seed_index)) == 1


@pytest.mark.parametrize("seeds", [7, 14])
def test_p_values_are_uniform_without_a_signal(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 500)
    rng = np.random.default_rng(4)
    found = np.array([swap_p_value(wins_of(*draw_twins(rng, seeds))) for _ in range(600)])
    for level in (0.05, 0.25, 0.5, 0.75):
        # Three standard errors of a share of 600, plus the steps of the p-value.
        assert np.mean(found <= level) == pytest.approx(
            level, abs=3 * np.sqrt(level * (1 - level) / 600) + 0.01
        )


def test_the_best_of_many_trials_is_adjusted() -> None:
    """Six networks without a signal on the same seeds: the best is significant in 5 % of simulations."""
    rng = np.random.default_rng(6)
    alone, adjusted = [], []
    for _ in range(200):
        label, logit, seed_index = draw_twins(rng, 7)
        trials = [wins_of(label, logit + rng.normal(0, 3, len(logit)), seed_index) for _ in range(6)]
        single = [swap_p_value(wins) for wins in trials]
        together = statistics.max_p_values(trials)
        assert all(several >= one for one, several in zip(single, together, strict=True))
        alone.append(min(single) <= 0.05)
        adjusted.append(min(together) <= 0.05)
    assert np.mean(alone) > 0.12
    assert np.mean(adjusted) == pytest.approx(0.05, abs=0.04)
