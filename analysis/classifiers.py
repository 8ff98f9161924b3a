"""Classifiers of power spectra beside which a network is judged: baselines that learn, and ceilings.

Baselines are logistic regressions on the logarithm of binned power spectra. The bins decide what a baseline
knows: `power_spectrum.shells` only scale, `power_spectrum.directions` also the direction to the grid axes.
The strength of the regularization is chosen by cross-validation over seeds, so that twins and slices of one
simulation are never in both parts.

Ceilings are the expected performance of likelihood ratios. For Gaussian fields with known spectra these are
the most powerful statistics (Neyman & Pearson 1933; Tegmark, Taylor & Heavens 1997, ApJ 480, 22):

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
from typing import Any

import numpy as np
from scipy.special import ndtri
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from analysis import statistics
from analysis.power_spectrum import ModeBins, measurable
from analysis.simulation_spectra import PER_SLICE, Partitions, SimulationSpectra
from analysis.statistics import Bools
from datasets.preparation.cosmology import linear_theory_ratio
from training.metrics import Floats, Integers, Predictions

STRENGTHS = (1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6)  # inverse strengths of the L2 penalty
FOLDS = 5
NO_POWER = (
    "The power spectra of the training slices are zero: their cubes are constant. Evaluate on other data."
)


# Baselines


@dataclass(frozen=True)
class Baseline:
    """A logistic regression on log P(k), labels 1 = GR.

    Attributes: `regression`; `strength`, the inverse strength of its penalty; `used` (bins,), the bins that
    hold power; `floor` (used bins,), the power below which a sample counts as having just that.
    """

    regression: Pipeline
    strength: float
    used: Bools
    floor: Floats

    @classmethod
    def fit(cls, power: Floats, modes: Floats, labels: Integers, seeds: Integers) -> Baseline:
        """Fit to P(k) `power` (samples, bins) with `modes` (bins,), `labels` and `seeds` (samples,).

        Bins whose power is a rounding error are left out. Raises UserError if no bin is left.
        """
        used = measurable(power, modes)
        if not used.any():
            raise UserError(NO_POWER)
        floor = 1e-6 * power[:, used].mean(0)
        features = np.log(np.maximum(power[:, used], floor))
        # Newton's method: neighboring bins are so correlated that first-order solvers converge slowly
        regression = make_pipeline(
            StandardScaler(), LogisticRegression(solver="newton-cholesky", max_iter=200)
        )
        simulations = len(np.unique(seeds))
        # threads of a matrix product this small wait for each other longer than they compute
        with threadpool_limits(1):
            if simulations == 1:  # nothing to cross-validate with
                return cls(regression.fit(features, labels), 1.0, used, floor)
            search = GridSearchCV(
                regression,
                {"logisticregression__C": STRENGTHS},
                scoring="neg_log_loss",
                cv=GroupKFold(min(FOLDS, simulations)),
            ).fit(features, labels, groups=seeds)
        strength = float(search.best_params_["logisticregression__C"])
        return cls(search.best_estimator_, strength, used, floor)

    def logits(self, power: Floats) -> Floats:
        """Logits of samples with P(k) `power` (samples, bins): (samples,). Positive means GR."""
        return self.regression.decision_function(np.log(np.maximum(power[:, self.used], self.floor)))


def compare_baselines(
    network: Predictions, partitions: Partitions, train: SimulationSpectra, test: SimulationSpectra
) -> dict[str, Any]:
    """Baselines of slices and of cubes, `isotropic` and `directional`, beside the network.

    They are fitted to `train` and applied to `test`, which holds the slices of `network` in the same order.
    Each has the metrics of `slices`, of cubes by the mean logit of their slices (`slices_by_cube`) and of
    `cubes` by their own spectra, and `gain`, what the network has over the baseline of slices.
    """
    size = partitions.box.size
    seeds, labels = train.id // (6 * size), train.id // (3 * size) % 2
    cube_seeds = np.repeat(np.arange(len(train.cube_means)), 2)
    results = {}
    for name in PER_SLICE:
        of_slices = Baseline.fit(train.slices[name], partitions.slices[name].modes, labels, seeds)
        baseline = network.with_logits(of_slices.logits(test.slices[name]))
        power, other = (np.concatenate(spectra.cubes[name]) for spectra in (train, test))
        of_cubes = Baseline.fit(power, partitions.cubes[name].modes, np.arange(len(power)) % 2, cube_seeds)
        results[name] = {
            "strength": of_slices.strength,
            "cube_strength": of_cubes.strength,
            "slices": statistics.slice_metrics(baseline),
            "slices_by_cube": statistics.cube_metrics(baseline.cube_logits),
            "cubes": statistics.cube_metrics(of_cubes.logits(other).reshape(-1, 2)),
            "gain": statistics.difference(network, baseline),
        }
    return results


# Ceilings


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

    @classmethod
    def of(
        cls, partition: str, bins: ModeBins, newton: Floats, gr: Floats, *, corners: bool = False
    ) -> LikelihoodRatio:
        """From mean spectra `newton` and `gr` (bins,) in `bins`; `corners`: also beyond n = N/2.

        Raises UserError if no bin holds power.
        """
        used = measurable(newton[None], bins.modes) & measurable(gr[None], bins.modes)
        if not corners:
            used &= bins.inside_nyquist
        if not used.any():
            raise UserError(NO_POWER)
        return cls(partition, used, bins.modes[used], newton[used], gr[used])

    @classmethod
    def isotropic(
        cls, bins: Mapping[str, ModeBins], power: Mapping[str, Floats], finest: str
    ) -> LikelihoodRatio:
        """That knows the P(k) of shells alone, from `power` (seeds, 2, bins) by partition.

        P(k) varies within a shell, steeply at low n and, in slices, with direction near the Nyquist
        wavenumber. The mean power of a shell is therefore treated as a chi-squared variable with
        (sum P)^2 / sum P^2 degrees of freedom instead of one per mode (Satterthwaite 1946, Biometrics
        Bulletin 2, 110). `finest` names a partition that resolves P(k), with one n per bin.
        """
        newton, modes = power[finest][:, 0].mean(0), bins[finest].modes
        shell = np.floor(bins[finest].n + 0.5).astype(int)
        first, second = (np.bincount(shell, modes * newton**order) for order in (1, 2))
        effective = np.divide(first**2, second, out=np.zeros_like(first), where=second > 0)
        ratio = cls.of("isotropic", bins["isotropic"], *power["isotropic"].mean(0))
        return replace(ratio, modes=effective[1 : len(bins["isotropic"]) + 1][ratio.used])

    def __call__(self, power: Floats) -> Floats:
        """Lambda in nats (samples,) of samples with P(k) `power` (samples, bins of the partition)."""
        weights = self.modes * (1 / self.newton - 1 / self.gr) / 2
        return power[:, self.used] @ weights - self.modes @ np.log(self.gr / self.newton) / 2

    def expected(self) -> dict[str, float]:
        """`d_prime`, `accuracy` and `auc` on Gaussian fields with these spectra, exactly; GR if positive."""
        ratio = self.gr / self.newton
        d_prime = float(np.sqrt(self.modes @ np.log(ratio) ** 2 / 2))
        if d_prime == 0:
            return {"accuracy": 0.5, "auc": 0.5, "d_prime": 0.0}
        offset = float(self.modes @ np.log(ratio) / 2)
        newton, gr = 1 - 1 / ratio, ratio - 1  # Lambda + offset is sum of these times chi^2 / 2
        accuracy = 1 / 2 + (_exceeds(gr, self.modes, offset) - _exceeds(newton, self.modes, offset)) / 2
        auc = _exceeds(np.concatenate([gr, -newton]), np.tile(self.modes, 2), 0.0)
        return {"accuracy": accuracy, "auc": auc, "d_prime": d_prime}


@dataclass(frozen=True)
class Ceiling:
    """The likelihood ratios of slices and of cubes for the same information."""

    slices: LikelihoodRatio
    cubes: LikelihoodRatio

    def expected(self) -> dict[str, float]:
        """Expected accuracy, AUC and d' of slices and cubes."""
        parts = {"slice": self.slices.expected(), "cube": self.cubes.expected()}
        return {f"{part}_{key}": value for part, values in parts.items() for key, value in values.items()}


