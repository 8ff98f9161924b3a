"""Pack raw gevolution output into one standardized cube file.

Simulations are read twice, in slabs of a few MiB: for the mean and variance of each field over all cubes of
the file, then to standardize and write them. Then the written cubes are read once more, two at a time, to see
whether they are twins (checks.py).

The difference of two redshifts is, for each simulation,

    d(x) = phi(x, z_1) / g(z_1) - phi(x, z_2) / g(z_2),        g(z) = D(z) / a,

with the linear growth g of the Newtonian potential (`Cosmology.potential_growth`). In linear Newtonian theory
d = 0. What remains is non-linear growth, relativistic corrections and the numerical errors of the simulation.
"""

from system import UserError

import logging
from collections.abc import Iterator, Sequence
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

from ..cube_file import GRAVITIES, H5PY_ERRORS, SIZE_UNIT, CubeFile, is_potential, open_cubes
from ..moments import Moments
from ..storage import check_filters
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
        attributes: dict[str, Any] = {"remove_mean": True} if self.remove_mean else {}
        if self.like:
            attributes["like"] = str(self.like.absolute())
        if self.renumber:
            attributes |= {"renumber": True, "original_seeds": np.array(seeds, np.int32)}
        return attributes


@dataclass(frozen=True)
class Source:
    """One field of a cube: a sum of snapshots, each with a factor."""

    terms: tuple[tuple[Path, float], ...]
    is_potential: bool
    """Other fields may vanish under Newtonian gravity."""


Cubes = dict[tuple[int, str], list[Source]]  # (seed, gravity) -> the fields of the cube


def pack(
    raw: Path,
    out: Path,
    *,
    redshifts: Sequence[float] = (),
    snapshot: int | None = None,
    difference: tuple[float, float] | None = None,
    fields: Sequence[str] = ("phi",),
    options: Options = Options(),
) -> None:
    """Pack fields of all simulations in `raw` at `redshifts` or a snapshot number, or a difference of phi.

    `fields` are named as in the snapshots' files. Several, or several redshifts, become the fields of each
    cube, every one standardized by its own mean and standard deviation. `difference` are two redshifts.
    Raises UserError.
    """
    simulations = find_simulations(raw, leave_out=options.renumber)
    check_settings(simulations)
    attributes = file_attributes(simulations[0]) | {
        "gravities": list(GRAVITIES),
        "source": f"gevolution, {raw.absolute()}",
    }
    if difference is not None:
        if list(fields) != ["phi"]:
            raise UserError("--difference takes the potential phi alone: its growth is known. Omit --field.")
        universe = cosmology(simulations[0].settings)
        growth = [universe.potential_growth(z) for z in difference]
        terms = [("phi", [(difference[0], 1 / growth[0]), (difference[1], -1 / growth[1])])]
        attributes |= {
            "field": "phi difference",
            "difference_redshifts": difference,
            "difference_growth": growth,
        }
    else:
        redshifts = [_redshift(simulations, snapshot)] if snapshot is not None else redshifts
        names = [(name, redshift) for redshift in redshifts for name in fields]
        if len(set(names)) < len(names):
            raise UserError("--redshift and --field: give each redshift and each field once.")
        terms = [(name, [(redshift, 1.0)]) for name, redshift in names]
        attributes |= (
            {"field": fields[0], "redshift": redshifts[0]}
            if len(names) == 1
            else {"fields": [name for name, _ in names], "redshifts": [z for _, z in names]}
        )
    cubes = {
        (simulation.seed, simulation.gravity): [
            Source(tuple((simulation.snapshot(z, name), f) for z, f in parts), is_potential(name))
            for name, parts in terms
        ]
        for simulation in simulations
    }
    _pack(raw, out, cubes, attributes, options)


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


