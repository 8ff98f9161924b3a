"""What a set of simulations allows: where it follows theory, what has converged, and the pairs to test.

What changes with the cell at a fixed wavenumber is numerical, isotropic or not; what is equal for two cells
has converged. Effects of the cell may follow n / n_Ny, the wavenumber over that of Nyquist, n_Ny = N/2.

A finding of the evaluation rests on two tests. Slices: exchanging the labels of twins, whose smallest p-value
with S seeds is 2^-S. The error of the slice AUC is some 0.006 / sqrt(S) (measured in gevolution slices near
the ceiling of linear theory), far less than most effects, so that 5 pairs, the fewest that reach p <= 0.05,
mostly suffice. Cubes: McNemar's test (1947, Psychometrika 12, 153) compares seeds with both twins right
and both wrong. Twins share their phases, hence nearly all scatter of the likelihood ratio: both are right if
the scatter is smaller than half their difference, with the probability 2 Phi(d'/2) - 1, and hardly ever both
wrong. Five such seeds reach p = 2^-5.
"""

from __future__ import annotations

from system import UserError

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import binom, norm

from analysis.classifiers import LikelihoodRatio
from analysis.lattice import BANDS, DIRECTIONS, Lattice, box_of
from analysis.power_spectrum import shells, symmetry_classes
from datasets import CubeFile
from datasets.preparation.checks import read_pair
from datasets.preparation.cosmology import linear_theory_ratio, reference_ratio
from training.metrics import Floats

PAIR_ERROR = 7e-4  # of the ratio of one pair, measured between pairs of 64^3 cells at n = 5 to 12
RATIO_SEEDS = 8  # twins share their phases: 8 pairs show the ratio to 1e-4
ACCURACY = 1e-3  # of the reference, which is that of the mean n of a shell
FRACTIONS = np.linspace(0, 1, 9)  # bounds of the bands in n / n_Ny

FEWEST = 5  # seeds that reach p <= 0.05 by exchanging twins, 2^-5
SLICE_ERROR = 0.0062  # of the AUC of slices, times the root of the number of pairs
POWER = 0.8
QUANTILES = float(norm.ppf(0.95) + norm.ppf(POWER))


# Test pairs


def pairs_for_slices(auc: float) -> float:
    """Test pairs with which an AUC of slices is found at p <= 0.05 with a probability of 80 %."""
    return float(max(FEWEST, np.ceil((QUANTILES * SLICE_ERROR / (auc - 0.5)) ** 2))) if auc > 0.5 else np.inf


def pairs_for_cubes(d_prime: float) -> float:
    """Test pairs with which McNemar's test finds d' of cubes at p <= 0.05 with a probability of 80 %."""
    right = 2 * norm.cdf(d_prime / 2) - 1
    if right < 1e-4:
        return np.inf
    pairs = np.arange(FEWEST, int(20 / right) + FEWEST)
    return float(pairs[binom.sf(FEWEST - 1, pairs, right) >= POWER][0])


def describe_plan(lattice: Lattice) -> list[str]:
    """Expected AUC of slices and cubes, and the pairs that find it, by what is used.

    All modes up to n = N/2 by direction; the large scales; and linear theory, where it applies.
    """
    bins, box = lattice.bins, lattice.bins.box
    newton, gr = lattice.power.mean(0)
    flat, large = symmetry_classes(box), f"n <= {box.large_scales}"
    spectra = {"all modes": gr, large: gr}
    if box.linear_theory:
        spectra["linear theory"] = newton * linear_theory_ratio(bins.n * box.fundamental)
    lines = [
        "expected of the likelihood ratio, and test pairs needed for p <= 0.05 with a probability of 80 %:"
    ]
    for name, power in spectra.items():
        slices = LikelihoodRatio.of("", flat, *bins.project(np.stack([newton, power]), flat))
        cubes = LikelihoodRatio.of("", bins, newton, power)
        if name == large:
            slices = slices.restrict(flat.n <= box.large_scales)
            cubes = cubes.restrict(bins.n <= box.large_scales + 0.5)
        auc, of_cubes = slices.expected()["auc"], cubes.expected()
        lines.append(
            f"  {name:14}  slices AUC {auc:.3f}, {pairs_for_slices(auc):.0f} pairs; "
            f"cubes AUC {of_cubes['auc']:.3f}, {pairs_for_cubes(of_cubes['d_prime']):.0f} pairs"
        )
    return lines


def describe_lattice(lattice: Lattice) -> str:
    """A table of P_GR/P_N by band of n and direction, the means of cubes, warnings, and the plan."""
    report = lattice.report()
    edges, rows = report["ratio"]["edges"], zip(*report["ratio"]["value"], strict=True)
    lines = ["P_GR/P_N by n     " + "".join(f"{name:>10}" for name in DIRECTIONS)]
    table = [(*band, *ratios) for band, ratios in zip(pairwise(edges), rows, strict=True)]
    lines += [_row(*row) for row in table if np.isfinite(row[2:]).any()]  # a filter leaves some bands empty
    newton, gr = lattice.means.mean(0)
    lines.append(f"mean of a cube / std  {newton:.3g} of newton, {gr:.3g} of gr")
    lines += [f"warning: {line}" for line in report["warnings"]]
    return "\n".join(lines + describe_plan(lattice))


# The ratio by wavenumber


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


