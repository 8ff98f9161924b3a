"""How often 95 % intervals contain the true value: a simulation with known truth.

    python benchmarks/interval_coverage.py                                  the table of docs/evaluation.md
    python benchmarks/interval_coverage.py --simulations 100 --seeds 8 24   a rough one in a few minutes

Networks are drawn at random from three regimes: `faint` (the scatter between cubes is about 3 times the mean
difference of twins), `medium` and `strong` (the cubes nearly separate). The logit of a slice is

    scale * (-1/2 or 1/2 by gravity + offset + shared cube + own cube + shared slice + own slice)

Twins share one part of the scatter between cubes, normal or skewed, and one of the scatter between slices at
the same place; the other parts are their own. The baseline of differences has the same shared scatter, a
smaller difference of twins, and own scatter independent of the network's. True values come from TRUTH_SEEDS
simulated seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
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
NETWORKS = 25  # of each regime
TRUTH_SEEDS = 10_000


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
    """Mean difference of twins: below 1 in a baseline."""

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

    def sample(self, cube: Floats, slices: Floats, rng: np.random.Generator) -> Predictions:
        """Predictions of seeds, from standardized scatter of their cubes (seeds,) and slices (seeds, n)."""
        seeds, count = slices.shape
        gravity = np.array([-0.5, 0.5])[:, None] * self.difference
        own = self.own_cube * rng.normal(size=(seeds, 2, 1))
        own = own + self.own_slice * rng.normal(size=(seeds, 2, count))
        shared = self.shared_cube * cube[:, None] + self.shared_slice * slices
        logits = self.scale * (gravity + self.offset + shared[:, None] + own)
        seed, label, position = (axis.ravel() for axis in np.indices(logits.shape))
        return Predictions(np.arange(seed.size), seed, label, np.zeros_like(seed), position, logits.ravel())


def simulate(networks: list[Network], seeds: int, slices: int, rng: np.random.Generator) -> list[Predictions]:
    """Predictions of networks with the same shared scatter on `seeds` simulated seeds."""
    if skewness := networks[0].skewness:
        shape = 4 / skewness**2
        cube = (rng.gamma(shape, size=seeds) - shape) / np.sqrt(shape)
    else:
        cube = rng.normal(size=seeds)
    scatter = rng.normal(size=(seeds, slices))
    return [network.sample(cube, scatter, rng) for network in networks]


def truths(predictions: Predictions) -> dict[str, float]:
    """Every metric of many seeds."""
    label, logit, cubes = predictions.label, predictions.logit, predictions.cube_logits
    probability, predicted = expit(logit), logit > 0
    cube_labels = np.tile([0, 1], len(cubes))
    return {
        "auc": metrics.roc_auc_score(label, logit),
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


def coverage(sizes: list[int], simulations: int, slices: int) -> None:
    """Print the share of intervals that contain the true value: mean over the regimes, then each regime."""
    covered: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index, regime in enumerate(REGIMES):
        pairs, known = [], []
        for number in range(NETWORKS):
            rng = np.random.default_rng([number, index])
            network = Network.draw(regime, rng)
            weaker = replace(network, difference=rng.uniform(0.6, 1), offset=network.offset / 2)
            pairs.append([network, weaker])
            values, others = map(truths, simulate(pairs[-1], TRUTH_SEEDS, slices, rng))
            known.append(values | {f"difference of {key}": values[key] - others[key] for key in values})
        for seeds in sizes:
            hits = defaultdict(list)
            for number in range(simulations):
                rng = np.random.default_rng([seeds, number, index])
                predictions, baseline = simulate(pairs[number % NETWORKS], seeds, slices, rng)
                estimates = statistics.slice_metrics(predictions)
                estimates |= statistics.cube_metrics(predictions.cube_logits)
                differences = statistics.difference(predictions, baseline)
                estimates |= {f"difference of {key}": value for key, value in differences.items()}
                for key, truth in known[number % NETWORKS].items():
                    if key in estimates and (low := estimates[key]["low"]) is not None:
                        hits[key].append(low <= truth <= estimates[key]["high"])
            for key, inside in hits.items():
                covered[key][seeds].append(float(np.mean(inside)))
            print(f"{regime}, {seeds} seeds", file=sys.stderr)
    print(f"| 95 % interval of | {' | '.join(f'{seeds} seeds' for seeds in sizes)} |")
    print("|---" * (len(sizes) + 1) + "|")
    for key, shares in covered.items():
        cells = [
            f"{np.mean(shares[seeds]):.3f} ({', '.join(f'{share:.3f}' for share in shares[seeds])})"
            for seeds in sizes
        ]
        print(f"| {key} | {' | '.join(cells)} |")


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


if __name__ == "__main__":
    main()