def _pack(raw: Path, out: Path, cubes: Cubes, attributes: dict[str, Any], options: Options) -> None:
    seeds = sorted({seed for seed, _ in cubes})
    if options.renumber:
        cubes = {(seeds.index(seed), gravity): sources for (seed, gravity), sources in cubes.items()}
    fields = len(next(iter(cubes.values())))
    work = [(key, i, source) for key, sources in cubes.items() for i, source in enumerate(sources)]
    size = _size([path for *_, source in work for path, _ in source.terms])
    cells = options.filter.cells or size
    like = normalization_of(options.like, fields) if options.like else None
    if options.filter:
        attributes |= options.filter.attributes(raw, size, {})
    paths = {key: sources[0].terms[0][0] for key, sources in cubes.items()}
    bytes_per_field = len(work[0][2].terms) * size**3 * 8
    with (
        new_file(
            out,
            bytes_needed=len(work) * cells**3 * 4,
            overwrite=options.overwrite,
            verify=partial(_verify, raw, paths),
        ) as file,
        # A cube that is filtered is in memory.
        ThreadPoolExecutor(1 if options.filter else WORKERS) as pool,
        tqdm(total=2 * bytes_per_field * len(work), unit="B", unit_scale=True, disable=None) as bar,
    ):
        bar.set_description("statistics")
        moments, offsets = [Moments() for _ in range(fields)], []
        # In the order of the sources, so that sums are reproducible.
        parts = pool.map(partial(_moments, size, options.filter), [source for *_, source in work])
        for (_, field, _), part in zip(work, parts, strict=True):
            offsets.append(part.mean if options.remove_mean else 0.0)
            part.mean -= offsets[-1]
            moments[field].merge(part)
            bar.update(bytes_per_field)
        _check_moments(raw, moments)
        measured = [of_field.std for of_field in moments]
        means, stds = like or ([of_field.mean for of_field in moments], measured)
        if options.like:
            check_spread(options.like, stds, measured)
        file.attrs.update(attributes | normalization_attributes(means, stds) | options.attributes(seeds))
        bar.set_description("writing")
        data = {key: new_cube(file, *key, cells, fields) for key in cubes}

        def standardize(task: tuple[tuple[int, str], int, Source], offset: float) -> None:
            key, i, source = task
            for rows, slab in _slabs(source, size, options.filter):
                slab -= means[i] + offset
                slab /= stds[i]
                data[key].write_direct(slab.astype(np.float32), dest_sel=rows if fields == 1 else (i, rows))

        for _ in pool.map(standardize, work, offsets):
            bar.update(bytes_per_field)


def _verify(raw: Path, paths: dict[tuple[int, str], Path], written: Path) -> None:
    """Raise UserError if the cubes cannot be right, and log a warning if they are unlikely to be."""
    result = checks.survey(CubeFile(written), moments=False)
    if problems := result.problems(lambda key: str(paths[key])):
        listed = "\n  ".join(problems[:MAX_PROBLEMS])
        raise UserError(f"{raw}: these simulations cannot be packed:\n  {listed}")
    for warning in result.warnings():
        log.warning("%s: %s", raw, warning)


def _check_moments(raw: Path, moments: list[Moments]) -> None:
    for of_field in moments:
        if not np.isfinite(of_field.variance):
            raise UserError(f"{raw}: the variance of the values is too large for float64. Check their unit.")
        if of_field.variance == 0:
            raise UserError(
                f"{raw}: all values are {of_field.mean}; they cannot be standardized. Check the simulations."
            )


def normalization_of(like: Path, fields: int) -> tuple[list[float], list[float]]:
    """The means and standard deviations of a file of `fields` fields. Raises UserError if it has none."""
    cubes = CubeFile(like)
    if cubes.num_fields != fields:
        raise UserError(
            f"--like {like}: found {cubes.num_fields} fields, allowed: {fields}, as in these cubes"
        )
    means = [mean for mean in cubes.field_floats("mean") if mean is not None]
    stds = [std for std in cubes.field_floats("std") if std]
    if len(means) < fields or len(stds) < fields:
        raise UserError(f"--like {like}: has no attributes mean and std of each field. Pack it first.")
    return means, stds


def check_spread(like: Path, stds: list[float], now: list[float]) -> None:
    """Raise UserError if values with the deviations `now` are in other units than those of `like`."""
    for std, of_field in zip(stds, now, strict=True):
        if not checks.USUAL_STD[0] <= of_field / std <= checks.USUAL_STD[1]:
            raise UserError(
                f"--like {like}: was standardized by std {std:.3g}, but the values have {of_field:.3g}. Is "
                "it the same field at a similar redshift?"
            )


def normalization_attributes(means: list[float], stds: list[float]) -> dict[str, Any]:
    """The attributes of a file whose fields were standardized by these numbers; lists for several fields."""
    values = {"mean": means, "std": stds, "variance": [std**2 for std in stds]}
    return {key: of_fields if len(of_fields) > 1 else of_fields[0] for key, of_fields in values.items()}


def _moments(size: int, filter: Filter, source: Source) -> Moments:
    moments = Moments()
    for _, slab in _slabs(source, size, filter, check=source.is_potential):
        moments.add(slab)
    return moments


def _size(paths: list[Path]) -> int:
    """N. Checks the shape of every snapshot, so that an error is found before an hour of packing."""
    first: tuple[int, ...] = ()
    for path in paths:
        with open_cubes(path) as file:
            shape = _data(file, path).shape
        first = first or shape
        if len(shape) != 3 or len(set(shape)) != 1 or shape[0] % SIZE_UNIT:
            raise UserError(
                f"{path}: the shape is {shape}; (N, N, N) with N a multiple of {SIZE_UNIT} is needed."
            )
        if shape != first:
            raise UserError(f"{path}: the shape is {shape}, but {first} in {paths[0]}. Pack equal sizes.")
    return first[0]


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
                if check and checks.has_constant_line(into):
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
