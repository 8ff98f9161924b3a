"""How often 95 % intervals contain the true value: a simulation with known truth.

    python benchmarks/interval_coverage.py                                  the table of docs/evaluation.md
    python benchmarks/interval_coverage.py --simulations 100 --seeds 8 24   a rough one in a few minutes

Networks are drawn at random from three regimes: `faint` (the scatter between cubes is about 3 times the mean
difference of twins), `medium` and `strong` (the cubes nearly separate). The logit of a slice is

    scale * (-1/2 or 1/2 by gravity + offset + offset of the axis + scatter of the cube + of the slice)

as in networks on simulations. Twins share their scatter but for 1e-4 to 1e-3 of its variance. Cubes have
heavy tails (t distribution with 5 degrees of freedom), axes have offsets, and adjacent slices of an axis are
correlated. The baseline of differences has a smaller difference of twins, and scatter that is correlated with
the network's. True values come from TRUTH_SEEDS simulated seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.special import expit
from scipy.stats import norm
from sklearn import metrics

sys.path.insert(0, str(Path(__file__).parents[1]))

from analysis import statistics
from training.metrics import Predictions

Floats = NDArray[np.float64]

REGIMES = {  # ranges of the slice AUC and of the cube AUC
    "faint": ((0.53, 0.56), (0.56, 0.62)),
    "medium": ((0.56, 0.61), (0.65, 0.85)),
    "strong": ((0.60, 0.65), (0.88, 0.97)),
}
NETWORKS = 10  # of each regime
SLICES = 16  # of each axis of a cube
TRUTH_SEEDS = 10_000


@dataclass(frozen=True)
class Network:
    """Distribution of logits in units of the mean difference of twins."""

    cube: float
    """Standard deviation over cubes."""
    slice: float
    """Standard deviation over the slices of a cube."""
    twins: float
    """Share of both variances that twins do not have in common."""
    neighbors: float
    """Correlation of adjacent slices."""
    axes: Floats
    """Offsets of slices perpendicular to the three axes."""
    offset: float
    scale: float
    """Logits per unit."""
    difference: float = 1.0
    """Mean difference of twins: below 1 in a baseline."""

    @classmethod
    def draw(cls, regime: str, rng: np.random.Generator) -> Network:
        """A network of one regime."""
        total, cube = (1 / (2 * norm.ppf(rng.uniform(*auc)) ** 2) for auc in REGIMES[regime])
        return cls(
            cube=np.sqrt(cube),
            slice=np.sqrt(total - cube),
            twins=10 ** rng.uniform(-4, -3),
            neighbors=rng.uniform(0.3, 0.9),
            axes=rng.normal(0, 0.3, 3) * np.sqrt(total),
            offset=rng.normal(0, 0.4) * np.sqrt(cube),
            scale=np.exp(rng.uniform(0, 1)) / total,  # calibrated, or overconfident by up to e
        )

    def predict(self, cube: Floats, slices: Floats) -> Predictions:
        """Predictions from standardized scatter of cubes (seeds, 2, 1, 1) and slices (seeds, 2, 3, n)."""
        gravity = np.array([-0.5, 0.5])[:, None, None] * self.difference
        logits = gravity + self.offset + self.axes[:, None] + self.cube * cube + self.slice * slices
        seed, label, axis, position = (index.ravel() for index in np.indices(logits.shape))
        return Predictions(np.arange(seed.size), seed, label, axis, position, self.scale * logits.ravel())


def scatter(network: Network, seeds: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Standardized scatter of cubes (seeds, 2, 1, 1) and of slices (seeds, 2, 3, SLICES) of both twins."""
    cube = rng.standard_t(5, (seeds, 2, 1, 1)) * np.sqrt(3 / 5)
    white = rng.normal(size=(seeds, 2, 3, SLICES))
    white[..., 1:] *= np.sqrt(1 - network.neighbors**2)
    parts = cube, lfilter([1], [1, -network.neighbors], white)  # a first-order autoregressive process
    share = np.sqrt(network.twins)
    first, second = (
        np.sqrt(1 - network.twins) * part[:, :1] + share * own
        for part, own in zip(parts, (rng.normal(size=cube.shape), rng.normal(size=white.shape)), strict=True)
    )
    return first, second


