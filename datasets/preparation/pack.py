"""Pack raw gevolution output into one standardized cube file, and repack cube files for fast reading.

Simulations are read twice, in slabs of a few MiB: for the mean and variance over all cubes of the file, then
to standardize and write them. Memory does not grow with the cubes or their number.

The difference of two redshifts is, for each simulation,

    d(x) = phi(x, z_1) / g(z_1) - phi(x, z_2) / g(z_2),        g(z) = D(z) / a,

with the linear growth g of the Newtonian potential (`Cosmology.potential_growth`). In linear Newtonian theory
d = 0. What remains is non-linear growth, relativistic corrections and the numerical errors of the simulation.

With `remove_mean` every cube gets mean 0. The mean of a GR cube differs from that of a Newtonian one by
construction, so it identifies the gravity without any physics.
"""

from system import UserError

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..cube_file import GRAVITIES, H5PY_ERRORS, SIZE_UNIT, CubeFile, open_cubes
from ..normalization import Moments
from .filter import EVERYTHING, Filter
from .gevolution import (
    COMMON,
    Simulation,
    common_settings,
    cosmology,
    find_simulations,
    numeric_setting,
    snapshot_number,
    snapshot_redshifts,
)
from .writer import new_cube, new_file

WORKERS = 2  # one simulation is read or written while another is processed
SLAB_BYTES = 2 * 1024**2  # stays in a processor's cache between the passes over a slab


@dataclass(frozen=True)
class Source:
    """One cube to pack: a sum of snapshots, each with a factor."""

    simulation: Simulation
    terms: tuple[tuple[Path, float], ...]


def pack(
    raw: Path,
    out: Path,
    *,
    redshift: float,
    remove_mean: bool = False,
    filter: Filter = EVERYTHING,
    overwrite: bool = False,
) -> None:
    """Pack the potential at one redshift of all simulations in `raw`. Raises UserError."""
    simulations = find_simulations(raw)
    sources = [Source(s, ((s.snapshot(snapshot_number(s, redshift)), 1.0),)) for s in simulations]
    _pack(raw, out, sources, {"field": "phi", "redshift": redshift}, remove_mean, filter, overwrite)


def pack_snapshot(
    raw: Path,
    out: Path,
    *,
    snapshot: int,
    remove_mean: bool = False,
    filter: Filter = EVERYTHING,
    overwrite: bool = False,
) -> None:
    """Pack the potential of one snapshot number, at one redshift in all simulations. Raises UserError."""
    simulations = find_simulations(raw)
    redshifts = {}
    for simulation in simulations:
        listed = snapshot_redshifts(simulation)
        if not 0 <= snapshot < len(listed):
            raise UserError(
                f"{simulation.settings_file}: no snapshot {snapshot}; the snapshots "
                f"0 to {len(listed) - 1} have the redshifts {listed}."
            )
        redshifts[listed[snapshot]] = simulation.settings_file
    if len(redshifts) > 1:
        found = ", ".join(f"z = {z:g} in {path}" for z, path in redshifts.items())
        raise UserError(f"snapshot {snapshot} has several redshifts: {found}. Use --redshift.")
    redshift = next(iter(redshifts))
    pack(raw, out, redshift=redshift, remove_mean=remove_mean, filter=filter, overwrite=overwrite)


def pack_difference(
    raw: Path,
    out: Path,
    *,
    redshifts: tuple[float, float],
    remove_mean: bool = False,
    filter: Filter = EVERYTHING,
    overwrite: bool = False,
) -> None:
    """Pack the difference of two redshifts, each divided by its linear growth. Raises UserError."""
    simulations = find_simulations(raw)
    universe = cosmology(common_settings(simulations))
    growth = [universe.potential_growth(z) for z in redshifts]
    factors = (1 / growth[0], -1 / growth[1])
    sources = [
        Source(
            simulation,
            tuple(
                (simulation.snapshot(snapshot_number(simulation, redshift)), factor)
                for redshift, factor in zip(redshifts, factors, strict=True)
            ),
        )
        for simulation in simulations
    ]
    attributes = {"field": "phi difference", "difference_redshifts": redshifts, "difference_growth": growth}
    _pack(raw, out, sources, attributes, remove_mean, filter, overwrite)


