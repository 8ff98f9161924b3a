"""Repack cube files: contiguous, filtered, renumbered, or with the fields of several files in one."""

from system import UserError

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import kernels
from ..cube_file import GRAVITIES, CubeFile, open_cubes
from .checks import read_pair
from .pack import Options, check_spread, normalization_attributes, normalization_of
from .writer import new_cube, new_file

OF_EACH = {"field", "fields", "redshift", "redshifts", "mean", "std", "variance", "source", "like"}
"""Attributes in which files of the same simulations may differ."""
MIN_CORRELATION = 0.8  # of one field of one simulation at two redshifts; 0.999 in gevolution, z = 10 and 1


def repack(paths: list[Path], out: Path, *, options: Options) -> None:
    """Write the cubes and attributes of a file, contiguous and in the packed layout. Raises UserError.

    The cubes of several files, which hold the same simulations, become the fields of one cube. With
    `options.like` values are standardized anew; those of a file without the attributes `mean` and `std` are
    taken as they are. With `options.renumber` seeds without twin are left out.
    """
    files = [CubeFile(path) for path in paths]
    for other in files[1:]:
        _require_same_simulations(files[0], other)
    first, size = files[0], files[0].size
    keys = [(s, g) for s in first.seeds for g in GRAVITIES] if options.renumber else list(first.cubes)
    if not keys:
        raise UserError(f"{first.path}: no seed has both twins. Nothing is left to write.")
    originals = sorted({seed for seed, _ in keys})
    values = np.empty((sum(file.num_fields for file in files), size, size, size), np.float32)

    def read(seed: int, gravity: str) -> None:
        for file, part in zip(files, np.split(values, ends), strict=True):
            file.read(seed, gravity, part)

    ends = np.cumsum([file.num_fields for file in files])[:-1].tolist()
    attributes = _attributes(files)
    if options.filter:
        attributes |= options.filter.attributes(first.path, size, attributes)
    shifts, factors = [0.0] * len(values), [1.0] * len(values)
    if options.like:
        means, stds = (
            [value or default for file in files for value in file.field_floats(key)]
            for key, default in (("mean", 0.0), ("std", 1.0))
        )
        read(*keys[0])
        now = [std * float(field.std(dtype=np.float64)) for std, field in zip(stds, values, strict=True)]
        new_means, new_stds = normalization_of(options.like, len(values))
        check_spread(options.like, new_stds, now)
        shifts = [(new - old) / std for new, old, std in zip(new_means, means, stds, strict=True)]
        factors = [old / new for old, new in zip(stds, new_stds, strict=True)]
        attributes |= normalization_attributes(new_means, new_stds)
    attributes |= options.attributes(originals)
    cells = options.filter.cells or size
    bytes_needed = len(keys) * len(values) * cells**3 * 4
    with new_file(out, bytes_needed=bytes_needed, overwrite=options.overwrite) as target:
        target.attrs.update(attributes)
        for seed, gravity in tqdm(keys, desc="repacking", unit="cube", disable=None):
            read(seed, gravity)
            fields = np.stack([options.filter(field) for field in values]) if options.filter else values
            for field, shift, factor in zip(fields, shifts, factors, strict=True):
                offset = float(field.mean(dtype=np.float64)) if options.remove_mean else shift
                if (offset, factor) != (0.0, 1.0):
                    kernels.standardize(field, offset, factor)
            number = originals.index(seed) if options.renumber else seed
            cube = new_cube(target, number, gravity, cells, len(values))
            cube.write_direct(fields.reshape(cube.shape))


def _attributes(files: list[CubeFile]) -> dict[str, Any]:
    """The attributes of a file with the fields of all `files`."""
    with open_cubes(files[0].path) as file:
        attributes = dict(file.attrs)
    if len(files) == 1:
        return attributes
    attributes = {key: value for key, value in attributes.items() if key not in OF_EACH}
    per_field = {"fields": ("fields", "field"), "redshifts": ("redshifts", "redshift")}
    for key, names in (per_field | {key: (key,) for key in ("mean", "std", "variance")}).items():
        of_fields = [value for file in files for value in file.field_attrs(*names)]
        if None not in of_fields:
            attributes[key] = of_fields
    sources = [str(file.attributes.get("source", file.path)) for file in files]
    return attributes | {"source": "; ".join(dict.fromkeys(sources))}


def _require_same_simulations(first: CubeFile, other: CubeFile) -> None:
    """Raise UserError unless two files hold the same cubes, as far as seeds, settings and values tell."""
    if first.size != other.size:
        raise UserError(f"{other.path}: has {other.size}^3 cells, but {first.path} {first.size}^3.")
    if different := sorted(first.cubes.keys() ^ other.cubes.keys()):
        seed, gravity = different[0]
        has, lacks = (first, other) if (seed, gravity) in first.cubes else (other, first)
        raise UserError(
            f"{lacks.path}: has no {gravity} cube of seed {seed}, but {has.path} has. Both need the same."
        )
    for key in sorted((first.attributes.keys() | other.attributes.keys()) - OF_EACH):
        before, now = first.attributes.get(key), other.attributes.get(key)
        if before != now:
            raise UserError(
                f"{other.path}: {key} = {now}, but {before} in {first.path}. The fields of a cube must come "
                "from the same simulations."
            )
    names = [file.field_attrs("fields", "field")[0] for file in (first, other)]
    if names[0] is not None and names[0] == names[1] and first.seeds:
        seed = first.seeds[0]
        a, b = (read_pair(file, seed)[0, 0] for file in (first, other))
        correlation = float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        if correlation < MIN_CORRELATION:
            raise UserError(
                f"{other.path}: {names[0]} of seed {seed} correlates with that of {first.path} at "
                f"{correlation:.2f}, at two redshifts of one simulation above {MIN_CORRELATION}. They have "
                "other initial conditions: number the seeds alike."
            )
