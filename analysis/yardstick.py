"""The yardstick: how far the power spectrum alone gets, by a logistic regression on log P(k).

A network that does not beat it has found nothing that a two-point statistic does not hold. The strength of
the regularisation is chosen by cross-validation over seeds, so that twins and slices of a simulation never
stand on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.statistics import SeedBootstrap, cube_estimates, difference, slice_estimates
from metrics import Predictions

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

STRENGTHS = tuple(10.0**power for power in range(-4, 7))  # inverse strengths of the L2 penalty
FOLDS = 5


def _regression(strength: float) -> Pipeline:
    # Newton's method: neighbouring k are so correlated that first-order solvers hardly move along contrasts
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, solver="newton-cholesky", max_iter=200)
    )


@dataclass(frozen=True)
class Spectra:
    """Power spectra of simulations, in the order of seeds, gravities (Newton first) and sample ids."""

    seed: Integers  # (slices,)
    label: Integers  # (slices,)
    slices: Floats  # (slices, shells)
    cubes: Floats  # (seeds, 2, shells)


def fit(spectra: Floats, labels: Integers, seeds: Integers) -> tuple[Pipeline, float]:
    """A logistic regression on log P(k) (samples, shells), labels 1 = GR, and its inverse strength."""
    features = np.log(spectra)
    simulations = len(np.unique(seeds))
    if simulations < 2:  # nothing to cross-validate with
        return _regression(1.0).fit(features, labels), 1.0
    folds = list(GroupKFold(min(FOLDS, simulations)).split(features, labels, seeds))

    def held_out_loss(strength: float) -> float:
        losses = []
        for train, test in folds:
            regression = _regression(strength).fit(features[train], labels[train])
            stated = regression.predict_proba(features[test])[:, 1]
            losses.append(log_loss(labels[test], stated, labels=[0, 1]))
        return float(np.mean(losses))

    best = min(STRENGTHS, key=held_out_loss)
    return _regression(best).fit(features, labels), best


def logits(regression: Pipeline, spectra: Floats) -> Floats:
    """Logits of samples (samples, shells); positive means General Relativity."""
    return regression.decision_function(np.log(spectra))


def compare(
    network: Predictions, known: Spectra, unknown: Spectra, bootstrap: SeedBootstrap
) -> dict[str, Any]:
    """How the yardsticks, trained on `known`, do on `unknown`, and what the network gains over the first.

    `network` holds the same slices as `unknown`, in the same order.
    """
    by_slices, strength = fit(known.slices, known.label, known.seed)
    slices = network.with_logits(logits(by_slices, unknown.slices))
    seeds, _, shells = known.cubes.shape
    twins = np.tile([0, 1], seeds), np.repeat(np.arange(seeds), 2)
    by_cubes, cube_strength = fit(known.cubes.reshape(-1, shells), *twins)
    return {
        "strength": strength,
        "cube_strength": cube_strength,
        "slices": slice_estimates(slices, bootstrap),
        "slices_by_cube": cube_estimates(slices.cube_logits, bootstrap),
        "cubes": cube_estimates(
            logits(by_cubes, unknown.cubes.reshape(-1, shells)).reshape(-1, 2), bootstrap
        ),
        "gain": difference(network, slices, bootstrap),
    }
