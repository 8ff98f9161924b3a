"""Baselines: logistic regressions on the logarithm of binned power spectra.

A network that does not exceed them has found nothing that a two-point statistic does not hold. The bins
decide what a baseline knows: `power_spectrum.shells` only scale, `power_spectrum.directions` also the
direction to the grid axes. The same code serves slices and cubes.

The strength of the regularisation is chosen by cross-validation over seeds, so that twins and slices of one
simulation are never in both parts.
"""

from __future__ import annotations

from system import UserError

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from analysis.power_spectrum import NO_POWER, measurable

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]

STRENGTHS = (1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6)  # inverse strengths of the L2 penalty
FOLDS = 5


@dataclass(frozen=True)
class Baseline:
    """A logistic regression on log P(k), labels 1 = GR.

    Attributes: `regression`; `strength`, the inverse strength of its penalty; `used` (bins,), the bins that
    hold power; `floor` (used bins,), the power below which a sample counts as having just that.
    """

    regression: Pipeline
    strength: float
    used: Bools
    floor: Floats

    @classmethod
    def fit(cls, power: Floats, modes: Floats, labels: Integers, seeds: Integers) -> Baseline:
        """Fit to P(k) `power` (samples, bins) with `modes` (bins,), `labels` and `seeds` (samples,).

        Bins whose power is a rounding error are left out. Raises UserError if no bin is left.
        """
        used = measurable(power, modes)
        if not used.any():
            raise UserError(NO_POWER)
        floor = 1e-6 * power[:, used].mean(0)
        features = np.log(np.maximum(power[:, used], floor))
        # Newton's method: neighbouring bins are so correlated that first-order solvers converge slowly
        regression = make_pipeline(
            StandardScaler(), LogisticRegression(solver="newton-cholesky", max_iter=200)
        )
        simulations = len(np.unique(seeds))
        # threads of a matrix product this small wait for each other longer than they compute
        with threadpool_limits(1):
            if simulations == 1:  # nothing to cross-validate with
                return cls(regression.fit(features, labels), 1.0, used, floor)
            search = GridSearchCV(
                regression,
                {"logisticregression__C": STRENGTHS},
                scoring="neg_log_loss",
                cv=GroupKFold(min(FOLDS, simulations)),
            ).fit(features, labels, groups=seeds)
        strength = float(search.best_params_["logisticregression__C"])
        return cls(search.best_estimator_, strength, used, floor)

    def logits(self, power: Floats) -> Floats:
        """Logits of samples with P(k) `power` (samples, bins): (samples,). Positive means GR."""
        return self.regression.decision_function(np.log(np.maximum(power[:, self.used], self.floor)))
