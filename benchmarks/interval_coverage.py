"""How often 95 % intervals contain the true value, and how often tests reject: a simulation with known truth.

    python benchmarks/interval_coverage.py                                  the tables of docs/evaluation.md
    python benchmarks/interval_coverage.py --simulations 100 --seeds 8 24   rough ones in about a minute

Networks are drawn at random from three regimes: `faint` (the scatter between cubes is about 3 times the mean
difference of twins), `medium` and `strong` (the cubes nearly separate). The logit of a slice is

    scale * (-1/2 or 1/2 by gravity + offset + shared cube + own cube + shared slice + own slice)

Twins share one part of the scatter between cubes, normal or skewed, and one of the scatter between slices at
the same place; the other parts are their own. The baseline of differences has the same shared scatter, a
smaller difference of twins, and own scatter independent of the network's. True values are integrals over the
distribution of the logits, not samples.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr
from scipy.stats import binomtest, gamma, norm

sys.path.insert(0, str(Path(__file__).parents[1]))

from analysis import statistics
from training.metrics import Predictions

Floats = NDArray[np.float64]
Truths = dict[str, float]

REGIMES = {  # ranges of the slice AUC and of the cube AUC
    "faint": ((0.53, 0.56), (0.56, 0.62)),
    "medium": ((0.56, 0.61), (0.65, 0.85)),
    "strong": ((0.60, 0.65), (0.88, 0.97)),
}
NETWORKS = 25  # of each regime
BAND_FPR = 0.2  # false positive rate at which the band around the ROC curve is tested
LEVEL = 0.05  # of the tests


@dataclass(frozen=True)
class Network:
    """Distribution of logits in units of the mean difference of twins; standard deviations of the parts."""

    shared_cube: float
    own_cube: float
    shared_slice: float
    own_slice: float
    offset: float = 0.0
    skewness: float = 0.0
    """Of the scatter between cubes that twins share: zero, or that of a gamma distribution."""
    scale: float = 1.0
    """Logits per unit."""
    difference: float = 1.0
    """Mean difference of twins: below 1 in a baseline, 0 without a signal."""

    @classmethod
    def draw(cls, regime: str, rng: np.random.Generator) -> Network:
        """A network of one regime."""
        slice_range, cube_range = REGIMES[regime]
        slice_auc, cube_auc = rng.uniform(*slice_range), rng.uniform(*cube_range)
        total, cube = (1 / (2 * norm.ppf(auc) ** 2) for auc in (slice_auc, cube_auc))
        shared_cube, shared_slice = rng.uniform(0.6, 0.95), rng.uniform(0.3, 0.9)
        return cls(
            shared_cube=np.sqrt(cube * shared_cube),
            own_cube=np.sqrt(cube * (1 - shared_cube)),
            shared_slice=np.sqrt((total - cube) * shared_slice),
            own_slice=np.sqrt((total - cube) * (1 - shared_slice)),
            offset=rng.normal(0, 0.4) * np.sqrt(cube),
            skewness=rng.choice([0, 0.5, 1]),
            scale=np.exp(rng.uniform(0, 1)) / total,  # calibrated, or overconfident by up to e
        )

    def baseline(self, rng: np.random.Generator) -> Network:
        """A weaker network with the same shared scatter."""
        return replace(self, difference=rng.uniform(0.6, 1), offset=self.offset / 2)

    def _skewed(self, uniform: Floats) -> Floats:
        """Quantiles of the shared cube scatter."""
        if not self.skewness:
            return self.shared_cube * norm.ppf(uniform)
        shape = 4 / self.skewness**2
        return self.shared_cube * (gamma.ppf(uniform, shape) - shape) / np.sqrt(shape)

    def sample(self, shared: dict[str, Floats], rng: np.random.Generator) -> Floats:
        """Logits (seeds, 2, slices of a cube), Newton first, from shared uniform and normal numbers."""
        seeds, slices = shared["slice"].shape
        gravity = np.array([-0.5, 0.5])[:, None] * self.difference
        cubes = self._skewed(shared["cube"])[:, None, None] + self.own_cube * rng.normal(size=(seeds, 2, 1))
        some = self.shared_slice * shared["slice"][:, None] + self.own_slice * rng.normal(
            size=(seeds, 2, slices)
        )
        return self.scale * (gravity + self.offset + cubes + some)

    def distributions(self, own: float, grid: Floats) -> Floats:
        """Cumulative distributions of one logit / scale, (2, grid), Newton first; `own`: Gaussian scatter."""
        mean = (np.array([-0.5, 0.5]) * self.difference + self.offset)[:, None]
        if not self.skewness:
            return ndtr((grid - mean) / np.hypot(own, self.shared_cube))
        nodes = self._skewed((np.arange(200) + 0.5) / 200)
        return ndtr((grid - mean[..., None] - nodes[:, None]) / own).mean(1)

    def truths(self, slices: int) -> Truths:
        """True values of every estimated quantity, for cubes of `slices` slices."""
        own = float(np.sqrt(self.own_cube**2 + self.shared_slice**2 + self.own_slice**2))
        reach = 8 * float(np.hypot(own, self.shared_cube)) + 1
        grid = np.linspace(-reach, reach, 1001)  # an odd number: zero is on the grid
        newton, gr = self.distributions(own, grid)
        tpr, fpr = (1 - np.interp(0, grid, of) for of in (gr, newton))
        mass = [np.diff(of) for of in (newton, gr)]
        middle = self.scale * (grid[1:] + grid[:-1]) / 2
        above = [1 - (of[1:] + of[:-1]) / 2 for of in (newton, gr)]
        probability = expit(middle)
        edges = np.linspace(0, 1, statistics.CALIBRATION_BINS + 1)[1:-1]
        at = [np.interp(np.log(edges / (1 - edges)) / self.scale, grid, of) for of in (newton, gr)]
        gr_share = np.diff(at[1], prepend=0, append=1) / 2
        fine = np.interp(
            np.log(edges / (1 - edges)), middle, np.cumsum(probability * (mass[0] + mass[1]) / 2)
        )
        predicted = np.diff(fine, prepend=0, append=np.sum(probability * (mass[0] + mass[1]) / 2))
        mean_own = float(np.sqrt(self.own_cube**2 + (self.shared_slice**2 + self.own_slice**2) / slices))
        twin_own = float(np.sqrt(2 * (self.own_cube**2 + self.own_slice**2 / slices)))
        cubes = self.distributions(mean_own, grid)
        return {
            "slice AUC": float(np.sum(above[1] * mass[0])),
            "slice accuracy": (tpr + 1 - fpr) / 2,
            "precision": tpr / (tpr + fpr),
            "recall (tpr)": tpr,
            "fpr": fpr,
            "F1": 2 * tpr / (tpr + fpr + 1),
            "Brier score": float(np.sum(probability**2 * mass[0] + (1 - probability) ** 2 * mass[1]) / 2),
            "log loss": float(
                np.sum(np.logaddexp(0, middle) * mass[0] + np.logaddexp(0, -middle) * mass[1]) / 2
            ),
            "calibration error": float(np.abs(predicted - gr_share).sum()),
            "average precision": float(np.sum(above[1] / (above[0] + above[1] + 1e-300) * mass[1])),
            "tpr at fpr 0.2": 1 - float(np.interp(np.interp(1 - BAND_FPR, newton, grid), grid, gr)),
            "cube AUC": float(np.sum((1 - (cubes[1][1:] + cubes[1][:-1]) / 2) * np.diff(cubes[0]))),
            "cube accuracy": float(1 - np.interp(0, grid, cubes[1]) + np.interp(0, grid, cubes[0])) / 2,
            "pair accuracy": float(ndtr(self.difference / twin_own)),
            "mean twin difference": self.scale * self.difference,
            "separation": self.difference / twin_own,
            "contrast": self.difference / float(np.hypot(mean_own, self.shared_cube)),
        }


NAMES = {
    "auc": "slice AUC",
    "accuracy": "slice accuracy",
    "precision": "precision",
    "recall": "recall (tpr)",
    "fpr": "fpr",
    "f1": "F1",
    "brier_score": "Brier score",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
    "average_precision": "average precision",
    "cube_auc": "cube AUC",
    "cube_accuracy": "cube accuracy",
    "pair_accuracy": "pair accuracy",
    "mean_difference": "mean twin difference",
    "separation": "separation",
    "contrast": "contrast",
}


def predictions_of(logits: Floats) -> Predictions:
    """Logits (seeds, 2, slices of a cube), Newton first, as predictions."""
    seed, label, position = (part.ravel() for part in np.indices(logits.shape))
    return Predictions(np.arange(logits.size), seed, label, 0 * seed, position, logits.ravel())


def simulate(
    network: Network, baseline: Network, seeds: int, slices: int, rng: np.random.Generator
) -> dict[str, statistics.Estimate]:
    """Estimates of one simulated report."""
    shared = {"cube": rng.uniform(size=seeds), "slice": rng.normal(size=(seeds, slices))}
    logits, others = (some.sample(shared, rng) for some in (network, baseline))
    drawn, baseline_drawn = predictions_of(logits), predictions_of(others)
    found = statistics.slice_metrics(drawn) | statistics.cube_metrics(drawn.cube_logits)
    estimates = {name: found[key] for key, name in NAMES.items()}
    band = statistics.curves(drawn, np.array([BAND_FPR]))
    estimates["tpr at fpr 0.2"] = {"value": band["tpr"][0], "low": band["low"][0], "high": band["high"][0]}
    differences = statistics.difference(drawn, baseline_drawn)
    return estimates | {f"difference of {NAMES[key]}": gain for key, gain in differences.items()}


def rejections(network: Network, seeds: int, slices: int, rng: np.random.Generator) -> dict[str, bool]:
    """Which tests find, at the 5 % level, that a simulated network distinguishes the gravities."""
    shared = {"cube": rng.uniform(size=seeds), "slice": rng.normal(size=(seeds, slices))}
    logits = network.sample(shared, rng)
    cubes = logits.mean(2)
    right = int(np.sum((cubes > 0) == [False, True]))
    return {
        "twin swap, slice AUC": statistics.max_p_values([predictions_of(logits).wins])[0] <= LEVEL,
        "McNemar, cubes": statistics.mcnemar_p_value(cubes) <= LEVEL,
        "binomial, cubes, one trial per seed": binomtest(right // 2, seeds, 0.5, "greater").pvalue <= LEVEL,
    }


def networks(regime: str, slices: int) -> list[tuple[Network, Network, Truths]]:
    """NETWORKS networks of a regime, their baselines, and the true values for both."""
    found = []
    for number in range(NETWORKS):
        rng = np.random.default_rng([number, list(REGIMES).index(regime)])
        network = Network.draw(regime, rng)
        baseline = network.baseline(rng)
        truths, others = network.truths(slices), baseline.truths(slices)
        gains = {f"difference of {name}": truths[name] - others[name] for name in truths}
        found.append((network, baseline, truths | gains))
    return found


def coverage(sizes: list[int], simulations: int, slices: int) -> None:
    """Print the share of intervals that contain the true value: mean over the regimes, then each regime."""
    universe = {regime: networks(regime, slices) for regime in REGIMES}
    covered: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seeds in sizes:
        start = time.perf_counter()
        for regime, drawn in universe.items():
            hits = defaultdict(list)
            for number in range(simulations):
                rng = np.random.default_rng([seeds, number, list(REGIMES).index(regime)])
                network, baseline, truths = drawn[number % NETWORKS]
                for name, estimate in simulate(network, baseline, seeds, slices, rng).items():
                    if estimate["low"] is not None and estimate["high"] is not None:
                        hits[name].append(estimate["low"] <= truths[name] <= estimate["high"])
            for name, some in hits.items():
                covered[name][seeds].append(float(np.mean(some)))
        print(f"{seeds} seeds: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(f"| 95 % interval of | {' | '.join(f'{seeds} seeds' for seeds in sizes)} |")
    print("|---" * (len(sizes) + 1) + "|")
    for name, cells in covered.items():
        row = [
            f"{np.mean(cells[seeds]):.3f} ({', '.join(f'{share:.3f}' for share in cells[seeds])})"
            for seeds in sizes
        ]
        print(f"| {name} | {' | '.join(row)} |")


def power(sizes: list[int], simulations: int, slices: int) -> None:
    """Print how often each test rejects, without and with a signal."""
    print(f"\n| rejects at {LEVEL:.0%} | {' | '.join(f'{seeds} seeds' for seeds in sizes)} |")
    print("|---" * (len(sizes) + 1) + "|")
    table = defaultdict(list)
    for seeds in sizes:
        for regime in ("no signal", *REGIMES):
            found = defaultdict(list)
            for number in range(simulations):
                rng = np.random.default_rng([seeds, number, 9])
                network = Network.draw("faint" if regime == "no signal" else regime, rng)
                if regime == "no signal":
                    network = replace(network, difference=0.0)
                for test, rejected in rejections(network, seeds, slices, rng).items():
                    found[test].append(rejected)
            for test, outcomes in found.items():
                table[f"{test}: {regime}"].append(f"{np.mean(outcomes):.3f}")
    for name, row in table.items():
        print(f"| {name} | {' | '.join(row)} |")


def main() -> None:
    """Run the simulation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[8, 24, 100])
    parser.add_argument(
        "--simulations", type=int, default=700, help="per regime; the mean of three is then +-0.01"
    )
    parser.add_argument("--slices", type=int, default=48, help="slices per cube")
    options = parser.parse_args()
    coverage(options.seeds, options.simulations, options.slices)
    power(options.seeds, max(100, options.simulations // 4), options.slices)


if __name__ == "__main__":
    main()
