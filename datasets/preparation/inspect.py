"""The contents and problems of a cube file, also of a damaged one, and a plot of one slice."""

import system
from system import UserError

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from tqdm import tqdm

from ..cube_file import (
    GRAVITIES,
    H5PY_ERRORS,
    Cube,
    Cubes,
    attr_float,
    find_cubes,
    open_cubes,
    problems,
    python_attributes,
    slow_chunks,
)
from ..normalization import Moments
from .pack import SLAB_BYTES

MAX_PROBLEMS = 20  # lines in a report
FIELD_COLORS = "RdBu_r"  # both diverging maps are safe for color-blind readers
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_PLANE_BYTES = 1 << 30  # of a plot
DIFFERENCE_COLORS = "PuOr_r"


@dataclass
class _Findings:
    """Results of reading all values."""

    moments: dict[str, Moments] = field(default_factory=lambda: {gravity: Moments() for gravity in GRAVITIES})
    not_finite: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def report(path: Path) -> str:
    """A text with the contents of a file and its problems. Reads all values, in bounded memory.

    Raises UserError if the file cannot be opened as HDF5, or has no cubes.
    """
    with open_cubes(path) as file:
        layout, cubes = find_cubes(file)
        findings = _read_all(file, cubes)
        attributes = python_attributes(file.attrs)
    seeds = {gravity: {seed for seed, g in cubes if g == gravity} for gravity in GRAVITIES}
    pairs = seeds["newton"] & seeds["gr"]
    rows = [
        ("file", f"{path}, {path.stat().st_size / 1e6:,.1f} MB"),
        ("layout", f"{layout} (/{next(iter(cubes.values())).name}, ...)"),
        ("seeds", f"{len(pairs)} with both twins: {system.format_ranges(pairs)}"),
        ("gravities", ", ".join(f"{gravity} ({len(seeds[gravity])} cubes)" for gravity in GRAVITIES)),
        ("shape", _distinct(str(cube.shape) for cube in cubes.values())),
        ("type", _distinct(str(cube.dtype) for cube in cubes.values())),
        ("storage", _distinct(_storage(cube) for cube in cubes.values())),
    ]
    for gravity in GRAVITIES:
        moments = findings.moments[gravity]
        if moments.count:
            rows.append((gravity, f"mean {moments.mean:.6g}, std {moments.std:.6g}"))
    total = Moments()
    for moments in findings.moments.values():
        total.merge(moments)
    if total.count:
        rows.append(("all values", f"mean {total.mean:.6g}, std {total.std:.6g}"))
    rows.append(("attributes", "" if attributes else "none"))
    rows += [(f"  {key}", str(value)) for key, value in attributes.items()]
    found = _problems(path, cubes, seeds, findings)
    rows.append(("problems", "" if found else "none"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join(lines + [f"  {problem}" for problem in found])


def _distinct(texts: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _storage(cube: Cube) -> str:
    if cube.chunks is None:
        return "contiguous"
    return f"chunks {cube.chunks}" + (f", {' and '.join(cube.filters)}" if cube.filters else ", uncompressed")


def _read_all(file: h5py.File, cubes: Cubes) -> _Findings:
    findings = _Findings()
    invalid = problems(cubes)
    for (_, gravity), cube in tqdm(cubes.items(), desc="reading", unit="cube", disable=None):
        if cube.name in invalid:  # its shape may be anything
            continue
        bad = 0
        try:
            for slab in _slabs(file[cube.name]):
                finite = slab[np.abs(slab) <= MAX_FLOAT32]  # False for NaN
                bad += slab.size - finite.size
                if finite.size:
                    findings.moments[gravity].add(finite)
        except H5PY_ERRORS as error:
            findings.unreadable.append(f"/{cube.name} cannot be read: {error}")
        if bad:
            findings.not_finite.append(
                f"/{cube.name} has {bad} values that are NaN, infinite or beyond float32"
            )
    return findings


def _slabs(data: h5py.Dataset) -> Iterator[NDArray[np.float64]]:
    """The values in blocks of at most SLAB_BYTES; a plane may be larger than memory."""
    axis, block = 0, 8 * math.prod(data.shape[1:])  # bytes at one index of `axis`
    while block > SLAB_BYTES and axis < data.ndim - 1:
        axis += 1
        block //= data.shape[axis]
    rows = max(1, SLAB_BYTES // block)
    for index in np.ndindex(data.shape[:axis]):
        for start in range(0, data.shape[axis], rows):
            yield np.asarray(data[(*index, slice(start, start + rows))], dtype=np.float64)


def _problems(path: Path, cubes: Cubes, seeds: dict[str, set[int]], findings: _Findings) -> list[str]:
    found = []
    for gravity, twin in zip(GRAVITIES, reversed(GRAVITIES), strict=True):
        if alone := seeds[twin] - seeds[gravity]:
            found.append(f"missing twins: no {gravity} cube for seeds {system.format_ranges(alone)}")
    present = seeds["newton"] | seeds["gr"]
    # If one seed is far too large, the first gaps suffice.
    if gaps := set(range(min(max(present), 2 * len(present)))) - present:
        found.append(f"missing seeds: {system.format_ranges(gaps)}; training needs seeds from 0 without gaps")
    found += [*problems(cubes).values(), *findings.not_finite, *findings.unreadable]
    if slow := slow_chunks(path, cubes):
        found += slow.removeprefix(f"{path}: ").splitlines()
    if len(found) > MAX_PROBLEMS:
        found[MAX_PROBLEMS:] = [f"... and {len(found) - MAX_PROBLEMS} more"]
    return found


def check_plot(out: Path, overwrite: bool) -> None:
    """Raise UserError unless a plot can be written to `out`; called before the file is read."""
    formats = FigureCanvasAgg.filetypes
    if out.suffix.removeprefix(".") not in formats:
        raise UserError(f"{out}: found ending {out.suffix!r}, allowed: {', '.join(sorted(formats))}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: no folder {out.absolute().parent}. Create it, or choose another.")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already. Choose another name, or overwrite it with --force.")


def plot(path: Path, out: Path) -> None:
    """Plot one slice of the first seed with both twins: GR, Newton, and GR - Newton.

    Raises UserError if no seed has two cubes of one shape, or if the plot cannot be written.
    """
    with open_cubes(path) as file:
        _, cubes = find_cubes(file)
        seed = _seed_to_plot(path, cubes)
        position = cubes[seed, "gr"].shape[0] // 2
        slices = {g: np.asarray(file[cubes[seed, g].name][position], dtype=np.float64) for g in GRAVITIES}
        attributes = python_attributes(file.attrs)
    standardized = "std" in attributes
    redshift, box_size = (attr_float(attributes, key) for key in ("redshift", "box_size"))
    title = f"{path.name}: seed {seed}" + (f", z = {redshift:g}" if redshift is not None else "")
    figure = draw(
        slices["gr"],
        slices["newton"],
        box_size=box_size,
        label=f"{attributes.get('field', 'value')} [standard deviations]" if standardized else "value",
        title=f"{title}, slice x = {position} of {len(slices['gr'])}"
        + (", synthetic" if attributes.get("synthetic") is True else ""),
    )
    image = io.BytesIO()
    figure.savefig(image, dpi=160, format=out.suffix.removeprefix("."))
    try:
        system.write_atomically(out, image.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error


def _seed_to_plot(path: Path, cubes: Cubes) -> int:
    for seed, gravity in cubes:
        if gravity != "gr" or (seed, "newton") not in cubes:
            continue
        pair = cubes[seed, "gr"], cubes[seed, "newton"]
        if pair[0].shape == pair[1].shape and all(len(c.shape) == 3 and c.dtype.kind in "fiu" for c in pair):
            if 8 * math.prod(pair[0].shape[1:]) > MAX_PLANE_BYTES:
                raise UserError(f"{path}: a slice of the shape {pair[0].shape[1:]} is too large to plot.")
            return seed
    raise UserError(f"{path}: nothing to plot: no seed has two cubes of one shape. Add a pair of twins.")


def draw(
    gr: NDArray[np.float64], newton: NDArray[np.float64], *, box_size: float | None, label: str, title: str
) -> Figure:
    """Three panels: a GR slice (N, N), its Newtonian twin, and GR - Newton with its own color scale.

    `box_size` is in Mpc/h; without it the axes are in cells. `label` is that of the color bar.
    """
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    difference = gr - newton
    _panel(panels[0], gr, "General Relativity", FIELD_COLORS, (gr, newton), box_size)
    image = _panel(panels[1], newton, "Newtonian twin", FIELD_COLORS, (gr, newton), box_size)
    figure.colorbar(image, ax=panels[:2], label=label, shrink=0.87, pad=0.01)
    image = _panel(panels[2], difference, "GR \u2212 Newton", DIFFERENCE_COLORS, (difference,), box_size)
    figure.colorbar(image, ax=panels[2], label="GR \u2212 Newton, same unit", shrink=0.87, pad=0.02)
    panels[0].set_ylabel("z  [Mpc/h]" if box_size else "z  [cells]")
    figure.suptitle(title, fontsize=11)
    return figure


def _panel(
    axes: Axes,
    values: NDArray[np.float64],
    title: str,
    colors: str,
    scale: tuple[NDArray[np.float64], ...],
    box_size: float | None,
) -> AxesImage:
    finite = np.concatenate([np.abs(array[np.isfinite(array)]) for array in scale])
    limit = (finite.max() if finite.size else 0) or 1  # symmetric, so that white is zero
    side = box_size or values.shape[0]
    image = axes.imshow(
        values.T, origin="lower", extent=(0, side, 0, side), cmap=colors, vmin=-limit, vmax=limit
    )
    axes.set_title(title, fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.set_xlabel("y  [Mpc/h]" if box_size else "y  [cells]")
    return image
