"""How far the difference between twins depends on the direction to the grid axes, in the slices that are classified.

Theories of gravity are isotropic, a lattice is not. With r = P_GR/P_N the ratio of the spectra of twins, N modes hold
the information d'^2 = N ln^2 r / 2 about the gravity (ceilings.py). In each ring of wavenumbers the logarithm of the
ratio is divided into its mean over directions and the rest:

    sum over directions of N ln^2 r / 2 = N <ln r>^2 / 2 + sum over directions of N (ln r - <ln r>)^2 / 2.

The first part is the isotropic information, the second the directional one. Squares are products of different seeds,
so that the scatter between seeds does not bias them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import statistics
from analysis.interventions import AXES, DIAGONALS, LARGE_SCALES
from analysis.power_spectrum import ModeBins, measurable

Floats = NDArray[np.float64]

DIRECTIONS = ("axes", "between", "diagonals")


def direction_dependence(power: Floats, bins: ModeBins) -> dict[str, Any]:
    """The isotropic and the directional information of one slice, and the ratio by direction, for two ranges of n.

    `power` (seeds, 2, bins), Newton first, is the mean spectrum of the slices of each cube; `bins` are classes of
    equal n and direction (`power_spectrum.symmetry_classes`). Returns for `large_scales` and `small_scales`, n up to
    LARGE_SCALES and above it, `isotropic` and `directional` (d'^2 with intervals), `share`, the directional part of
    the information (None if there is none), and `ratio` P_GR/P_N by direction, with intervals.
    """
    used = measurable(power.reshape(-1, power.shape[2]), bins.modes)
    n, mu4, modes, power = bins.n[used], bins.mu4[used], bins.modes[used], power[..., used]
    ring, direction = np.round(n).astype(np.int64), np.where(mu4 > AXES, 0, np.where(mu4 < DIAGONALS, 2, 1))
    ranges = {"large_scales": n <= LARGE_SCALES, "small_scales": n > LARGE_SCALES}
    return {
        name: _dependence(power[..., inside], ring[inside], direction[inside], modes[inside])
        for name, inside in ranges.items()
        if inside.any()
    }


def _dependence(
    power: Floats, ring: NDArray[np.int64], direction: NDArray[np.int64], modes: Floats
) -> dict[str, Any]:
    cell, index = np.unique(ring * len(DIRECTIONS) + direction, return_inverse=True)
    sums = np.stack([np.bincount(index, row * modes) for row in power.reshape(-1, len(modes))])
    sums = sums.reshape(len(power), 2, len(cell))
    cell_modes = np.bincount(index, modes)
    log_ratio = np.log(sums[:, 1] / sums[:, 0])
    _, ring_index = np.unique(cell // len(DIRECTIONS), return_inverse=True)
    ring_modes = np.bincount(ring_index, cell_modes)
    mean = np.stack([np.bincount(ring_index, row * cell_modes) / ring_modes for row in log_ratio])
    isotropic = _information(mean, ring_modes)
    directional = _information(log_ratio - mean[:, ring_index], cell_modes)
    parts = [max(0.0, estimate["value"]) for estimate in (isotropic, directional)]
    found = {
        "isotropic": isotropic,
        "directional": directional,
        "share": parts[1] / sum(parts) if sum(parts) else None,
    }
    names = {
        name: statistics.mean_estimate(
            np.exp(
                (log_ratio * cell_modes)[:, cell % 3 == place].sum(1) / cell_modes[cell % 3 == place].sum()
            )
        )
        for place, name in enumerate(DIRECTIONS)
        if (cell % 3 == place).any()
    }
    return found | {"ratio": names}


def _information(log_ratio: Floats, modes: Floats) -> statistics.Estimate:
    """d'^2 of modes with this log ratio in each seed, (seeds, cells), without the bias of the seeds' scatter."""

    def value(rows: Floats) -> float:
        products = rows.sum(0) ** 2 - (rows**2).sum(0)  # of different seeds
        return float(modes @ products / (len(rows) * (len(rows) - 1)) / 2)

    seeds = range(len(log_ratio))
    without = np.array([value(np.delete(log_ratio, seed, axis=0)) for seed in seeds])
    return statistics.jackknife(value(log_ratio), without, "real")
