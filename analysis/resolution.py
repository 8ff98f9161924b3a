"""P_GR/P_N of cubes by wavenumber, beside theory and beside simulations with another cell.

What changes with the cell at a fixed wavenumber is numerical, isotropic or not; what is equal for two cells
has converged. Effects of the cell may follow n / n_Ny, the wavenumber over that of Nyquist, n_Ny = N/2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.power_spectrum import Box, shells
from datasets.preparation.cosmology import reference_ratio
from training.metrics import Floats

PAIR_ERROR = 7e-4  # of the ratio of one pair, measured between pairs of 64^3 cells at n = 5 to 12
ACCURACY = 5e-4  # of the reference where it is 1
EDGES = (0.5, 1.5, 2.5, 3.5, 5.5, 8.5, 12.5, 17.5, 24.5, 32.5, 48.5, 64.5, 96.5, 128.5, 192.5, 256.5)
FRACTIONS = np.linspace(0, 1, 9)  # bounds of the bands in n / n_Ny


@dataclass(frozen=True)
class PowerRatio:
    """P_GR/P_N in shells of width one; arrays (shells,)."""

    cells: int
    n: Floats
    value: Floats
    error: Floats
    """Standard error over the seeds."""
    modes: Floats

    def mean(self, low: float, high: float) -> float:
        """The mean over the modes with low < n <= high; NaN without any."""
        band = (self.n > low) & (self.n <= high)
        return float(np.average(self.value[band], weights=self.modes[band])) if band.any() else np.nan

    def at(self, n: Floats) -> Floats:
        """The ratio at other wavenumbers, interpolated."""
        return np.interp(n, self.n, self.value)


def measure(
    twins: Iterable[NDArray[np.float32]], box: Box, max_wavenumber: float | None = None
) -> PowerRatio:
    """The ratio of twins (2, N, N, N), Newton first, up to the Nyquist or the given wavenumber."""
    bins = shells(box, 3)
    power = np.stack([bins.power(torch.from_numpy(pair)) for pair in twins])
    kept = bins.n <= (max_wavenumber or np.inf)
    ratios = power[:, 1, kept] / power[:, 0, kept]
    value = power[:, 1, kept].sum(0) / power[:, 0, kept].sum(0)
    seeds = len(power)
    error = np.full(len(value), PAIR_ERROR) if seeds < 3 else ratios.std(0, ddof=1)
    return PowerRatio(box.size, bins.n[kept], value, error / np.sqrt(seeds), bins.modes[kept])


def follows_reference(ratio: PowerRatio, reference: Floats) -> int:
    """The largest n up to which the ratio follows the reference (shells,); 0 for none.

    It follows within two errors, and within half of the effect that the reference predicts.
    """
    known = np.isfinite(reference)
    tolerance = 2 * ratio.error + np.maximum(np.abs(reference - 1) / 2, ACCURACY)
    wrong = np.flatnonzero(known & ~(np.abs(ratio.value - reference) <= tolerance))
    last = len(ratio.n) if not len(wrong) else int(wrong[0])
    return last if known[:last].any() else 0


def describe(ratio: PowerRatio, box: Box, attributes: Mapping[str, Any]) -> str:
    """A table of the ratio by n beside the reference, and the filter that keeps what follows it."""
    reference = reference_ratio(ratio.n * box.fundamental, attributes) if box.length else None
    lines = ["P_GR/P_N by n     " + "".join(f"{name:>10}" for name in ("cubes", "error", "theory"))]
    for shell in range(min(8, len(ratio.n))):
        theory = "" if reference is None or np.isnan(reference[shell]) else f"{reference[shell]:10.4f}"
        lines.append(f"  {shell + 1:14d}  {ratio.value[shell]:10.4f}{ratio.error[shell]:10.4f}{theory}")
    if reference is None:
        return "\n".join([*lines, "no theory to compare with: the settings of the simulations are not known"])
    last = follows_reference(ratio, reference)
    if last == len(ratio.n):
        lines.append("the ratio follows theory at all n")
    elif last:
        lines.append(
            f"the ratio follows theory up to n = {last}; smaller scales differ for other reasons. To train "
            f"without them: python -m datasets repack IN.h5 OUT.h5 --max-wavenumber {last}"
        )
    else:
        lines.append("the ratio follows theory at no n where theory predicts one")
    return "\n".join(lines)


def compare(first: PowerRatio, second: PowerRatio) -> str:
    """Tables of two ratios of the same box by n and by n / n_Ny, and which of the two they follow."""
    coarse, fine = sorted((first, second), key=lambda ratio: ratio.cells)
    names = "".join(f"{f'{ratio.cells}^3':>10}" for ratio in (coarse, fine))
    lines = [f"P_GR/P_N by n     {names}"]
    for low, high in pairwise(EDGES):
        if low < fine.cells / 2:
            lines.append(f"  {low:5.1f} to {high:5.1f}  {_row(coarse.mean(low, high), fine.mean(low, high))}")
    lines.append(f"P_GR/P_N by n/n_Ny{names}")
    for low, high in pairwise(FRACTIONS):
        values = (ratio.mean(low * ratio.cells / 2, high * ratio.cells / 2) for ratio in (coarse, fine))
        lines.append(f"  {low:5.3f} to {high:5.3f}  {_row(*values)}")
    at_n = np.abs(coarse.value - fine.at(coarse.n))
    at_fraction = np.abs(coarse.value - fine.at(coarse.n * fine.cells / coarse.cells))
    error = np.hypot(coarse.error, np.interp(coarse.n, fine.n, fine.error))
    differs = np.flatnonzero(at_n > 2 * error + np.abs(fine.at(coarse.n) - 1) / 4)
    converged = int(differs[0]) if len(differs) else len(coarse.n)
    if converged == len(coarse.n):
        return "\n".join([*lines, "equal at the same n: the ratio does not depend on the cell"])
    beyond = slice(converged, None)
    by_n, by_fraction = (float(np.sqrt((gap[beyond] ** 2).mean())) for gap in (at_n, at_fraction))
    follows = "they follow n / n_Ny" if by_fraction < by_n / 2 else "they follow neither"
    lines.append(
        (f"equal at the same n up to n = {converged}: converged. Beyond" if converged else "At all n")
        + f" the ratios differ by {100 * by_n:.2f} % at the same n and by {100 * by_fraction:.2f} % at equal "
        f"n / n_Ny: {follows}. What depends on the cell is numerical."
    )
    return "\n".join(lines)


def _row(*values: float) -> str:
    return "".join(" " * 10 if np.isnan(value) else f"{value:10.4f}" for value in values)
