"""Which modes the mean difference between twins comes from.

Delta is the mean logit of GR slices minus that of their Newtonian twins. Exchanging the modes of a group
between twins turns it into Delta'. A network whose logit is a sum over groups has Delta' = Delta - 2 Delta_b,
where Delta_b is the part of the group, so Delta_b = (Delta - Delta') / 2. The shares Delta_b / Delta of
groups that partition all modes then sum to one. An interaction of two groups counts half for each of them;
the remainder comes from interactions of three or more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import statistics
from analysis.interventions import GROUPS
from analysis.statistics import Estimate
from training.metrics import Predictions

Floats = NDArray[np.float64]

DRIVERS = ("mean", "large_scales", "small_scales")


def twin_difference(predictions: Predictions) -> Floats:
    """Mean logit of the GR slices minus that of the Newtonian ones, of each seed: (seeds,)."""
    newton, gr = predictions.cube_logits.T
    return gr - newton


def shares(predictions: Predictions, unchanged: Floats, exchanged: Floats) -> list[Estimate]:
    """Delta_b / Delta of each group, with paired jackknife intervals, and last the remainder.

    `unchanged` (slices,) are the logits of the slices of `predictions`, `exchanged` (slices, groups) those
    after the exchange of each group.
    """
    return _shares(*_parts(predictions, unchanged, exchanged))


def _parts(predictions: Predictions, unchanged: Floats, exchanged: Floats) -> tuple[Floats, Floats]:
    """Delta (seeds,) and Delta_b (seeds, groups) of each seed."""
    whole, *after = (twin_difference(predictions.with_logits(logits)) for logits in (unchanged, *exchanged.T))
    return whole, (whole[:, None] - np.stack(after, axis=1)) / 2


def _shares(whole: Floats, parts: Floats) -> list[Estimate]:
    parts = np.column_stack([parts, whole - parts.sum(1)])
    return [statistics.ratio_estimate(part, whole, "real") for part in parts.T]


def attribute(predictions: Predictions, unchanged: Floats, exchanged: Floats) -> dict[str, Any]:
    """Shares of GROUPS and the `remainder`, and the mean twin `difference` Delta in logits.

    `drivers` are the shares of the parts that the first finding compares: `mean`, `large_scales` and
    `small_scales`, the sum of the three directions. `lead` is the largest of them less the second.
    """
    whole, parts = _parts(predictions, unchanged, exchanged)
    drivers = np.column_stack([parts[:, 0], parts[:, 1], parts[:, 2:].sum(1)])
    second, first = np.argsort(drivers.sum(0) * np.sign(whole.sum()))[-2:]
    return dict(zip((*GROUPS, "remainder"), _shares(whole, parts), strict=True)) | {
        "difference": statistics.mean_estimate(whole),
        "drivers": {
            name: statistics.ratio_estimate(part, whole, "real")
            for name, part in zip(DRIVERS, drivers.T, strict=True)
        },
        "lead": statistics.ratio_estimate(drivers[:, first] - drivers[:, second], whole, "real"),
    }
