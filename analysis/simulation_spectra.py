"""Power spectra of the slices and cubes of simulations, for baselines, ceilings and lattice diagnostics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from analysis import ceilings
from analysis.power_spectrum import Box, ModeBins, cube_partitions, slice_partitions, spectra
from analysis.saliency import Batch

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

PER_SLICE = ("isotropic", "directional")  # partitions of which the spectrum of every slice is kept


@dataclass(frozen=True)
class Partitions:
    """The partitions of the modes of slices and of cubes."""

    box: Box

    @cached_property
    def slices(self) -> dict[str, ModeBins]:
        """Of slices, by name."""
        return slice_partitions(self.box)

    @cached_property
    def cubes(self) -> dict[str, ModeBins]:
        """Of cubes, by name."""
        return cube_partitions(self.box)


@dataclass(frozen=True)
class Rows:
    """What one rank measured: a row per slice by sample id, and a row per cube by number 2 * seed + label."""

    slice_ids: Integers
    slice_table: Floats
    cube_numbers: Integers
    cube_table: Floats


@dataclass(frozen=True)
class SimulationSpectra:
    """Spectra of the simulations of several seeds; slices are in the order of sample ids."""

    id: Integers
    slices: dict[str, Floats]
    """P(k) (slices, bins) by partition."""
    slice_means: dict[str, Floats]
    """Mean P(k) of the slices of each cube, (seeds, 2, bins) by partition, Newton first."""
    cubes: dict[str, Floats]
    """P(k) of each cube, (seeds, 2, bins) by partition, Newton first."""
    cube_means: Floats
    """Mean of each cube, (seeds, 2)."""
    likelihood_ratios: dict[str, Floats]
    """Lambda of slices in nats, (slices,) by ceiling."""

    @classmethod
    def from_rows(cls, partitions: Partitions, rows: Rows, limits: Sequence[str] = ()) -> SimulationSpectra:
        """The spectra in the rows of all ranks; `limits` are the names of the ceilings given to `measure`."""
        widths = [len(partitions.slices[name]) for name in PER_SLICE]
        *power, ratios = _split(rows.slice_table, [*widths, len(limits)])
        table = rows.cube_table.reshape(-1, 2, rows.cube_table.shape[1])
        widths = [len(bins) for bins in (*partitions.slices.values(), *partitions.cubes.values())]
        *blocks, means = _split(table, [*widths, 1])
        names = len(partitions.slices)
        return cls(
            id=rows.slice_ids,
            slices=dict(zip(PER_SLICE, power, strict=True)),
            slice_means=dict(zip(partitions.slices, blocks[:names], strict=True)),
            cubes=dict(zip(partitions.cubes, blocks[names:], strict=True)),
            cube_means=means[..., 0],
            likelihood_ratios=dict(zip(limits, ratios.T, strict=True)),
        )


def measure(
    partitions: Partitions,
    batches: Iterable[Batch],
    fields: Iterable[tuple[int, Tensor]],
    limits: Mapping[str, ceilings.Ceiling] | None = None,
) -> Rows:
    """Spectra of the slices in `batches` and of their cubes `fields`, (N, N, N) by number 2 * seed + label.

    Of several channels the first counts. `limits` are the ceilings whose likelihood ratios are computed.
    """
    ids, rows = [], []
    sums: dict[int, Floats] = {}
    counts: Counter[int] = Counter()
    for batch in batches:
        power = spectra(batch.images[:, 0], partitions.slices)
        cube = int(batch.ids[0]) // (3 * partitions.box.size)
        sums[cube] = sums.get(cube, 0) + np.concatenate([values.sum(0) for values in power.values()])
        counts[cube] += len(batch.ids)
        ratios = [limit.slices(power[limit.slices.partition])[:, None] for limit in (limits or {}).values()]
        ids.append(batch.ids.numpy())
        rows.append(np.hstack([*(power[name] for name in PER_SLICE), *ratios]))
    numbers, cube_rows = [], []
    for number, field in fields:
        power = spectra(field[None], partitions.cubes)
        mean = float(field.cpu().double().mean())
        numbers.append(number)
        cube_rows.append(np.hstack([sums[number] / counts[number], *(p[0] for p in power.values()), mean]))
    return Rows(np.concatenate(ids), np.concatenate(rows), np.array(numbers), np.stack(cube_rows))


def _split(table: Floats, widths: list[int]) -> list[Floats]:
    """Blocks of columns of these widths."""
    return np.split(table, np.cumsum(widths)[:-1], axis=-1)
