"""Pack raw gevolution output into one standardized cube file, and repack cube files for fast reading.

Simulations are read twice, in slabs of a few MiB: for the mean and variance over all cubes of the file, then
to standardize and write them. Then the written cubes are read once more, two at a time, to see whether they
are twins (checks.py).

The difference of two redshifts is, for each simulation,

    d(x) = phi(x, z_1) / g(z_1) - phi(x, z_2) / g(z_2),        g(z) = D(z) / a,

with the linear growth g of the Newtonian potential (`Cosmology.potential_growth`). In linear Newtonian theory
d = 0. What remains is non-linear growth, relativistic corrections and the numerical errors of the simulation.
"""

from system import UserError

import logging
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

from .. import kernels
from ..compression import check_filters
from ..cube_file import GRAVITIES, H5PY_ERRORS, SIZE_UNIT, CubeFile, open_cubes
from ..moments import Moments
from . import checks
from .filter import EVERYTHING, Filter
from .gevolution import Simulation, check_settings, cosmology, file_attributes, find_simulations
from .writer import new_cube, new_file

MAX_PROBLEMS = 20  # lines in an error message
WORKERS = 2  # one simulation is read or written while another is processed
SLAB_BYTES = 2 * 1024**2  # stays in a processor's cache between the passes over a slab

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How cubes are changed on their way into a new file."""

    remove_mean: bool = False
    """Subtract from each cube its own mean, which identifies its gravity without any physics."""
    like: Path | None = None
    """Standardize by the mean and standard deviation of this packed file."""
    renumber: bool = False
    """Number the seeds 0, 1, 2, ..."""
    filter: Filter = EVERYTHING
    overwrite: bool = False

    def attributes(self, seeds: list[int]) -> dict[str, Any]:
        """Attributes of the file that record the options; `seeds` are the original numbers."""
        found: dict[str, Any] = {"remove_mean": True} if self.remove_mean else {}
        found |= {"like": str(self.like.absolute())} if self.like else {}
        return found | (
            {"renumber": True, "original_seeds": np.array(seeds, np.int32)} if self.renumber else {}
        )


@dataclass(frozen=True)
class Source:
    """One cube to pack: a sum of snapshots, each with a factor."""

    simulation: Simulation
    terms: tuple[tuple[Path, float], ...]


def pack(
    raw: Path,
    out: Path,
    *,
    redshift: float | None = None,
    snapshot: int | None = None,
    difference: tuple[float, float] | None = None,
    options: Options = Options(),
) -> None:
    """Pack the potential of all simulations in `raw` at one redshift or snapshot number, or a difference.

    `difference` are two redshifts. Raises UserError.
    """
    simulations = find_simulations(raw)
    check_settings(simulations)
    terms: list[tuple[float, float]]  # redshifts and factors
    if difference is not None:
        universe = cosmology(simulations[0].settings)
        growth = [universe.potential_growth(z) for z in difference]
        terms = [(difference[0], 1 / growth[0]), (difference[1], -1 / growth[1])]
        attributes: dict[str, Any] = {
            "field": "phi difference",
            "difference_redshifts": difference,
            "difference_growth": growth,
        }
    else:
        redshift = _redshift(simulations, snapshot) if snapshot is not None else redshift
        assert redshift is not None
        terms = [(redshift, 1.0)]
        attributes = {"field": "phi", "redshift": redshift}
    sources = [Source(s, tuple((s.snapshot(z), factor) for z, factor in terms)) for s in simulations]
    attributes |= file_attributes(simulations[0]) | {
        "gravities": list(GRAVITIES),
        "source": f"gevolution, {raw.absolute()}",
    }
    _pack(raw, out, sources, attributes, options)


def _redshift(simulations: list[Simulation], snapshot: int) -> float:
    """The redshift of a snapshot number. Raises UserError if simulations have none, or another one."""
    redshifts = {}
    for simulation in simulations:
        if not 0 <= snapshot < len(simulation.redshifts):
            raise UserError(
                f"{simulation.settings_file}: no snapshot {snapshot}; the snapshots 0 to "
                f"{len(simulation.redshifts) - 1} have the redshifts {simulation.redshifts}."
            )
        redshifts[simulation.redshifts[snapshot]] = simulation.settings_file
    if len(redshifts) > 1:
        listed = ", ".join(f"z = {z:g} in {path}" for z, path in redshifts.items())
        raise UserError(f"snapshot {snapshot} has several redshifts: {listed}. Use --redshift.")
    return next(iter(redshifts))


def _pack(raw: Path, out: Path, sources: list[Source], attributes: dict[str, Any], options: Options) -> None:
    size = _size(sources)
    cells = options.filter.cells or size
    if options.filter:
        attributes |= options.filter.attributes(raw, size, {})
    originals = sorted({source.simulation.seed for source in sources})
    numbers = {seed: k if options.renumber else seed for k, seed in enumerate(originals)}
    paths = {(numbers[s.simulation.seed], s.simulation.gravity): s.terms[0][0] for s in sources}
    bytes_per_cube = len(sources[0].terms) * size**3 * 8
    with (
        new_file(
            out,
            bytes_needed=len(sources) * cells**3 * 4,
            overwrite=options.overwrite,
            verify=partial(_verify, raw, paths),
        ) as file,
        # A cube that is filtered is in memory.
        ThreadPoolExecutor(1 if options.filter else WORKERS) as pool,
        tqdm(total=2 * bytes_per_cube * len(sources), unit="B", unit_scale=True, disable=None) as bar,
    ):
        bar.set_description("statistics")
        moments, means = Moments(), []
        # In the order of the sources, so that sums are reproducible.
        for part in pool.map(partial(_moments, size, options.filter), sources):
            means.append(part.mean if options.remove_mean else 0.0)
            part.mean -= means[-1]
            moments.merge(part)
            bar.update(bytes_per_cube)
        mean, std = _normalization(raw, moments, options.like)
        attributes |= {"mean": mean, "std": std, "variance": std**2} | options.attributes(originals)
        file.attrs.update(attributes)
        bar.set_description("writing")
        cubes = [new_cube(file, *key, cells) for key in paths]
        offsets = [mean + own for own in means]
        for _ in pool.map(partial(_standardize, size, options.filter, std), offsets, sources, cubes):
            bar.update(bytes_per_cube)


def _verify(raw: Path, paths: dict[tuple[int, str], Path], written: Path) -> None:
    """Raise UserError if the cubes cannot be right, and log a warning if they are unlikely to be."""
    result = checks.survey(CubeFile(written), moments=False)
    if problems := result.problems(lambda key: str(paths[key])):
        listed = "\n  ".join(problems[:MAX_PROBLEMS])
        raise UserError(f"{raw}: these simulations cannot be packed:\n  {listed}")
    for warning in result.warnings():
        log.warning("%s: %s", raw, warning)


def _normalization(raw: Path, moments: Moments, like: Path | None) -> tuple[float, float]:
    """Mean and standard deviation by which the cubes are standardized. Raises UserError."""
    if not np.isfinite(moments.variance):
        raise UserError(f"{raw}: the variance of the values is too large for float64. Check their unit.")
    if moments.variance == 0:
        raise UserError(
            f"{raw}: all values are {moments.mean}; they cannot be standardized. Check the simulations."
        )
    return (moments.mean, moments.std) if like is None else _normalization_of(like, moments.std)


def _normalization_of(like: Path, std: float) -> tuple[float, float]:
    """The attributes of `like`, if they fit values with the standard deviation `std`. Raises UserError."""
    cubes = CubeFile(like)
    mean, scale = cubes.attr_float("mean"), cubes.attr_float("std")
    if mean is None or not scale:
        raise UserError(f"--like {like}: has no attributes mean and std of one field. Pack it first.")
    if not checks.USUAL_STD[0] <= std / scale <= checks.USUAL_STD[1]:
        raise UserError(
            f"--like {like}: was standardized by std {scale:.3g}, but the values have {std:.3g}. Is it the "
            "same field at a similar redshift?"
        )
    return mean, scale


def _moments(size: int, filter: Filter, source: Source) -> Moments:
    moments = Moments()
    for _, slab in _slabs(source, size, filter, check=True):
        moments.add(slab)
    return moments


def _standardize(
    size: int, filter: Filter, std: float, mean: float, source: Source, cube: h5py.Dataset
) -> None:
    for rows, slab in _slabs(source, size, filter):
        slab -= mean
        slab /= std
        cube.write_direct(slab.astype(np.float32), dest_sel=rows)


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
    check_filters(data, path)
    return data


def _slabs(
    source: Source, size: int, filter: Filter, *, check: bool = False
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The values of one cube in slabs along the first axis, as a whole if it is filtered.

    A slab may be changed; the next overwrites it. With `check` a snapshot with constant planes or lines
    raises UserError.
    """
    if filter:
        cube = np.empty((size,) * 3)
        for where, slab in _slabs(source, size, EVERYTHING, check=check):
            cube[where] = slab
        yield slice(None), filter(cube)
        return
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
                if check and kernels.has_constant_line(into, 1):
                    raise UserError(f"{path}: {checks.describe_constant(data[()])}")
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