def fit_ceilings(partitions: Partitions, train: SimulationSpectra) -> dict[str, Ceiling]:
    """The likelihood ratios with the mean spectra of the training twins.

    `linear`: the ratio of linear theory, where the length of the box is known. `isotropic`: by shells up to
    n = N/2. `directional`: resolved by direction, up to n = N/2. `corners`: the same with the corners
    of Fourier space. Raises UserError if no bin holds power.
    """
    slice_bins, cube_bins = partitions.slices, partitions.cubes
    slices, cubes = train.slice_means, train.cubes
    ceilings = {}
    if partitions.box.length:
        flat, solid = slice_bins["wavenumbers"], cube_bins["wavenumbers"]
        newton, cube_newton = (power["wavenumbers"][:, 0].mean(0) for power in (slices, cubes))
        excess = linear_theory_ratio(solid.n * partitions.box.fundamental)
        projected = solid.project(np.stack([cube_newton, cube_newton * excess]), flat)
        ratio = np.divide(projected[1], projected[0], out=np.ones_like(newton), where=projected[0] > 0)
        ceilings["linear"] = Ceiling(
            LikelihoodRatio.of("wavenumbers", flat, newton, newton * ratio),
            LikelihoodRatio.of("wavenumbers", solid, cube_newton, cube_newton * excess),
        )
    ceilings["isotropic"] = Ceiling(
        LikelihoodRatio.isotropic(slice_bins, slices, "symmetry"),
        LikelihoodRatio.isotropic(cube_bins, cubes, "wavenumbers"),
    )
    for name, corners in (("directional", False), ("corners", True)):
        ceilings[name] = Ceiling(
            *(
                LikelihoodRatio.of(partition, bins[partition], *power[partition].mean(0), corners=corners)
                for partition, bins, power in (
                    ("symmetry", slice_bins, slices),
                    ("directional", cube_bins, cubes),
                )
            )
        )
    return ceilings


