"""Calibration of logits on validation seeds: logits -> probabilities of General Relativity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from models.errors import ModelError


@dataclass(frozen=True)
class Calibration:
    """The probability of General Relativity is sigmoid((logit - threshold) / temperature).

    It exceeds 1/2 where a logit exceeds `threshold`. The same threshold applies to the mean logit of a cube's
    slices: it lies midway between the two classes, and so does the mean of their logits.
    """

    temperature: float
    threshold: float

    def probability(self, logits: Tensor) -> Tensor:
        """Logits -> calibrated probabilities of General Relativity, of the same shape."""
        return torch.sigmoid((logits - self.threshold) / self.temperature)


def fit_calibration(logits: ArrayLike, labels: ArrayLike) -> Calibration | None:
    """Fit temperature and threshold to validation logits (n,) and labels (n,) by maximum likelihood.

    This is Platt scaling (Platt 1999, Advances in Large Margin Classifiers): a logistic regression on the
    logit, with a positive slope and without a penalty. Returns None if no positive slope fits, because higher
    logits do not go with General Relativity on the validation seeds. Raises ModelError if scikit-learn is not
    installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ModelError('calibration needs scikit-learn: pip install -e ".[evaluation]"') from error
    logits = np.asarray(logits, np.float64)
    center, scale = float(logits.mean()), float(logits.std())
    if scale == 0:
        return None
    # The solver's tolerance is absolute: logits of any scale converge alike once they are standardized.
    model = LogisticRegression(C=np.inf, tol=1e-8).fit((logits[:, None] - center) / scale, labels)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        return None
    return Calibration(temperature=scale / slope, threshold=center - scale * intercept / slope)
