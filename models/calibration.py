"""Calibration of logits on validation seeds: logits -> probabilities of General Relativity."""

from __future__ import annotations

from system import UserError

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """The probability of General Relativity is sigmoid((logit - threshold) / temperature).

    It exceeds 1/2 where a logit exceeds `threshold`. `cubes` is the same for the mean logit of a cube's
    slices, which varies far less than single logits do; None if it was not fitted.
    """

    temperature: float
    threshold: float
    cubes: Calibration | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The inverse of `dataclasses.asdict`; `cubes` may be missing."""
        cubes = values.get("cubes")
        return cls(
            values["temperature"], values["threshold"], None if cubes is None else cls.from_dict(cubes)
        )

    def probability(self, logits: Tensor) -> Tensor:
        """Logits -> calibrated probabilities of General Relativity, of the same shape."""
        return torch.sigmoid((logits - self.threshold) / self.temperature)


def fit_calibration(
    logits: ArrayLike, labels: ArrayLike, cube_logits: ArrayLike | None = None
) -> Calibration | None:
    """Fit temperature and threshold to validation logits (n,) and labels (n,) by maximum likelihood.

    This is Platt scaling (Platt 1999, Advances in Large Margin Classifiers): a logistic regression on the
    logit, with a positive slope and without a penalty. `cube_logits` (seeds, 2) are the mean logits of the
    validation cubes, Newtonian gravity first, to which `cubes` is fitted. Returns None if no positive slope
    fits, because higher logits do not go with General Relativity on the validation seeds. Raises UserError
    if scikit-learn is not installed.
    """
    labels = np.asarray(labels)
    slices = _fit(np.asarray(logits, np.float64), labels, np.ones(len(labels)))
    if slices is None or cube_logits is None:
        return slices
    means = np.asarray(cube_logits, np.float64)
    return replace(slices, cubes=_fit_regularized(means.ravel(), np.tile([0, 1], len(means))))


def _fit_regularized(logits: Floats, labels: Integers) -> Calibration | None:
    """As `_fit`, with Platt's targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2) instead of the labels (n,).

    Few cubes are often separated without error. Maximum likelihood would be certain of every further cube
    then; these targets, the means of a uniform prior over the share of errors, keep the slope finite.
    """
    positive = int(labels.sum())
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2))
    # A target between the labels is each sample with both labels, weighted.
    weights = np.concatenate([target, 1 - target])
    return _fit(np.tile(logits, 2), np.repeat([1, 0], len(labels)), weights)


def _fit(logits: Floats, labels: Integers, weights: Floats) -> Calibration | None:
    """Logistic regression of labels on logits, with weights; all (n,). None without a positive slope."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError('calibration needs scikit-learn: pip install -e ".[evaluation]"') from error
    center, scale = float(logits.mean()), float(logits.std())
    if scale == 0:
        return None
    # The solver's tolerance is absolute: logits of any scale converge alike once they are standardized.
    model = LogisticRegression(C=np.inf, tol=1e-8).fit((logits[:, None] - center) / scale, labels, weights)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        return None
    return Calibration(temperature=scale / slope, threshold=center - scale * intercept / slope)
