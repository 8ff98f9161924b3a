"""On which scales the verdicts depend: numbers by wavenumber from the tables of `passes.scales`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.passes import columns
from analysis.spectra import INTERVENTIONS, Bands, Box
from analysis.statistics import LEVEL, SeedBootstrap, verdicts
from metrics import Predictions

Floats = NDArray[np.float64]


def by_wavenumber(
    slices: Predictions, table: Floats, bands: Bands, box: Box, bootstrap: SeedBootstrap
) -> dict[str, Any]:
    """Accuracy, AUC and pairs ranked correctly of `slices`, unchanged and after each intervention.

    `table` (slices, columns) is that of `passes.scales`. Wavenumbers are in h/Mpc, or waves per box where
    the box is not known; `edges` bound the bands, the first of which holds the mean alone.
    """
    places = columns(bands, box.size // 2)
    numbers: dict[str, Any] = {
        "unit": box.unit,
        "slices": len(slices),
        "edges": np.array(bands.edges) * box.fundamental,
        "cuts": bands.cuts(box),
        "centres": bands.centres(box),
        "none": verdicts(slices.with_logits(table[:, 0]), bootstrap),
    }
    for kind in INTERVENTIONS:
        found = [verdicts(slices.with_logits(logits), bootstrap) for logits in table[:, places[kind]].T]
        numbers[kind] = {key: [verdict[key] for verdict in found] for key in found[0]}
    return numbers


def power(
    slices: Predictions, table: Floats, cubes: Floats, bands: Bands, box: Box, bootstrap: SeedBootstrap
) -> dict[str, Any]:
    """Mean P(k) of the slices of both gravities, their ratio, and the gradient's share of power in each
    shell.

    `cubes` (seeds, 2, shells) are the power spectra of the cubes, Newton first.
    """
    places = columns(bands, box.size // 2)
    spectra, slopes = table[:, places["power"]], table[:, places["saliency"]]
    sums = [_sums(slices, spectra * (slices.label == label)[:, None], bootstrap) for label in (0, 1)]
    resampled = (bootstrap.draws @ sums[1]) / (bootstrap.draws @ sums[0])
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    saliency = slopes.mean(0) * np.arange(1, box.size // 2 + 1)  # rings hold modes in proportion to k
    means = cubes.mean(0)
    return {
        "k": box.shells,
        "newton": spectra[slices.label == 0].mean(0),
        "gr": spectra[slices.label == 1].mean(0),
        "ratio": sums[1].sum(0) / sums[0].sum(0),
        "ratio_low": low,
        "ratio_high": high,
        "cube_newton": means[0],
        "cube_gr": means[1],
        "cube_ratio": means[1] / means[0],
        "saliency": saliency / (saliency.sum() or 1.0),  # a dead network has no gradient
    }


def _sums(slices: Predictions, values: Floats, bootstrap: SeedBootstrap) -> Floats:
    """Sums of `values` (slices, shells) over the slices of each seed: (seeds, shells)."""
    return np.stack([bootstrap.per_seed(slices, column) for column in values.T], axis=1)
