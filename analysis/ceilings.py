"""Ceilings: how well the power spectrum of a Gaussian field can identify its gravity at best.

For Gaussian fields with known spectra the likelihood ratio is the most powerful statistic (Neyman & Pearson
1933; Tegmark, Taylor & Heavens 1997, ApJ 480, 22):

    Lambda = ln p(field | GR) / p(field | Newton)
           = sum over modes of 1/2 [ |delta_k|^2 (1/P_N - 1/P_GR) - ln(P_GR/P_N) ].

With power averaged in bins of N_b modes it is a sum of weighted chi-squared variables with N_b degrees of
freedom, whose distribution is known under both hypotheses. The detectability index is

    d'^2 = sum_b N_b ln^2(P_GR/P_N) / 2.

Spectra are measured from the training twins. Twins share their phases, so the ratio of their spectra is known
far better (to 1e-4 at 64^3) than the spectra themselves, and its noise does not inflate d'.

A ceiling holds for Gaussian fields whose axes are statistically equivalent: spectra are averaged over the
axes of the slices. Where axes differ (`Lattice.axis_power`), the test on real data falls short of it.
"""

from __future__ import annotations

from system import UserError

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.special import ndtri

from analysis.power_spectrum import NO_POWER, Bools, Floats, ModeBins, measurable
from datasets.preparation.cosmology import linear_theory_ratio


@dataclass(frozen=True)
class Expectation:
    """What the likelihood ratio attains on Gaussian fields; GR if it is positive."""

    d_prime: float
    accuracy: float
    auc: float


@dataclass(frozen=True)
class LikelihoodRatio:
    """The Gaussian likelihood ratio of fields with P(k) in bins.

    `partition` names the partition of the modes, `modes`, `newton` and `gr` (used bins,) are the number of
    modes and the spectra, `used` (bins,) selects bins of the partition.
    """

    partition: str
    used: Bools
    modes: Floats
    newton: Floats
    gr: Floats

    def __call__(self, power: Floats) -> Floats:
        """Lambda in nats (samples,) of samples with P(k) `power` (samples, bins of the partition)."""
        weights = self.modes * (1 / self.newton - 1 / self.gr) / 2
        return power[:, self.used] @ weights - self.modes @ np.log(self.gr / self.newton) / 2

    def expected(self) -> Expectation:
        """Its accuracy and AUC on Gaussian fields with these spectra, from the exact distribution."""
        ratio = self.gr / self.newton
        d_prime = float(np.sqrt(self.modes @ np.log(ratio) ** 2 / 2))
        if d_prime == 0:
            return Expectation(0.0, 0.5, 0.5)
        offset = float(self.modes @ np.log(ratio) / 2)
        newton, gr = 1 - 1 / ratio, ratio - 1  # Lambda + offset is sum of these times chi^2 / 2
        accuracy = 1 / 2 + (_exceeds(gr, self.modes, offset) - _exceeds(newton, self.modes, offset)) / 2
        auc = _exceeds(np.concatenate([gr, -newton]), np.tile(self.modes, 2), 0.0)
        return Expectation(d_prime, accuracy, auc)


@dataclass(frozen=True)
class Ceiling:
    """The likelihood ratios of slices and of cubes for the same information."""

    slices: LikelihoodRatio
    cubes: LikelihoodRatio

    def expected(self) -> dict[str, float]:
        """Expected accuracy, AUC and d' of slices and cubes."""
        slices, cubes = self.slices.expected(), self.cubes.expected()
        return {
            "slice_accuracy": slices.accuracy,
            "slice_auc": slices.auc,
            "slice_d_prime": slices.d_prime,
            "cube_accuracy": cubes.accuracy,
            "cube_auc": cubes.auc,
            "cube_d_prime": cubes.d_prime,
        }