def simulate(networks: list[Network], seeds: int, rng: np.random.Generator) -> list[Predictions]:
    """Predictions of a network and its baseline for the same seeds."""
    first, second = (scatter(networks[0], seeds, rng) for _ in networks)
    mixed = [0.8 * part + 0.6 * other for part, other in zip(first, second, strict=True)]
    return [networks[0].predict(*first), networks[1].predict(*mixed)]


def truths(predictions: Predictions) -> dict[str, float]:
    """Every metric of many seeds."""
    label, logit, cubes = predictions.label, predictions.logit, predictions.cube_logits
    probability, predicted = expit(logit), logit > 0
    cube_labels = np.tile([0, 1], len(cubes))
    axes = [predictions.axis == axis for axis in range(3)]
    return {
        "auc": metrics.roc_auc_score(label, logit),
        "within_axis": np.mean([metrics.roc_auc_score(label[axis], logit[axis]) for axis in axes]),
        "accuracy": metrics.accuracy_score(label, predicted),
        "precision": metrics.precision_score(label, predicted),
        "recall": metrics.recall_score(label, predicted),
        "fpr": predicted[label == 0].mean(),
        "f1": metrics.f1_score(label, predicted),
        "brier_score": metrics.brier_score_loss(label, probability),
        "log_loss": metrics.log_loss(label, probability),
        "average_precision": metrics.average_precision_score(label, logit),
        "cube_auc": metrics.roc_auc_score(cube_labels, cubes.ravel()),
        "cube_accuracy": metrics.accuracy_score(cube_labels, cubes.ravel() > 0),
        "pair_accuracy": np.mean(cubes[:, 1] > cubes[:, 0]),
        "mean_difference": np.mean(cubes[:, 1] - cubes[:, 0]),
    }


def main() -> None:
    """Print the share of intervals that contain the true value: mean over the regimes, then each regime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[8, 24, 100])
    parser.add_argument("--simulations", type=int, default=500, help="per regime (default: %(default)s)")
    options = parser.parse_args()
    covered: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index, regime in enumerate(REGIMES):
        pairs, known = [], []
        for number in range(NETWORKS):
            rng = np.random.default_rng([number, index])
            network = Network.draw(regime, rng)
            weaker = replace(network, difference=rng.uniform(0.6, 1), offset=network.offset / 2)
            pairs.append([network, weaker])
            values, others = map(truths, simulate(pairs[-1], TRUTH_SEEDS, rng))
            known.append(values | {f"difference of {key}": values[key] - others[key] for key in values})
        for seeds in options.seeds:
            hits = defaultdict(list)
            for number in range(options.simulations):
                rng = np.random.default_rng([seeds, number, index])
                predictions, baseline = simulate(pairs[number % NETWORKS], seeds, rng)
                estimates = statistics.slice_metrics(predictions)
                estimates["within_axis"] = statistics.headline(predictions)["within_axis"]
                estimates |= statistics.cube_metrics(predictions.cube_logits)
                differences = statistics.difference(predictions, baseline)
                estimates |= {f"difference of {key}": value for key, value in differences.items()}
                for key, truth in known[number % NETWORKS].items():
                    if key in estimates and (low := estimates[key]["low"]) is not None:
                        hits[key].append(low <= truth <= estimates[key]["high"])
            for key, inside in hits.items():
                covered[key][seeds].append(float(np.mean(inside)))
            print(f"{regime}, {seeds} seeds", file=sys.stderr)
    print(f"| 95 % interval of | {' | '.join(f'{seeds} seeds' for seeds in options.seeds)} |")
    print("|---" * (len(options.seeds) + 1) + "|")
    for key, shares in covered.items():
        cells = [
            f"{np.mean(shares[seeds]):.3f} ({', '.join(f'{share:.3f}' for share in shares[seeds])})"
            for seeds in options.seeds
        ]
        print(f"| {key} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