def repack(path: Path, out: Path, *, options: Options = Options()) -> None:
    """Write the cubes and attributes of a file, contiguous and in the packed layout. Raises UserError.

    With `options.like` values are standardized anew; those of a file without the attributes `mean` and `std`
    are taken as they are. With `options.renumber` seeds without twin are left out.
    """
    cubes = CubeFile(path)
    keys = [(s, g) for s in cubes.seeds for g in GRAVITIES] if options.renumber else list(cubes.cubes)
    originals = sorted({seed for seed, _ in keys})
    values = np.empty((cubes.num_fields, *(cubes.size,) * 3), dtype=np.float32)
    with open_cubes(path) as old:
        attributes = dict(old.attrs) | options.attributes(originals)
    if options.filter:
        attributes |= options.filter.attributes(path, cubes.size, attributes)
    shift, factor = 0.0, 1.0
    if options.like:
        mean, std = cubes.attr_float("mean") or 0.0, cubes.attr_float("std") or 1.0
        cubes.read(*keys[0], values)
        new_mean, new_std = _normalization_of(options.like, std * float(values.std(dtype=np.float64)))
        shift, factor = (new_mean - mean) / std, std / new_std
        attributes |= {"mean": new_mean, "std": new_std, "variance": new_std**2}
    cells = options.filter.cells or cubes.size
    bytes_needed = len(keys) * len(values) * cells**3 * 4
    with new_file(out, bytes_needed=bytes_needed, overwrite=options.overwrite) as file:
        file.attrs.update(attributes)
        for seed, gravity in tqdm(keys, desc="repacking", unit="cube", disable=None):
            cubes.read(seed, gravity, values)
            number = originals.index(seed) if options.renumber else seed
            filtered = np.stack([options.filter(cube) for cube in values]) if options.filter else values
            for cube in filtered:
                offset = float(cube.mean(dtype=np.float64)) if options.remove_mean else shift
                if (offset, factor) != (0.0, 1.0):
                    kernels.standardize(cube, offset, factor)
            target = new_cube(file, number, gravity, cells, len(values))
            target.write_direct(filtered.reshape(target.shape))