def fit(
    slice_bins: Mapping[str, ModeBins],
    cube_bins: Mapping[str, ModeBins],
    slices: Mapping[str, Floats],
    cubes: Mapping[str, Floats],
) -> dict[str, Ceiling]:
    """Ceilings from the spectra of training twins.

    The bins are those of `power_spectrum.slice_partitions` and `cube_partitions`. `slices` and `cubes` hold
    P(k) (seeds, 2, bins) by partition, Newton first; that of slices is averaged over the slices of a cube.

    `linear`: the ratio of linear theory, where the length of the box is known. `isotropic`: by shells up to
    n = N/2. `directional`: resolved by direction, up to n = N/2. `corners`: the same with the corners
    of Fourier space. Raises UserError if no bin holds power.
    """
    ceilings = {}
    box = slice_bins["wavenumbers"].box
    if box.length:
        solid = cubes["wavenumbers"][:, 0].mean(0)
        excess = linear_theory_ratio(cube_bins["wavenumbers"].n * box.fundamental)
        flat = cube_bins["wavenumbers"].project(np.stack([solid, solid * excess]), slice_bins["wavenumbers"])
        newton = slices["wavenumbers"][:, 0].mean(0)
        projected = np.divide(flat[1], flat[0], out=np.ones_like(newton), where=flat[0] > 0)
        ceilings["linear"] = Ceiling(
            _likelihood_ratio("wavenumbers", slice_bins, newton, newton * projected),
            _likelihood_ratio("wavenumbers", cube_bins, solid, solid * excess),
        )
    ceilings["isotropic"] = Ceiling(
        _isotropic(slice_bins, slices, "symmetry"), _isotropic(cube_bins, cubes, "wavenumbers")
    )
    for name, corners in (("directional", False), ("corners", True)):
        ceilings[name] = Ceiling(
            _likelihood_ratio("symmetry", slice_bins, *slices["symmetry"].mean(0), corners=corners),
            _likelihood_ratio("directional", cube_bins, *cubes["directional"].mean(0), corners=corners),
        )
    return ceilings


def detectability(auc: float) -> float:
    """d' = sqrt(2) Phi^-1(AUC) of two normal distributions of equal width with this AUC."""
    return float(np.sqrt(2) * ndtri(auc))


def attained_share(auc: float, ceiling_auc: float) -> float:
    """A classifier's share of the attainable d', both from AUC; NaN where nothing is attainable."""
    attainable = detectability(ceiling_auc)
    return detectability(auc) / attainable if attainable > 0 else float("nan")


def _isotropic(bins: Mapping[str, ModeBins], power: Mapping[str, Floats], finest: str) -> LikelihoodRatio:
    """The likelihood ratio that knows the P(k) of shells alone.

    P(k) varies within a shell, steeply at low n and, in slices, with direction near the Nyquist wavenumber.
    The mean power of a shell is therefore treated as a chi-squared variable with (sum P)^2 / sum P^2 degrees
    of freedom instead of one per mode (Satterthwaite 1946, Biometrics Bulletin 2, 110). `finest` names a
    partition that resolves P(k), with one n per bin.
    """
    newton, modes = power[finest][:, 0].mean(0), bins[finest].modes
    shell = np.floor(bins[finest].n + 0.5).astype(int)
    first, second = (np.bincount(shell, modes * newton**order) for order in (1, 2))
    effective = np.divide(first**2, second, out=np.zeros_like(first), where=second > 0)
    ratio = _likelihood_ratio("isotropic", bins, *power["isotropic"].mean(0))
    return replace(ratio, modes=effective[1 : len(bins["isotropic"]) + 1][ratio.used])


def _likelihood_ratio(
    partition: str, bins: Mapping[str, ModeBins], newton: Floats, gr: Floats, *, corners: bool = False
) -> LikelihoodRatio:
    modes = bins[partition].modes
    used = measurable(newton[None], modes) & measurable(gr[None], modes)
    if not corners:
        used &= bins[partition].inside_nyquist
    if not used.any():
        raise UserError(NO_POWER)
    return LikelihoodRatio(partition, used, modes[used], newton[used], gr[used])


def _exceeds(weights: Floats, modes: Floats, threshold: float) -> float:
    """The probability of sum_b weights_b chi^2_b / 2 > threshold; chi^2_b has modes_b degrees of freedom.

    Inverts the characteristic function numerically (Gil-Pelaez 1951, Biometrika 38, 481; Imhof 1961,
    Biometrika 48, 419):  P = 1/2 + 1/pi int_0^inf dt Im[phi(t) exp(-i t threshold)] / t.
    """
    width = np.sqrt(modes @ weights**2 / 2)
    nodes, coefficients = np.polynomial.legendre.leggauss(96)
    edges = np.concatenate([[0.0], np.geomspace(1, 2**16, 17)])  # in units of 1 / width
    probability = 0.5
    for low, high in pairwise(edges):
        t = ((high - low) * nodes + high + low) / (2 * width)
        tangent = np.multiply.outer(t, weights)
        log_modulus = -np.log1p(tangent**2) @ modes / 4
        phase = np.arctan(tangent) @ modes / 2 - t * threshold
        terms = coefficients * np.exp(log_modulus) * np.sin(phase) / t
        probability += float(terms.sum() * (high - low) / (2 * width * np.pi))
        if log_modulus[-1] < -30:
            break
    return probability
