"""Lattice diagnostics: do direction or the mean of a cube separate the gravities?

Gravity has no preferred direction, and the mean of a potential has no physical meaning. Where P_GR/P_N of
the cubes differs between grid axes and diagonals, or where the means differ, a classifier can identify the
gravity by the discretization of the simulation. Twins share their phases, so a few seeds measure the ratio
of their spectra to 1e-4.

The three axes of a cube are statistically equivalent. If the power of the modes perpendicular to one axis
differs from that of the others, the initial conditions are at fault, and slices along different axes have
different spectra. This is no difference between the gravities. One such defect is known: the `basic`
generator of initial conditions of gevolution 1.0 to 1.3 (`ic_basic.hpp`, the loops over k_x = 0; fixed in
2.0) gives the modes (0, k_y, -k_z) the conjugate of the draw of (0, k_y, k_z). The plane k_x = 0, x being
array axis 2, then has half the power, and mirror modes in it have a coherence of 1/2.

Isotropy is necessary for physics, not sufficient: a difference that depends on the size of the cells is
numerical. `planning.Convergence` tells the two apart.

A direction is mu4 = sum_i n_i^4 / n^4 (see `power_spectrum`): above 0.9 along a grid axis, up to 0.45 along a
diagonal, between otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit

import datasets
from analysis.power_spectrum import (
    ALONG_AXIS,
    ALONG_DIAGONAL,
    NEGLIGIBLE,
    Box,
    ModeBins,
    directions,
    fold_power,
    measurable,
    mirror_coherence,
    planes,
    shell_edges,
)
from analysis.simulation_spectra import Partitions, SimulationSpectra
from analysis.statistics import Bools, Estimate, auc_of, mean_estimate
from datasets.preparation.cosmology import linear_theory_reference
from training.metrics import Floats, Integers

DIRECTIONS = ("axis", "between", "diagonal")
DEFECT = 2  # the array axis that is gevolution's x
SIGNIFICANT = 5.0  # standard errors
RELEVANT = 0.2  # d' of a cube; linear theory gives 0.3
UNEQUAL = 0.02  # relative difference in power between axes
SINGLE_PRECISION = float(np.finfo(np.float32).eps)

# Bounds of the bands in n, up to N/2; the last band holds the corners of Fourier space.
BANDS = (0.5, 1.5, 2.5, 3.5, 5.5, 8.5, 12.5, 17.5, 24.5, 32.5, 48.5, 64.5, 96.5, 128.5, 192.5, 256.5)


@dataclass(frozen=True)
class _Shells:
    """Shells in n; arrays (shells,) or (seeds, shells)."""

    n: Floats
    weight: Floats
    """Information in the contrast of axes and diagonals."""
    mean: Floats
    """ln P_GR/P_N over all directions."""
    axes: Floats
    """What axes have beyond the mean."""
    diagonals: Floats
    width_error: Floats
    """Error of the contrast if the ratio has a step within the shell: that of axes and that of diagonals."""


@dataclass(frozen=True)
class Lattice:
    """Twins of several seeds by scale and direction.

    `power` (seeds, 2, bins) is P(k) of the cubes in `bins`, the partition `power_spectrum.directions`;
    `plane_power` (seeds, 2, bins) that in `plane_bins`, the partition `power_spectrum.planes`; `means`
    (seeds, 2) are the means of the cubes in units of the field's standard deviation; `coherence` (seeds, 3)
    that of mirror modes (`power_spectrum.mirror_coherence`), the mean of twins. Newton comes first. One seed
    has no errors, and no warnings but that of its axes.
    """

    bins: ModeBins
    power: Floats
    plane_bins: ModeBins
    plane_power: Floats
    means: Floats
    coherence: Floats

    @classmethod
    def from_spectra(
        cls, partitions: Partitions, spectra: Sequence[SimulationSpectra], newton_augmentation: float
    ) -> Lattice:
        """From the cubes of several sets of seeds, without `newton_augmentation`."""
        factor = np.array([newton_augmentation, 1.0])
        power, plane_power = (
            np.concatenate([part.cubes[name] for part in spectra]) for name in ("directional", "planes")
        )
        return cls(
            partitions.cubes["directional"],
            power / factor[:, None] ** 2,
            partitions.cubes["planes"],
            plane_power,
            np.concatenate([part.cube_means for part in spectra]) / factor,
            np.concatenate([part.coherence.mean(1) for part in spectra]),
        )

    def report(self, *, mean_matters: bool = True) -> dict[str, Any]:
        """The `grid` section of report.json; `mean_matters`: whether the classifier sees the mean of a cube.

        `ratio`: P_GR/P_N with a 95 % interval by direction and band of n, between `edges`: `value`, `low`
        and `high` are (directions, bands) with NaN where a band has no modes. `cube_mean_auc`: the AUC of the
        means. `rise`: ln P_GR/P_N at n > 3/4 of N/2 less that of small scales at n < 1/4 of N/2, an estimate.
        """
        mean, error = _summary(self._by_band())
        reach = error * stdtrit(len(self.power) - 1, 0.975)
        return {
            "ratio": {
                "edges": self.edges,
                "directions": list(DIRECTIONS),
                "value": np.exp(mean),
                "low": np.exp(mean - reach),
                "high": np.exp(mean + reach),
            },
            "cube_mean_auc": {"value": self.mean_auc, "low": None, "high": None},
            "rise": self.rise,
            "warnings": self.warnings(mean_matters=mean_matters),
        }

    @cached_property
    def edges(self) -> Floats:
        """Bounds of the bands in n, the last one from N/2 to the end of the corners: (bands + 1,)."""
        nyquist = self.bins.box.size / 2 + 0.5
        end = np.sqrt(self.bins.dimensions) * self.bins.box.size / 2
        return np.array([*(edge for edge in BANDS if edge < nyquist), nyquist, end])

    @cached_property
    def mean_auc(self) -> float:
        """AUC of the cube means as a classifier."""
        return auc_of(*self.means.T)

    @cached_property
    def rise(self) -> Estimate | None:
        """ln P_GR/P_N close to the Nyquist wavenumber less that of small scales; None without such modes."""
        share = self.bins.n / (self.bins.box.size / 2)
        low, high = self._small_scales & (share < 1 / 4), self._small_scales & (share > 3 / 4)
        if not low.any() or not high.any():
            return None
        return mean_estimate(self._average(self._log_ratio, high) - self._average(self._log_ratio, low))

    def warnings(self, *, mean_matters: bool = True) -> list[str]:
        """One sentence for each property of the grid that separates the gravities or the axes.

        Direction separates the gravities if axes and diagonals differ by 5 standard errors at n > 4, in any
        band or in all of them, and if direction alone gives a cube d' > 0.2. The mean does if it differs by 5
        standard errors and has a d' > 0.2, and if single precision resolves it. Axes differ if their power
        does by 5 standard errors and 2 %.
        """
        if len(self.power) < 2:
            return self.axis_warnings()
        warnings = []
        contrast, error = self.contrast
        if (np.abs(contrast) > SIGNIFICANT * error).any() and self.d_prime > RELEVANT:
            along = []
            for name, mask in (("grid axes", self._axis), ("diagonals", self._diagonal)):
                ratio, error = _summary(self._average(self._log_ratio, mask & self._small_scales))
                digits = max(4, int(np.ceil(-np.log10(error))))
                along.append(f"{np.exp(ratio):.{digits}f} +- {error:.{digits}f} along {name}")
            warnings.append(
                f"P_GR/P_N depends on direction: {along[0]}, {along[1]}, the mean of all modes with n = "
                f"{self.bins.box.large_scales + 1} to {self.bins.box.size // 2} and its standard error; "
                f"gravity is isotropic, so the grid separates the labels (d' = {self.d_prime:.1f} per cube)."
            )
        difference = self.means[:, 1] - self.means[:, 0]
        mean = difference.mean()
        significant = abs(mean) > SIGNIFICANT * difference.std(ddof=1) / np.sqrt(len(difference))
        spread = np.sqrt(self.means.var(0, ddof=1).mean())
        resolved = abs(mean) > SINGLE_PRECISION
        if mean_matters and significant and resolved and abs(mean) > RELEVANT * spread:
            warnings.append(
                f"The mean of a cube separates the labels (AUC {self.mean_auc:.3f}): Newton "
                f"{self.means[:, 0].mean():.2g}, GR {self.means[:, 1].mean():.2g} standard deviations; "
                "whitening removes it, and so does repack --remove-mean."
            )
        return [*warnings, *self.axis_warnings()]

    def axis_warnings(self) -> list[str]:
        """What is wrong with the axes of the cubes, if their power or coherence says so."""
        logarithm, error = self.axis_power
        axis = int(np.argmax(np.abs(logarithm)))
        coherence = self.coherence.mean(0)
        others = np.delete(coherence, DEFECT)
        share = f" ({np.exp(logarithm[DEFECT]):.2f})" if error.any() else ""
        # a quarter of a plane has pi/4 n^2 modes: filtered cubes have few
        modes = np.pi / 4 * min(self.bins.n[self._used].max(initial=1), self.bins.box.size / 2) ** 2
        certain = coherence[DEFECT] > max(0.35, 4 / np.sqrt(modes * len(self.coherence)))
        if certain and (np.abs(others) < 0.2).all() and logarithm[DEFECT] <= 0:
            return [
                "The initial conditions have the defect of the `basic` generator of gevolution 1.0 to 1.3, "
                f"fixed in 2.0: modes with k_x = 0, n_{DEFECT} = 0 in array axes, have half the "
                f"power{share} and mirror modes a coherence of {coherence[DEFECT]:.2f}, in both gravities. "
                f"Slices perpendicular to axis {DEFECT} have less power, the others half of it on one line."
            ]
        if abs(logarithm[axis]) > max(SIGNIFICANT * error[axis], UNEQUAL):
            return [
                f"The axes of the cubes are not equivalent: modes with n_{axis} = 0 have "
                f"{np.exp(logarithm[axis]):.2f} of the power of those of the other axes. Slices of different "
                "axes therefore have different spectra, in both gravities: check the initial conditions."
            ]
        return []

    @cached_property
    def axis_power(self) -> tuple[Floats, Floats]:
        """ln of the power of modes perpendicular to each axis over that of the other two axes: (3,).

        And its standard error: the larger one of the spread over seeds and that of Gaussian modes. Zeros if
        modes are missing.
        """
        power = self.plane_power.mean(1)  # twins share their phases
        mean = self.power.mean((0, 1)) @ self.bins.modes / self.bins.modes.sum()
        if not power.size or (power <= NEGLIGIBLE * mean).any():  # as in filtered cubes
            return np.zeros(3), np.zeros(3)
        shape = (3, len(self.plane_bins) // 3)
        power, modes = power.reshape(-1, *shape), self.plane_bins.modes.reshape(shape)
        logarithm = np.average(np.log(power), axis=2, weights=modes[0])
        ratio = 1.5 * (logarithm - logarithm.mean(1, keepdims=True))
        mean, error = _summary(ratio)
        gaussian = np.sqrt(1.5 * 2 / modes[0].sum() / len(ratio))
        return mean, np.fmax(error, gaussian)

    @cached_property
    def contrast(self) -> tuple[Floats, Floats]:
        """ln P_GR/P_N along axes minus along diagonals, and its standard error: each (bands + 1,).

        First of all shells between n = 4.5 and N/2 together, then of each band of them; a shell counts in
        proportion to the information in its contrast. Empty where N is too small for such shells.

        The statistical error is the larger one of two: from the spread over seeds, and from the spread over
        seeds and shells around the shells' means. With few seeds the former alone can be small by chance. The
        error of the shells' width is added in quadrature.
        """
        shells = self._shells
        if not len(shells.n):
            return np.zeros(0), np.zeros(0)
        difference = shells.axes - shells.diagonals
        scatter = ((difference - difference.mean(0)) ** 2 * shells.weight).sum()
        scatter /= (difference.shape[0] - 1) * difference.shape[1]
        band = np.digitize(shells.n, self.edges)
        values, errors = [], []
        for group in (np.ones(len(band), bool), *(band == index for index in np.unique(band))):
            weight = shells.weight * group / (shells.weight * group).sum()
            by_seed = difference @ weight
            variance = max(by_seed.var(ddof=1), scatter / shells.weight[group].sum()) / len(difference)
            values.append(by_seed.mean())
            errors.append(np.sqrt(variance + (shells.width_error @ weight) ** 2 + SINGLE_PRECISION**2))
        return np.array(values), np.array(errors)

    @cached_property
    def d_prime(self) -> float:
        """d' per cube from direction alone: the Gaussian information in what an isotropic ratio leaves.

        Counts 4.5 < n <= N/2. The noise of the measured ratio and the effect of the width of the shells are
        subtracted.
        """
        mean, error = _summary(self._residual)
        information = self.bins.modes * (mean**2 - error**2 - self._step**2) / 2
        return float(np.sqrt(max(0.0, information[self._small_scales].sum())))

    def direction_dependence(self, shares: Floats, edges: Floats) -> dict[str, Any]:
        """P_GR/P_N by direction at 4.5 < n <= N/2, where a network uses it.

        A shell counts as the band of n that contains it: `shares` (bands,) of the mean twin difference,
        bounds `edges` (bands + 1,); a negative share counts as none. `axes` and `diagonals` are P_GR/P_N,
        `isotropic` the mean of its logarithm over directions, `contrast` what diagonals exceed axes by in
        logarithm, all with intervals over seeds. `width_error` is the error of the contrast from the width of
        the shells. Empty without shells, or without a share in them. On larger scales a shell has too few
        modes to compare directions.
        """
        shells = self._shells
        band = np.digitize(shells.n, edges) - 1
        weight = np.maximum(shares, 0)[band] / np.bincount(band)[band]
        if not weight.sum():
            return {}
        weight /= weight.sum()
        mean, axes, diagonals = (part @ weight for part in (shells.mean, shells.axes, shells.diagonals))
        return {
            "isotropic": mean_estimate(mean),
            "contrast": mean_estimate(diagonals - axes),
            "axes": mean_estimate(np.exp(mean + axes)),
            "diagonals": mean_estimate(np.exp(mean + diagonals)),
            "width_error": float(shells.width_error @ weight),
        }

    @cached_property
    def _step(self) -> Floats:
        """Error of ln P_GR/P_N of a bin, (bins,), if the ratio has a step within its shell.

        The change of the ratio over the neighboring shells, as the width of a uniform distribution.
        """
        mean = {
            shell: self._average(self._log_ratio, self._used & (self._shell == shell)).mean()
            for shell in np.unique(self._shell[self._used])
        }
        step = {shell: mean.get(shell + 1, mean[shell]) - mean.get(shell - 1, mean[shell]) for shell in mean}
        return np.array([abs(step.get(shell, 0.0)) for shell in self._shell]) / np.sqrt(12)

    @cached_property
    def _shells(self) -> _Shells:
        """The shells with 4.5 < n <= N/2 that have modes along axes and along diagonals."""
        n, weight, width_error = [], [], []
        columns: list[tuple[Floats, Floats, Floats]] = []
        for shell in np.unique(self._shell[self._small_scales]):
            axis, diagonal = (self._shell == shell) & self._axis, (self._shell == shell) & self._diagonal
            modes = self.bins.modes[axis].sum(), self.bins.modes[diagonal].sum()
            if not all(modes):
                continue
            columns.append(
                (
                    self._average(self._log_ratio, self._used & (self._shell == shell)),
                    self._average(self._residual, axis),
                    self._average(self._residual, diagonal),
                )
            )
            weight.append(modes[0] * modes[1] / (modes[0] + modes[1]))
            n.append(self.bins.n[axis].mean())
            width_error.append(2 * self._step[axis][0])
        parts = np.array(columns).reshape(-1, 3, len(self.power)).transpose(1, 2, 0)
        mean, axes, diagonals = parts
        return _Shells(np.array(n), np.array(weight), mean, axes, diagonals, np.array(width_error))

    @cached_property
    def _used(self) -> Bools:
        return measurable(self.power.reshape(-1, len(self.bins)), self.bins.modes)

    @cached_property
    def _small_scales(self) -> Bools:
        """Bins whose ratio linear theory predicts to be 1, up to N/2."""
        return self._used & self.bins.inside_nyquist & (self.bins.n > self.bins.box.large_scales + 0.5)

    @cached_property
    def _axis(self) -> Bools:
        return self._used & (self.bins.mu4 > ALONG_AXIS)

    @cached_property
    def _diagonal(self) -> Bools:
        return self._used & (self.bins.mu4 <= ALONG_DIAGONAL)

    @cached_property
    def _shell(self) -> Integers:
        return np.digitize(self.bins.n, shell_edges(self.bins.box.size, self.bins.dimensions))

    @cached_property
    def _log_ratio(self) -> Floats:
        """ln P_GR/P_N (seeds, bins), 0 in bins that hold no power."""
        ratio = np.ones_like(self.power[:, 0])
        np.divide(self.power[:, 1], self.power[:, 0], out=ratio, where=self._used)
        return np.log(ratio)

    @cached_property
    def _residual(self) -> Floats:
        """ln P_GR/P_N less its mean over directions and seeds at the same n: (seeds, bins).

        The mean is interpolated to the n of each bin, because the bins of a shell differ slightly in n, and
        extrapolated below the first shell, where it varies most.
        """
        shells = [self._used & (self._shell == shell) for shell in np.unique(self._shell[self._used])]
        n = [np.average(self.bins.n[shell], weights=self.bins.modes[shell]) for shell in shells]
        isotropic = [self._average(self._log_ratio, shell).mean() for shell in shells]
        if len(n) > 1:
            slope = (isotropic[1] - isotropic[0]) / (n[1] - n[0])
            n, isotropic = [0.0, *n], [isotropic[0] - slope * n[0], *isotropic]
        return (self._log_ratio - np.interp(self.bins.n, n, isotropic)) * self._used

    def _by_band(self) -> Floats:
        """ln P_GR/P_N by direction and band: (seeds, directions, bands)."""
        band = np.digitize(self.bins.n, self.edges[1:-1])
        masks = (self._axis, self._used & ~self._axis & ~self._diagonal, self._diagonal)
        bands = range(len(self.edges) - 1)
        averages = [[self._average(self._log_ratio, mask & (band == i)) for i in bands] for mask in masks]
        return np.array(averages).transpose(2, 0, 1)

    def _average(self, values: Floats, mask: Bools, weights: Floats | None = None) -> Floats:
        """Average of `values` (seeds, bins) over the modes of some bins: (seeds,), NaN if there are none.

        `weights` (bins,) weigh the modes.
        """
        weights = self.bins.modes * mask * (1.0 if weights is None else weights)
        total = weights.sum()
        return values @ weights / total if total else np.full(len(values), np.nan)


def box_of(cubes: datasets.CubeFile) -> Box:
    """The periodic box of the simulations in a file."""
    linear_theory = linear_theory_reference(cubes.attributes) == "linear"
    max_wavenumber = cubes.attr_float("max_wavenumber") or np.inf
    return Box(cubes.size, cubes.attr_float("box_size"), linear_theory, max_wavenumber)


def measure(twins: Iterable[NDArray[np.float32]], box: Box) -> Lattice:
    """Lattice diagnostics of twins (2, N, N, N), Newton first, one pair per seed."""
    bins, plane_bins = directions(box, 3), planes(box)
    power, plane_power, means, stds, coherence = [], [], [], [], []
    for pair in twins:
        cubes = torch.from_numpy(pair)
        folded = fold_power(cubes, 3)
        power.append(bins.average(folded))
        plane_power.append(plane_bins.average(folded))
        means.append(cubes.double().mean((1, 2, 3)).numpy())
        stds.append(float(cubes.double().std()))
        coherence.append(np.mean([mirror_coherence(cube) for cube in cubes], axis=0))
    return Lattice(
        bins,
        np.stack(power),
        plane_bins,
        np.stack(plane_power),
        np.stack(means) / np.mean(stds),
        np.stack(coherence),
    )


def _summary(values: Floats) -> tuple[Floats, Floats]:
    """Mean and standard error of values (seeds, ...)."""
    if len(values) < 2:
        return values.mean(0), np.full(values.shape[1:], np.nan)
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
