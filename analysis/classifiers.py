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

Slices perpendicular to different axes may have different spectra, in both gravities (`Lattice.axis_power`):
baselines, spectra and likelihood ratios of slices are those of one axis each.
"""

from __future__ import annotations

from system import UserError

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from analysis import statistics
from analysis.interventions import HYBRIDS, group_masks
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
    hold power; `floor` (used bins,), the power below which a sample counts as having just that; `centers`,
    the mean log P(k) (used bins,) of the training samples of each axis, which is subtracted.
    """

    regression: Pipeline
    strength: float
    used: Bools
    floor: Floats
    centers: dict[int, Floats]

    @classmethod
    def fit(
        cls, power: Floats, modes: Floats, labels: Integers, seeds: Integers, axes: Integers | None = None
    ) -> Baseline:
        """Fit to P(k) `power` (samples, bins) with `modes` (bins,), `labels` and `seeds` (samples,).

        `axes` (samples,) are the axes perpendicular to slices. Bins whose power is a rounding error are left
        out. Raises UserError if no bin is left.
        """
        used = measurable(power, modes)
        if not used.any():
            raise UserError(NO_POWER)
        floor = 1e-6 * power[:, used].mean(0)
        features = np.log(np.maximum(power[:, used], floor))
        axes = np.zeros_like(labels) if axes is None else axes
        centers = {int(axis): features[axes == axis].mean(0) for axis in np.unique(axes)}
        features -= np.stack([centers[axis] for axis in axes])
        # Newton's method: neighboring bins are so correlated that first-order solvers converge slowly
        regression = make_pipeline(
            StandardScaler(), LogisticRegression(solver="newton-cholesky", max_iter=200)
        )
        simulations = len(np.unique(seeds))
        # threads of a matrix product this small wait for each other longer than they compute
        with threadpool_limits(1):
            if simulations == 1:  # nothing to cross-validate with
                return cls(regression.fit(features, labels), 1.0, used, floor, centers)
            search = GridSearchCV(
                regression,
                {"logisticregression__C": STRENGTHS},
                scoring="neg_log_loss",
                cv=GroupKFold(min(FOLDS, simulations)),
            ).fit(features, labels, groups=seeds)
        strength = float(search.best_params_["logisticregression__C"])
        return cls(search.best_estimator_, strength, used, floor, centers)

    def logits(self, power: Floats, axes: Integers | None = None) -> Floats:
        """Logits of samples with P(k) `power` (samples, bins): (samples,). Positive means GR."""
        axes = np.zeros(len(power), int) if axes is None else axes
        features = np.log(np.maximum(power[:, self.used], self.floor))
        return self.regression.decision_function(features - np.stack([self.centers[axis] for axis in axes]))