def _pack(
    raw: Path,
    out: Path,
    sources: list[Source],
    attributes: dict[str, Any],
    remove_mean: bool,
    filter: Filter,
    overwrite: bool,
) -> None:
    settings = common_settings([source.simulation for source in sources])
    size = _size(sources)
    if filter:
        attributes |= filter.attributes(raw, size, {})
    cells = filter.cells or size
    attributes |= {
        # m_ncdm is a list for several massive neutrinos.
        key: settings[key] if key == "m_ncdm" else numeric_setting(settings, key)
        for key in COMMON
        if key in settings and key != "boxsize"
    }
    attributes |= {
        "box_size": numeric_setting(settings, "boxsize"),
        "box_size_unit": "Mpc/h",
        "gravities": list(GRAVITIES),
        "source": f"gevolution, {raw.absolute()}",
    }
    bytes_per_cube = len(sources[0].terms) * size**3 * 8
    total = 2 * bytes_per_cube * len(sources)
    with (
        new_file(out, bytes_needed=len(sources) * cells**3 * 4, overwrite=overwrite) as file,
        ThreadPoolExecutor(1 if filter else WORKERS) as pool,  # a cube that is filtered is in memory
        tqdm(total=total, unit="B", unit_scale=True, desc="statistics", disable=None) as bar,
    ):
        moments, means = Moments(), []
        # In the order of the sources, so that sums are reproducible.
        for part in pool.map(partial(_moments, size, filter), sources):
            means.append(part.mean if remove_mean else 0.0)
            part.mean -= means[-1]
            moments.merge(part)
            bar.update(bytes_per_cube)
        if not np.isfinite(moments.variance):
            raise UserError(f"{raw}: the variance of the values is too large for float64. Check their unit.")
        if moments.variance == 0:
            raise UserError(
                f"{raw}: all values are {moments.mean}; they cannot be standardized. Check the simulations."
            )
        mean, std = moments.mean, moments.std
        attributes |= {"mean": mean, "std": std, "variance": moments.variance, "mean_removed": remove_mean}
        file.attrs.update(attributes)
        bar.set_description("writing")
        cubes = [new_cube(file, s.simulation.seed, s.simulation.gravity, cells) for s in sources]
        offsets = [mean + own for own in means]
        for _ in pool.map(partial(_standardize, size, filter, std), offsets, sources, cubes):
            bar.update(bytes_per_cube)


def _moments(size: int, filter: Filter, source: Source) -> Moments:
    moments = Moments()
    for _, slab in _filtered(source, size, filter):
        moments.add(slab)
    return moments


def _standardize(
    size: int, filter: Filter, std: float, mean: float, source: Source, cube: h5py.Dataset
) -> None:
    for rows, slab in _filtered(source, size, filter):
        slab -= mean
        slab /= std
        cube.write_direct(slab.astype(np.float32), dest_sel=rows)


def _filtered(source: Source, size: int, filter: Filter) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """As `_slabs`, but a cube that is filtered comes as a whole."""
    if not filter:
        yield from _slabs(source, size)
        return
    cube = np.empty((size,) * 3)
    for rows, slab in _slabs(source, size):
        cube[rows] = slab
    yield slice(None), filter(cube)


def _size(sources: list[Source]) -> int:
    """N. Checks the shape of every snapshot, so that an error is found before an hour of packing."""
    first: tuple[Path, tuple[int, ...]] | None = None
    for path in (path for source in sources for path, _ in source.terms):
        with open_cubes(path) as file:
            shape = _data(file, path).shape
        first = first or (path, shape)
        if len(shape) != 3 or len(set(shape)) != 1 or shape[0] % SIZE_UNIT:
            raise UserError(
                f"{path}: the shape is {shape}; (N, N, N) with N a multiple of {SIZE_UNIT} is needed."
            )
        if shape != first[1]:
            raise UserError(f"{path}: the shape is {shape}, but {first[1]} in {first[0]}. Pack equal sizes.")
    assert first is not None
    return first[1][0]


def _data(file: h5py.File, path: Path) -> h5py.Dataset:
    data = file.get("data")
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "fiu":
        raise UserError(f"{path}: no numeric data set `data`, found {list(file)}. Give output of gevolution.")
    return data


def _slabs(source: Source, size: int) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The values of one cube in slabs along the first axis. A slab may be changed; the next overwrites it."""
    with ExitStack() as files:
        terms = [(_data(files.enter_context(open_cubes(path)), path), path, f) for path, f in source.terms]
        rows = max(1, SLAB_BYTES // (size**2 * 8))
        for data, _, _ in terms:
            if data.chunks:  # or a chunk would be decompressed for each slab that it overlaps
                rows = -(-rows // data.chunks[0]) * data.chunks[0]
        total, term = np.empty((2, rows, size, size))
        for start in range(0, size, rows):
            where = slice(start, min(start + rows, size))
            slab, other = total[: where.stop - start], term[: where.stop - start]
            for i, (data, path, factor) in enumerate(terms):
                into = other if i else slab
                _read(data, path, where, into)
                if factor != 1:
                    into *= factor
                if i:
                    slab += other
            yield where, slab


def _read(data: h5py.Dataset, path: Path, where: slice, out: NDArray[np.float64]) -> None:
    try:
        data.read_direct(out, source_sel=where)
    except H5PY_ERRORS as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not np.isfinite(out.sum()):
        raise UserError(
            f"{path}: NaN or infinity in planes {where.start} to {where.stop - 1}. Rerun this simulation."
        )


def repack(path: Path, out: Path, *, filter: Filter = EVERYTHING, overwrite: bool = False) -> None:
    """Write the cubes and attributes of a file, contiguous and in the packed layout. Raises UserError."""
    cubes = CubeFile(path)
    values = np.empty((cubes.num_fields, *(cubes.size,) * 3), dtype=np.float32)
    with open_cubes(path) as old:
        attributes = dict(old.attrs)
    if filter:
        attributes |= filter.attributes(path, cubes.size, attributes)
    cells = filter.cells or cubes.size
    bytes_needed = len(cubes.cubes) * len(values) * cells**3 * 4
    with new_file(out, bytes_needed=bytes_needed, overwrite=overwrite) as file:
        file.attrs.update(attributes)
        for seed, gravity in tqdm(cubes.cubes, desc="repacking", unit="cube", disable=None):
            cubes.read(seed, gravity, values)
            filtered = np.stack([filter(field) for field in values]) if filter else values
            cube = new_cube(file, seed, gravity, cells, len(values))
            cube.write_direct(filtered.reshape(cube.shape))
