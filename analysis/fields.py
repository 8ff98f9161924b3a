"""Spectra of the fields of simulations: what each tells of the gravity, all together, and how they grow.

Each field is compared with baselines and ceilings by itself. For Gaussian fields the C fields x of a mode
have a covariance S (C, C) under each gravity, and the likelihood ratio (classifiers.py) becomes

    Lambda = sum over modes of 1/2 [ x^T (1/S_N - 1/S_GR) x - ln(|S_GR| / |S_N|) ].

The generalized eigenvectors w_i of S_GR w = lambda S_N w, with w_i^T S_N w_j = delta_ij, are combinations of
the fields that are independent under both gravities, with unit power in Newton and power lambda_i in GR. So
Lambda is that of C independent fields, with the same exact distribution.

Two redshifts share their initial conditions: a combination in which these cancel shows differences in growth
that cosmic variance hides in each field (McDonald & Seljak 2009, JCAP 10, 007, for tracers of one field).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import classifiers, simulation_spectra
from analysis.classifiers import LikelihoodRatio
from analysis.context import EvaluationContext
from analysis.lattice import Lattice
from analysis.power_spectrum import Box, ModeBins, directions, equal_wavenumbers, measurable
from analysis.simulation_spectra import Partitions, SimulationSpectra
from analysis.statistics import Bools, auc_of
from datasets import GRAVITIES, CubeFile
from datasets.preparation.cosmology import Cosmology
from training import distributed
from training.metrics import Floats, Integers, Predictions

GROWTH_SQUARES = (1, 2, 3, 4, 9, 16)  # n^2 of the modes whose growth is listed
EQUAL = 1e-9  # from one, in a ratio of powers: a rounding error
ROUNDING = 1e-12  # of the power of a field, below which a difference between fields is no signal


# Each field


@dataclass(frozen=True)
class FieldSpectra:
    """Spectra of a field of the test seeds and, where the training's file exists, of the training seeds."""

    partitions: Partitions
    lattice: Lattice
    """Of the test seeds, and of the training seeds if they are other seeds of the same file."""
    ceilings: dict[str, classifiers.Ceiling]
    by_scale: dict[str, classifiers.SliceRatios]
    """The directional likelihood ratios of slices for some scales alone (`restrict_to_scales`)."""
    test: SimulationSpectra
    train: SimulationSpectra | None


def measure(context: EvaluationContext, edges: Sequence[float], field: int) -> FieldSpectra:
    """Spectra of a field of training and test seeds, with the likelihood ratios of test slices. Collective.

    `edges` are bounds of bands in n. Of several adjacent slices the first counts.
    """
    data = context.config.data_params
    partitions, channel = Partitions(context.box), field * data.channels

    def measured(
        seeds: range, file: CubeFile, ratios: Mapping[str, classifiers.SliceRatios]
    ) -> SimulationSpectra:
        batches = (replace(batch, images=batch.images[:, channel:]) for batch in context.slices(seeds, file))
        solids = ((number, cube[field]) for number, cube in context.whole_cubes(seeds, file))
        with distributed.raise_on_all_ranks():
            slices, cubes = simulation_spectra.measure(partitions, batches, solids, ratios)
        return SimulationSpectra.from_rows(
            partitions, context.gather(*slices), context.gather(*cubes), ratios
        )

    train, ceilings, by_scale = None, {}, {}
    if context.training_file is not None:
        train = measured(context.train_seeds, context.training_file, {})
        ceilings = classifiers.fit_ceilings(partitions, train)
        by_scale = classifiers.restrict_to_scales(ceilings["directional"], partitions, edges)
    ratios = {name: ceiling.slices for name, ceiling in ceilings.items()} | by_scale
    test = measured(context.seeds, context.cubes, ratios)
    known = [test, train] if context.same_file and train is not None else [test]
    lattice = Lattice.from_spectra(partitions, known, data.newton_augmentation)
    return FieldSpectra(partitions, lattice, ceilings, by_scale, test, train)


def summarize(
    predictions: Predictions, spectra: FieldSpectra, scan: dict[str, Any], *, mean_matters: bool = True
) -> dict[str, Any]:
    """Lattice diagnostics of a field, and the network beside classifiers of its spectra.

    `scan` are the `interventions`: directions are compared where the network uses them. `mean_matters`:
    whether the network sees the mean of a cube.
    """
    partitions, test, train = spectra.partitions, spectra.test, spectra.train
    shares = np.array([share["value"] for share in scan["shares"]])
    edges = np.array(scan["edges"]) / partitions.box.fundamental
    results = {
        "power_spectra": simulation_spectra.summarize(partitions, test),
        "grid": spectra.lattice.report(mean_matters=mean_matters),
        "direction_dependence": spectra.lattice.direction_dependence(shares, edges),
    }
    if train is not None:
        results["baselines"] = classifiers.compare_baselines(predictions, partitions, train, test)
        results["ceilings"] = classifiers.compare_ceilings(predictions, spectra.ceilings, test)
        results["scales"] = classifiers.compare_scales(predictions, spectra.by_scale, test)
    return results