def measure_ratio(cubes: CubeFile, field: int = 0) -> PowerRatio:
    """The ratio of a field of the first seeds of a file, up to n = N/2 or to its largest wavenumber."""
    bins = shells(box_of(cubes), 3)
    pairs = (torch.from_numpy(read_pair(cubes, seed)[:, field]) for seed in cubes.seeds[:RATIO_SEEDS])
    power = np.stack([bins.power(pair) for pair in pairs])
    value = power[:, 1].sum(0) / power[:, 0].sum(0)
    seeds = len(power)
    error = np.full(len(value), PAIR_ERROR) if seeds < 3 else (power[:, 1] / power[:, 0]).std(0, ddof=1)
    return PowerRatio(cubes.size, bins.n, value, error / np.sqrt(seeds), bins.modes)


def follows_reference(ratio: PowerRatio, reference: Floats) -> int:
    """The largest n up to which the ratio follows the reference (shells,); 0 for none.

    It follows within two errors, and within half of the effect that the reference predicts.
    """
    known = np.isfinite(reference)
    tolerance = 2 * ratio.error + np.maximum(np.abs(reference - 1) / 2, ACCURACY)
    wrong = np.flatnonzero(known & ~(np.abs(ratio.value - reference) <= tolerance))
    last = len(ratio.n) if not len(wrong) else int(wrong[0])
    return last if known[:last].any() else 0


def describe_ratio(ratio: PowerRatio, cubes: CubeFile) -> str:
    """A table of the ratio by n beside theory for this file, and the filter that keeps what follows it."""
    box = box_of(cubes)
    reference = reference_ratio(ratio.n * box.fundamental, cubes.attributes) if box.length else None
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
            f"without them: python -m datasets repack {cubes.path} OUT.h5 --max-wavenumber {last}"
        )
    else:
        lines.append("the ratio follows theory at no n where theory predicts one")
    return "\n".join(lines)


# Two cells


@dataclass(frozen=True)
class Convergence:
    """Two ratios of one box, and what they follow."""

    coarse: PowerRatio
    fine: PowerRatio

    @property
    def converged(self) -> int:
        """The largest n up to which the two are equal."""
        error = np.hypot(self.coarse.error, np.interp(self.coarse.n, self.fine.n, self.fine.error))
        excess = np.abs(self.fine.at(self.coarse.n) - 1)
        differs = np.flatnonzero(self._gaps[0] > 2 * error + excess / 4)
        return int(differs[0]) if len(differs) else len(self.coarse.n)

    @property
    def _gaps(self) -> Floats:
        """Difference of the two at the same n and at the same n / n_Ny: (2, shells)."""
        n, cells = self.coarse.n, self.fine.cells / self.coarse.cells
        return np.abs(self.coarse.value - np.stack([self.fine.at(n), self.fine.at(n * cells)]))

    @property
    def beyond(self) -> Floats:
        """Root mean square of both differences where the ratios have not converged: (2,)."""
        gaps = self._gaps[:, self.converged :]
        return np.sqrt((gaps**2).mean(1)) if gaps.size else np.zeros(2)

    @property
    def follows(self) -> str:
        """`n`: equal at all n. `cell`: beyond, a function of n / n_Ny. Otherwise `neither`."""
        by_n, by_fraction = self.beyond
        return "n" if by_n == 0 else "cell" if by_fraction < by_n / 2 else "neither"

    def describe(self) -> str:
        """Tables by n and by n / n_Ny, and which of the two the ratios follow."""
        both = self.coarse, self.fine
        names = "".join(f"{f'{ratio.cells}^3':>10}" for ratio in both)
        lines = [f"P_GR/P_N by n     {names}"]
        for low, high in pairwise(BANDS):
            if low < self.fine.cells / 2:
                lines.append(_row(low, high, *(ratio.mean(low, high) for ratio in both)))
        lines.append(f"P_GR/P_N by n/n_Ny{names}")
        for low, high in pairwise(FRACTIONS):
            values = (ratio.mean(low * ratio.cells / 2, high * ratio.cells / 2) for ratio in both)
            lines.append(_row(low, high, *values))
        if self.follows == "n":
            return "\n".join([*lines, "converged at all n (within a quarter of the excess)"])
        by_n, by_fraction = 100 * self.beyond
        start = f"converged up to n = {self.converged} (within a quarter of the excess). Beyond"
        follows = "they follow n / n_Ny" if self.follows == "cell" else "they follow neither"
        lines.append(
            f"{start if self.converged else 'At all n'} the ratios differ by {by_n:.2f} % at the same n and "
            f"by {by_fraction:.2f} % at equal n / n_Ny: {follows}. What depends on the cell is numerical."
        )
        return "\n".join(lines)


def compare(first: CubeFile, second: CubeFile, field: int = 0) -> Convergence:
    """The ratios of two files. Raises UserError unless they have the same box and cells of different size."""
    box, other = (file.attr_float("box_size") for file in (first, second))
    if box != other or first.size == second.size:
        raise UserError(
            f"{second.path}: {second.size}^3 cells, box_size {other}; {first.path}: {first.size}^3, {box}. "
            "Give simulations of the same box with cells of another size."
        )
    return Convergence(
        *(measure_ratio(file, field) for file in sorted((first, second), key=lambda f: f.size))
    )


def _row(low: float, high: float, *values: float) -> str:
    digits = 1 if high > 1 else 3
    cells = "".join(" " * 10 if np.isnan(value) else f"{value:10.4f}" for value in values)
    return f"  {low:5.{digits}f} to {high:5.{digits}f}  {cells}"