def compare_ceilings(
    network: Predictions, ceilings: Mapping[str, Ceiling], test: SimulationSpectra
) -> dict[str, Any]:
    """The expected performance of each likelihood ratio, and its `test` on the slices and cubes of `test`.

    `gain` is what the network has over the likelihood ratio on the same slices. `attained`, only of the
    `directional` ceiling, is the network's share of the attainable d' of slices.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, ceiling in ceilings.items():
        ratio = network.with_logits(test.likelihood_ratios[name])
        cubes = test.cubes[ceiling.cubes.partition]
        cube_logits = ceiling.cubes(cubes.reshape(-1, cubes.shape[2])).reshape(-1, 2)
        results[name] = {
            **{key: {"value": value, "low": None, "high": None} for key, value in ceiling.expected().items()},
            "test": {
                "slices": statistics.headline(ratio),
                "cubes": statistics.cube_metrics(cube_logits),
            },
            "gain": statistics.difference(network, ratio),
        }
    directional = results["directional"]
    directional["attained"] = attained_share(
        statistics.leave_one_out_auc(network.wins)[0], directional["slice_auc"]["value"]
    )
    return results


def detectability(auc: float) -> float:
    """d' = sqrt(2) Phi^-1(AUC) of two normal distributions of equal width with this AUC."""
    return float(np.sqrt(2) * ndtri(auc))


def attained_share(auc: float, ceiling_auc: float) -> float:
    """A classifier's share of the attainable d', both from AUC; NaN where nothing is attainable."""
    attainable = detectability(ceiling_auc)
    return detectability(auc) / attainable if attainable > 0 else float("nan")


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