def compare_baselines(
    network: Predictions, partitions: Partitions, train: SimulationSpectra, test: SimulationSpectra
) -> dict[str, Any]:
    """Baselines of slices and of cubes, `isotropic` and `directional`, beside the network.

    They are fitted to `train` and applied to `test`, which has the slices of
    `network` in the same order. Each has the metrics of `slices`, of cubes by the mean logit of their slices
    (`slices_by_cube`) and of `cubes` by their spectra, and `gain`, what the network has over the baseline of
    slices.
    """
    size = partitions.box.size
    seeds, labels = train.id // (6 * size), train.id // (3 * size) % 2
    cube_seeds = np.repeat(np.arange(len(train.cube_means)), 2)
    results = {}
    for name in PER_SLICE:
        of_slices = Baseline.fit(
            train.slices[name], partitions.slices[name].modes, labels, seeds, train.axis(size)
        )
        baseline = network.with_logits(of_slices.logits(test.slices[name], test.axis(size)))
        power, other = (np.concatenate(spectra.cubes[name]) for spectra in (train, test))
        of_cubes = Baseline.fit(power, partitions.cubes[name].modes, np.arange(len(power)) % 2, cube_seeds)
        results[name] = {
            "slices": statistics.slice_metrics(baseline) | statistics.headline(baseline),
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
    def of(cls, partition: str, bins: ModeBins, newton: Floats, gr: Floats) -> LikelihoodRatio:
        """From mean spectra `newton` and `gr` (bins,) in `bins`, up to n = N/2.

        Raises UserError if no bin holds power.
        """
        used = measurable(newton[None], bins.modes) & measurable(gr[None], bins.modes) & bins.inside_nyquist
        if not used.any():
            raise UserError(NO_POWER)
        return cls(partition, used, bins.modes[used], newton[used], gr[used])

    @classmethod
    def isotropic(
        cls, bins: Mapping[str, ModeBins], power: Mapping[str, Floats], finest: str
    ) -> LikelihoodRatio:
        """That knows the P(k) of shells alone, from mean spectra `power` (2, bins) by partition.

        P(k) varies within a shell, steeply at low n and, in slices, with direction near the Nyquist
        wavenumber. The mean power of a shell is therefore treated as a chi-squared variable with
        (sum P)^2 / sum P^2 degrees of freedom instead of one per mode (Satterthwaite 1946, Biometrics
        Bulletin 2, 110). `finest` names a partition that resolves P(k), with one n per bin.
        """
        newton, modes = power[finest][0], bins[finest].modes
        shell = np.floor(bins[finest].n + 0.5).astype(int)
        first, second = (np.bincount(shell, modes * newton**order) for order in (1, 2))
        effective = np.divide(first**2, second, out=np.zeros_like(first), where=second > 0)
        ratio = cls.of("isotropic", bins["isotropic"], *power["isotropic"])
        return replace(ratio, modes=effective[1 : len(bins["isotropic"]) + 1][ratio.used])

    def __call__(self, power: Mapping[str, Floats]) -> Floats:
        """Lambda in nats (samples,) of samples with P(k) `power` (samples, bins) by partition."""
        weights = self.modes * (1 / self.newton - 1 / self.gr) / 2
        used = power[self.partition][:, self.used]
        return used @ weights - self.modes @ np.log(self.gr / self.newton) / 2

    def restrict(self, mask: Bools) -> LikelihoodRatio:
        """That of the modes in some bins of the partition, `mask` (bins,)."""
        kept = mask[self.used]
        return replace(
            self,
            used=self.used & mask,
            modes=self.modes[kept],
            newton=self.newton[kept],
            gr=self.gr[kept],
        )

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


SliceRatios = Mapping[int, LikelihoodRatio]
"""Likelihood ratios of slices by the axis perpendicular to them."""


@dataclass(frozen=True)
class Ceiling:
    """The likelihood ratios of slices, by axis, and of cubes for the same information."""

    slices: SliceRatios
    cubes: LikelihoodRatio

    def expected(self) -> dict[str, float]:
        """Expected accuracy, AUC and d' of slices, the mean over axes, and of cubes."""
        by_axis = [ratio.expected() for ratio in self.slices.values()]
        slices = {key: float(np.mean([values[key] for values in by_axis])) for key in by_axis[0]}
        parts = {"slice": slices, "cube": self.cubes.expected()}
        return {f"{part}_{key}": value for part, values in parts.items() for key, value in values.items()}


def fit_ceilings(partitions: Partitions, train: SimulationSpectra) -> dict[str, Ceiling]:
    """The likelihood ratios with the mean spectra of the training twins, all up to n = N/2.

    `linear`: the ratio of linear theory, where it applies to these simulations (`Box.linear_theory`).
    `isotropic`: by shells. `directional`: resolved by direction. Raises UserError if no bin holds power.
    """
    bins, box = partitions.cubes, partitions.box
    axes = [int(axis) for axis in np.unique(train.axis(box.size))]
    # P(k) (2, bins) of slices by axis and of cubes, by partition.
    by_axis = {
        axis: {name: power.mean(0)[:, index] for name, power in train.slice_means.items()}
        for index, axis in enumerate(axes)
    }
    cubes = {name: power.mean(0) for name, power in train.cubes.items()}
    ceilings = {}
    if box.linear_theory:
        flat, solid = partitions.slices["wavenumbers"], bins["wavenumbers"]
        newton = cubes["wavenumbers"][0]
        excess = linear_theory_ratio(solid.n * box.fundamental)
        projected = solid.project(np.stack([newton, newton * excess]), flat)
        ratio = np.divide(projected[1], projected[0], out=np.ones(len(flat)), where=projected[0] > 0)
        ceilings["linear"] = Ceiling(
            {
                axis: LikelihoodRatio.of("wavenumbers", flat, power, power * ratio)
                for axis, power in ((axis, power["wavenumbers"][0]) for axis, power in by_axis.items())
            },
            LikelihoodRatio.of("wavenumbers", solid, newton, newton * excess),
        )
    ceilings["isotropic"] = Ceiling(
        {
            axis: LikelihoodRatio.isotropic(partitions.slices, power, "symmetry")
            for axis, power in by_axis.items()
        },
        LikelihoodRatio.isotropic(bins, cubes, "wavenumbers"),
    )
    ceilings["directional"] = Ceiling(
        {
            axis: LikelihoodRatio.of("symmetry", partitions.slices["symmetry"], *power["symmetry"])
            for axis, power in by_axis.items()
        },
        LikelihoodRatio.of("directional", bins["directional"], *cubes["directional"]),
    )
    return ceilings


def restrict_to_scales(
    ceiling: Ceiling, partitions: Partitions, edges: Sequence[float]
) -> dict[str, SliceRatios]:
    """The likelihood ratios of slices for each group of `interventions.HYBRIDS` alone, and up to each edge.

    `edges` are bounds of bands in n; names are those of the groups and `n < EDGE`.
    """
    bins = partitions.slices["symmetry"]
    groups = group_masks(torch.from_numpy(bins.n), torch.from_numpy(bins.mu4), bins.box.large_scales).numpy()
    masks = dict(zip(HYBRIDS, groups, strict=True))
    masks |= {f"n < {edge:g}": bins.n < edge for edge in edges if edge > 1}
    return {
        name: {axis: ratio.restrict(mask) for axis, ratio in ceiling.slices.items()}
        for name, mask in masks.items()
    }


def compare_scales(
    network: Predictions, by_scale: Mapping[str, SliceRatios], test: SimulationSpectra
) -> dict[str, dict[str, Any]]:
    """AUC within one axis of each ratio of `restrict_to_scales`: its `test`, and what is `expected`."""
    return {
        name: {
            "test": statistics.within_axis_estimate(network.with_logits(test.likelihood_ratios[name])),
            "expected": float(np.mean([ratio.expected()["auc"] for ratio in by_axis.values()])),
        }
        for name, by_axis in by_scale.items()
    }


def compare_ceilings(
    network: Predictions, ceilings: Mapping[str, Ceiling], test: SimulationSpectra
) -> dict[str, Any]:
    """The expected performance of each likelihood ratio, and its `test` on the slices and cubes of `test`.

    `gain` is what the network has over the likelihood ratio on the same slices. `attained`, only of the
    `directional` ceiling, is the network's share of the attainable d' of slices within an axis.
    """
    results: dict[str, dict[str, Any]] = {}
    cubes = {name: np.concatenate(power) for name, power in test.cubes.items()}
    for name, ceiling in ceilings.items():
        ratio = network.with_logits(test.likelihood_ratios[name])
        results[name] = {
            **{key: {"value": value, "low": None, "high": None} for key, value in ceiling.expected().items()},
            "test": {
                "slices": statistics.headline(ratio),
                "cubes": statistics.cube_metrics(ceiling.cubes(cubes).reshape(-1, 2)),
            },
            "gain": statistics.difference(network, ratio),
        }
    directional = results["directional"]
    directional["attained"] = attained_share(
        statistics.within_axis(network)[0], directional["slice_auc"]["value"]
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
