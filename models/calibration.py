"""Calibration of logits on validation seeds: logits -> probabilities of General Relativity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """The probability of General Relativity is sigmoid((logit - threshold) / temperature).

    It exceeds 1/2 where a logit exceeds `threshold`.
    """

    temperature: float = 1.0
    threshold: float = 0.0
    cubes: Calibration | None = None
    """That of the mean logit of a cube's slices, which varies far less than single logits do."""
    axes: tuple[Calibration | None, ...] = ()
    """Those of slices perpendicular to array axes 0, 1 and 2. Where missing, that of all slices holds."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Calibration | None:
        """The inverse of `dataclasses.asdict`; `cubes` and `axes` may be missing. None for None."""
        if values is None:
            return None
        axes = tuple(cls.from_dict(axis) for axis in values.get("axes", ()))
        return cls(values["temperature"], values["threshold"], cls.from_dict(values.get("cubes")), axes)

    def log_odds(self, logits: Tensor | Floats, axes: ArrayLike | Tensor | None = None) -> Tensor:
        """Logits -> calibrated log odds of General Relativity, of the same shape.

        `axes` are the axes perpendicular to the slices, of the shape of `logits` or one for all.
        """
        logits = torch.as_tensor(logits)
        if axes is None or not self.axes:
            return (logits - self.threshold) / self.temperature
        by_axis = [(c.threshold, c.temperature) for c in (axis or self for axis in self.axes)]
        threshold, temperature = logits.new_tensor(by_axis).T[:, torch.as_tensor(axes)]
        return (logits - threshold) / temperature

    def probability(self, logits: Tensor | Floats, axes: ArrayLike | Tensor | None = None) -> Tensor:
        """Logits -> calibrated probabilities of General Relativity; see `log_odds`."""
        return torch.sigmoid(self.log_odds(logits, axes))


def fit_calibration(
    logits: ArrayLike, labels: ArrayLike, cube_logits: ArrayLike | None = None, axes: ArrayLike | None = None
) -> Calibration | None:
    """Fit temperature and threshold to validation logits (n,) and labels (n,) by maximum likelihood.

    This is Platt scaling (Platt 1999, Advances in Large Margin Classifiers): a logistic regression on the
    logit, with a positive slope and without a penalty. `cube_logits` (seeds, 2) are the mean logits of the
    validation cubes, Newtonian gravity first, to which `cubes` is fitted; `axes` (n,) are the axes
    perpendicular to the slices. Returns None if no positive slope fits, because on the validation seeds
    General Relativity does not have the higher logits.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    calibration = _fit(logits, labels)
    if calibration is not None and axes is not None:
        masks = [np.asarray(axes) == axis for axis in range(3)]
        fits = tuple(_fit(logits[mask], labels[mask]) if mask.any() else None for mask in masks)
        calibration = replace(calibration, axes=fits)
    if calibration is None or cube_logits is None:
        return calibration
    # Few cubes are often separated without error. Maximum likelihood would be certain of every further cube
    # then. Platt's targets (N + 1) / (N + 2) and 1 / (N + 2) for N cubes of each label, the means of a
    # uniform prior over the share of errors, keep the slope finite. Each cube gets both labels, weighted.
    means = np.asarray(cube_logits, np.float64)
    target = (np.array([0, len(means)]) + 1) / (len(means) + 2)
    weights = np.stack([target, 1 - target]).repeat(len(means), axis=0)
    labels = np.array([1, 0]).repeat(means.size)
    return replace(calibration, cubes=_fit(np.tile(means.ravel(), 2), labels, weights.ravel()))


def _fit(logits: Floats, labels: NDArray[np.int64], weights: Floats | None = None) -> Calibration | None:
    """Logistic regression of labels on logits, with weights; all (n,). None without a positive slope."""
    from sklearn.linear_model import LogisticRegression  # takes a second, which training need not wait

    center, scale = float(logits.mean()), float(logits.std())
    if scale == 0:
        return None
    # The solver's tolerance is absolute: logits of any scale converge alike once they are standardized.
    model = LogisticRegression(C=np.inf, tol=1e-8).fit((logits[:, None] - center) / scale, labels, weights)
    slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        return None
    return Calibration(temperature=scale / slope, threshold=center - scale * intercept / slope)