# All fields together


def cross_power(fields: Tensor, bins: ModeBins) -> Floats:
    """Cross-spectra (b, bins, C, C) of fields (b, C, N, ..., N): the mean of Re x_c conj(x_d) in each bin.

    From the spectra of differences, in double precision: redshifts differ by 1e-3.
    """
    values = fields.double()
    power = np.stack([bins.power(values[:, c]) for c in range(values.shape[1])], axis=-1)
    cross = np.stack([power] * values.shape[1], axis=-1)
    for c in range(values.shape[1]):
        for d in range(c):
            difference = bins.power(values[:, c] - values[:, d])
            cross[..., c, d] = cross[..., d, c] = (power[..., c] + power[..., d] - difference) / 2
    return cross


@dataclass(frozen=True)
class JointLikelihoodRatio:
    """The Gaussian likelihood ratio of fields with covariances in bins of modes."""

    used: Bools
    """Bins (bins,) that count."""
    vectors: Floats
    """w_i of each bin: (used bins, C, C), one in each column."""
    ratios: Floats
    """lambda_i of each bin: (used bins, C)."""
    modes: Floats
    """Independent real numbers in each bin: (used bins,)."""

    @classmethod
    def of(cls, bins: ModeBins, newton: Floats, gr: Floats, max_wavenumber: float) -> JointLikelihoodRatio:
        """From mean cross-spectra (bins, C, C) in bins with n up to `max_wavenumber`."""
        from scipy.linalg import eigh

        fields = range(newton.shape[-1])
        used = bins.inside_nyquist & (bins.n <= max_wavenumber)
        for power in (newton, gr):
            for c in fields:
                used &= measurable(power[None, :, c, c], bins.modes)
        pairs = []
        for of_newton, of_gr in zip(newton[used], gr[used], strict=True):
            floor = ROUNDING * np.diag(np.diag(of_newton))
            pairs.append(eigh(of_gr + floor, of_newton + floor))
        ratios, vectors = (np.array(part) for part in zip(*pairs, strict=True))
        ratios = np.where(abs(ratios - 1) < EQUAL, 1.0, ratios)
        return cls(used, vectors, ratios, bins.modes[used])

    def __call__(self, power: Floats) -> Floats:
        """Lambda in nats (samples,) of samples with cross-spectra `power` (samples, bins, C, C)."""
        combined = np.einsum("bci,sbcd,bdi->sbi", self.vectors, power[:, self.used], self.vectors)
        terms = combined * (1 - 1 / self.ratios) - np.log(self.ratios)
        return np.einsum("b,sbi->s", self.modes, terms) / 2

    def expected(self) -> dict[str, float]:
        """`d_prime`, `accuracy` and `auc` on Gaussian fields with these covariances, exactly."""
        gr, modes = self.ratios.ravel(), np.repeat(self.modes, self.ratios.shape[1])
        return LikelihoodRatio("", np.ones(len(gr), bool), modes, np.ones_like(gr), gr).expected()


@dataclass(frozen=True)
class CrossSpectra:
    """Cross-spectra of slices and cubes in the bins of `directions`."""

    ids: Integers
    slices: Floats
    """(slices, bins, C, C)"""
    numbers: Integers
    """2 * seed + label of each cube."""
    cubes: Floats
    """(cubes, bins, C, C)"""

    def of(self, part: str, fields: Sequence[int], size: int) -> tuple[Floats, Integers, Integers]:
        """Cross-spectra of these fields of `slices` or `cubes`, the axis (0 for cubes) and label of each."""
        power = (self.slices if part == "slices" else self.cubes)[..., list(fields), :][..., list(fields)]
        if part == "slices":
            return power, self.ids // size % 3, self.ids // (3 * size) % 2
        return power, np.zeros_like(self.numbers), self.numbers % 2


def measure_cross_spectra(context: EvaluationContext, seeds: range, file: CubeFile) -> CrossSpectra:
    """The cross-spectra of these seeds. Of several adjacent slices the first counts. Collective."""
    flat, solid = directions(context.box, 2), directions(context.box, 3)
    channels = context.config.data_params.channels
    with distributed.raise_on_all_ranks():
        slices = [
            (batch.ids.numpy(), cross_power(batch.images[:, ::channels].cpu(), flat))
            for batch in context.slices(seeds, file)
        ]
        cubes = [
            (np.array([number]), cross_power(cube[None], solid))
            for number, cube in context.whole_cubes(seeds, file)
        ]
        columns = [[np.concatenate(column) for column in zip(*rows, strict=True)] for rows in (slices, cubes)]
    return CrossSpectra(*context.gather(*columns[0]), *context.gather(*columns[1]))


