"""Power spectra of the slices and cubes of simulations, for baselines, ceilings and lattice diagnostics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from analysis.power_spectrum import (
    Box,
    ModeBins,
    cube_partitions,
    mirror_coherence,
    slice_partitions,
    spectra,
)
from analysis.saliency import Batch
from analysis.statistics import Estimate, ratio_estimate
from datasets.preparation.cosmology import linear_theory_ratio
from training.metrics import Floats, Integers

PER_SLICE = ("isotropic", "directional")  # partitions of which the spectrum of every slice is kept


SliceStatistic = Callable[[Mapping[str, Floats]], Floats]
"""A statistic of slices, such as a likelihood ratio: P(k) (slices, bins) by partition -> (slices,)."""


@dataclass(frozen=True)
class Partitions:
    """The partitions of the modes of slices and of cubes, by name."""

    box: Box

    @cached_property
    def slices(self) -> dict[str, ModeBins]:
        """Those of slices."""
        return slice_partitions(self.box)

    @cached_property
    def cubes(self) -> dict[str, ModeBins]:
        """Those of cubes."""
        return cube_partitions(self.box)


@dataclass(frozen=True)
class SimulationSpectra:
    """Spectra of the simulations of several seeds; slices are in the order of sample ids."""

    id: Integers
    slices: dict[str, Floats]
    """P(k) (slices, bins) by partition, for those of PER_SLICE."""
    likelihood_ratios: dict[str, Floats]
    """Lambda of slices in nats, (slices,) by name."""
    slice_means: dict[str, Floats]
    """Mean P(k) of the slices of each cube and axis, (seeds, 2, axes, bins) by partition, Newton first."""
    cubes: dict[str, Floats]
    """P(k) of each cube, (seeds, 2, bins) by partition, Newton first."""
    cube_means: Floats
    """Mean of each cube, (seeds, 2)."""
    coherence: Floats
    """`power_spectrum.mirror_coherence` of each cube, (seeds, 2, 3)."""

    def axis(self, size: int) -> Integers:
        """The axis perpendicular to each slice of cubes of `size` cells a side: (slices,)."""
        return self.id // size % 3

    @classmethod
    def from_rows(
        cls, partitions: Partitions, slices: Sequence[Any], cubes: Sequence[Any], statistics: Iterable[str]
    ) -> SimulationSpectra:
        """From the rows of `measure`, ordered by id; `statistics` are the names of those given to it."""
        ids, *power = slices
        _, means, coherence, *table = (rows.reshape(len(cubes[0]) // 2, 2, *rows.shape[1:]) for rows in cubes)
        names, kept = list(partitions.slices), len(PER_SLICE)
        return cls(
            id=ids,
            slices=dict(zip(PER_SLICE, power[:kept], strict=True)),
            likelihood_ratios=dict(zip(statistics, power[kept:], strict=True)),
            slice_means=dict(zip(names, table[: len(names)], strict=True)),
            cubes=dict(zip(partitions.cubes, table[len(names) :], strict=True)),
            cube_means=means,
            coherence=coherence,
        )


def measure(
    partitions: Partitions,
    batches: Iterable[Batch],
    fields: Iterable[tuple[int, Tensor]],
    statistics: Mapping[str, Mapping[int, SliceStatistic]],
) -> tuple[list[Any], list[Any]]:
    """Spectra of the slices in `batches` and of their cubes `fields`, (N, N, N) by number 2 * seed + label.

    Returns columns with a row per slice (sample id, spectra of PER_SLICE, `statistics` of its axis) and with
    a row per cube (number, mean, coherence, mean spectra of its slices by axis, spectra). Of several channels
    the first counts.
    """
    slice_rows, cube_rows = [], []
    sums: dict[int, dict[int, list[Floats]]] = defaultdict(dict)
    size = partitions.box.size
    for batch in batches:
        power = spectra(batch.images[:, 0], partitions.slices)
        cube, axis = divmod(int(batch.ids[0]) // size, 3)  # a batch has slices of one cube and axis
        totals, before = [values.sum(0) / size for values in power.values()], sums[cube].get(axis)
        sums[cube][axis] = [a + b for a, b in zip(before, totals, strict=True)] if before else totals
        ratios = [by_axis[axis](power) for by_axis in statistics.values()]
        slice_rows.append([batch.ids.numpy(), *(power[name] for name in PER_SLICE), *ratios])
    for number, field in fields:
        power = spectra(field[None], partitions.cubes)
        mean = np.float64(field.cpu().double().mean())
        of_slices = [np.stack(of_axes) for of_axes in zip(*sums[number].values(), strict=True)]
        about = [np.int64(number), mean, mirror_coherence(field)]
        cube_rows.append([*about, *of_slices, *(values[0] for values in power.values())])
    return (
        [np.concatenate(column) for column in zip(*slice_rows, strict=True)],
        [np.stack(column) for column in zip(*cube_rows, strict=True)],
    )


def summarize(partitions: Partitions, measured: SimulationSpectra) -> dict[str, Any]:
    """Mean P(k) of slices by gravity and shell, and the ratio of GR to Newton of slices and of cubes.

    `theory` and `cube_theory` are the ratios of linear theory; None where it does not apply.
    """

    def ratio(power: Floats) -> list[Estimate]:
        return [ratio_estimate(gr, newton, "positive") for newton, gr in power.transpose(2, 1, 0)]

    slices = measured.slice_means["isotropic"].mean(2)
    newton, gr = slices.mean(0)
    results = {
        "k": partitions.slices["isotropic"].n * partitions.box.fundamental,
        "newton": newton,
        "gr": gr,
        "ratio": ratio(slices),
        "cube_ratio": ratio(measured.cubes["isotropic"]),
        "theory": None,
        "cube_theory": None,
    }
    if partitions.box.linear_theory:
        # the mean over the modes of a shell, of cubes and of what projects onto a slice
        solid, power = partitions.cubes["wavenumbers"], measured.cubes["wavenumbers"].mean(0)[0]
        both = np.stack([power, power * linear_theory_ratio(solid.n * partitions.box.fundamental)])
        flat = solid.project(both, partitions.slices["isotropic"])
        shell = np.round(solid.n).astype(int)
        sums = [np.bincount(shell, solid.modes * values)[1 : len(flat[0]) + 1] for values in both]
        results |= {"theory": flat[1] / flat[0], "cube_theory": sums[1] / sums[0]}
    return results
