"""Several fields of the same simulations in one file: redshifts, or phi and chi of one snapshot."""

from system import UserError

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from ..cube_file import GRAVITIES, CubeFile
from .gevolution import find_simulations
from .pack import Options, pack
from .writer import new_cube, new_file, require_new

OF_EACH = {"field", "fields", "redshift", "redshifts", "mean", "std", "variance", "source", "like"}
"""Attributes in which files of the same simulations may differ."""
MIN_CORRELATION = 0.8  # of one field of one simulation at two redshifts; 0.999 in gevolution, z = 10 and 1


def pack_redshifts(raw: Path, out: Path, redshifts: list[float], *, options: Options) -> None:
    """`pack` at each redshift; several become the fields of one file. Raises UserError.

    Each redshift is packed, and so checked and standardized, as if it were alone. Until they are stacked this
    takes the space of `out` once more.
    """
    if len(redshifts) == 1:
        pack(raw, out, redshift=redshifts[0], options=options)
        return
    if len(set(redshifts)) < len(redshifts):
        raise UserError(f"--redshift {' '.join(f'{z:g}' for z in redshifts)}: give each redshift once.")
    for simulation in find_simulations(raw):
        for redshift in redshifts:
            simulation.snapshot(redshift)
    require_new(out, overwrite=options.overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        parts = [Path(folder, f"{i}.h5") for i in range(len(redshifts))]
        for part, redshift in zip(parts, redshifts, strict=True):
            pack(raw, part, redshift=redshift, options=options)
        stack(parts, out, overwrite=options.overwrite)


def stack(paths: list[Path], out: Path, *, overwrite: bool = False) -> None:
    """Write the cubes of several files, which hold the same simulations, as the fields of one file.

    Raises UserError for other seeds, gravities, sizes or settings, before anything is written.
    """
    files = [CubeFile(path) for path in paths]
    for other in files[1:]:
        _require_same_simulations(files[0], other)
    per_field = {
        "fields": ("fields", "field"),
        "redshifts": ("redshifts", "redshift"),
        **{key: (key,) for key in ("mean", "std", "variance")},
    }
    attributes: dict[str, Any] = {k: v for k, v in files[0].attributes.items() if k not in OF_EACH}
    for name, names in per_field.items():
        of_fields = [value for file in files for value in file.field_attrs(*names)]
        if None not in of_fields:
            attributes[name] = of_fields
    sources = [str(file.attributes.get("source", file.path)) for file in files]
    attributes["source"] = "; ".join(dict.fromkeys(sources))
    size = files[0].size
    values = np.empty((sum(file.num_fields for file in files), size, size, size), np.float32)
    with new_file(out, bytes_needed=len(files[0].cubes) * values.nbytes, overwrite=overwrite) as target:
        target.attrs.update(attributes)
        for seed, gravity in tqdm(files[0].cubes, desc="stacking", unit="cube", disable=None):
            start = 0
            for file in files:
                file.read(seed, gravity, values[start : start + file.num_fields])
                start += file.num_fields
            cube = new_cube(target, seed, gravity, size, len(values))
            cube.write_direct(values.reshape(cube.shape))


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
    if names[0] is not None and names[0] == names[1]:
        seed = first.seeds[0]
        a, b = (np.empty((file.num_fields, *(file.size,) * 3), np.float32) for file in (first, other))
        first.read(seed, GRAVITIES[0], a)
        other.read(seed, GRAVITIES[0], b)
        correlation = float(np.corrcoef(a[0].ravel(), b[0].ravel())[0, 1])
        if correlation < MIN_CORRELATION:
            raise UserError(
                f"{other.path}: {names[0]} of seed {seed} correlates with that of {first.path} at "
                f"{correlation:.2f}, at two redshifts of one simulation above {MIN_CORRELATION}. They have "
                "other initial conditions: number the seeds alike."
            )