def joint_ceilings(
    box: Box, names: Sequence[str], train: CrossSpectra, test: CrossSpectra
) -> list[dict[str, Any]]:
    """Each field alone and all together: expected d', accuracy and AUC, and the AUC of the test seeds.

    For modes up to the end of the large scales and up to the Nyquist wavenumber. Covariances of slices are
    measured for each axis, those of cubes in bins of direction.
    """
    rows = []
    for limit in (box.large_scales, box.size / 2):
        for name, chosen in [*((name, [c]) for c, name in enumerate(names)), ("all", range(len(names)))]:
            row: dict[str, Any] = {"fields": name, "max_wavenumber": limit}
            for part, dimensions in (("slices", 2), ("cubes", 3)):
                known, other = (spectra.of(part, chosen, box.size) for spectra in (train, test))
                bins, logits, expected = directions(box, dimensions), np.empty(len(other[0])), []
                for axis in np.unique(known[1]):
                    power = known[0][known[1] == axis]
                    newton, gr = (power[known[2][known[1] == axis] == label].mean(0) for label in (0, 1))
                    ratio = JointLikelihoodRatio.of(bins, newton, gr, limit)
                    expected.append(ratio.expected())
                    logits[other[1] == axis] = ratio(other[0][other[1] == axis])
                row[part] = {key: float(np.mean([e[key] for e in expected])) for key in expected[0]}
                row[part]["test_auc"] = auc_of(*(logits[other[2] == label] for label in (0, 1)))
            rows.append(row)
    return rows


# Growth


def growth_table(cubes: CubeFile) -> str:
    """T = phi(z_i) / phi(z_j) of modes of GROWTH_SQUARES by gravity, beside linear theory.

    T is the regression of one field on the other over all modes and seeds; its scatter is the root mean
    square of phi(z_i) - T phi(z_j) over that of phi(z_j). The standard error of the difference of the
    gravities comes from the seeds. Empty for a file of unknown redshifts, or without two of one field.
    """
    redshifts = [z for z in cubes.field_floats("redshifts") if z is not None]
    stds = [std or 1.0 for std in cubes.field_floats("std")]
    names = cubes.field_attrs("fields", "field")
    if len(redshifts) < cubes.num_fields:
        return ""
    pairs = [(i, j) for i in range(len(names)) for j in range(i) if names[i] == names[j]]
    bins = equal_wavenumbers(Box(cubes.size, None), 3)
    spectra = np.empty((len(cubes.seeds), 2, len(bins), *[cubes.num_fields] * 2))
    values = np.empty((cubes.num_fields, *(cubes.size,) * 3), np.float32)
    for s, seed in enumerate(cubes.seeds):
        for label, gravity in enumerate(GRAVITIES):
            cubes.read(seed, gravity, values)
            spectra[s, label] = cross_power(torch.from_numpy(values)[None], bins)[0]
    settings = {key: cubes.attr_float(key) for key in Cosmology.__annotations__}
    universe = Cosmology(**{key: value for key, value in settings.items() if value is not None})
    lines = []
    for i, j in pairs:
        factor = stds[i] / stds[j]
        linear = universe.potential_growth(redshifts[i]) / universe.potential_growth(redshifts[j])
        lines += [
            f"growth T from {cubes.fields[j]} to {cubes.fields[i]}; linear theory has {linear:.4f} in both "
            "gravities, and differences of them of 0.0005 at most. What exceeds that is not explained by it.",
            "  n      Newton (scatter)      GR (scatter)          GR - Newton",
        ]
        for b in np.flatnonzero(np.isin((bins.n**2).round(), GROWTH_SQUARES)):
            power = spectra[:, :, b]
            growth = factor * power[..., i, j] / power[..., j, j]  # (seeds, 2)
            total = power.sum(0)
            mean = total[:, i, j] / total[:, j, j]
            rest = total[:, i, i] - mean * total[:, i, j]
            scatter = factor * np.sqrt(np.maximum(rest, 0) / total[:, j, j])
            texts = [f"{factor * m:.5f} ({s:.5f})" for m, s in zip(mean, scatter, strict=True)]
            difference = factor * (mean[1] - mean[0])
            line = f"  {bins.n[b]:.2f}   {texts[0]:<20}  {texts[1]:<20}  {difference:+.5f}"
            if len(growth) > 1:
                line += f" +- {np.diff(growth).std(ddof=1) / len(growth) ** 0.5:.5f}"
            lines.append(line)
    return "\n".join(lines)
