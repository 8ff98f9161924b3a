"""The contents and problems of a cube file, also of a damaged one, and a plot of one slice."""

import system
from system import UserError

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..cube_file import GRAVITIES, Cube, CubeFile
from ..moments import Moments
from . import checks
from .writer import require_new

MAX_PROBLEMS = 20  # lines in a report
FIELD_COLORS, DIFFERENCE_COLORS = "RdBu_r", "PuOr_r"  # both diverging maps are safe for color-blind readers


def report(path: Path) -> tuple[str, int, bool]:
    """The contents of a file, the number of its problems, and whether its values can be analyzed.

    Raises UserError if the file cannot be opened as HDF5, or has no cubes that can be read.
    """
    cubes = CubeFile(path, strict=False)
    survey = checks.survey(cubes)
    seeds = {gravity: {seed for seed, g in cubes.cubes if g == gravity} for gravity in GRAVITIES}
    stored = cubes.cubes.values()
    rows = [
        ("file", f"{path}, {path.stat().st_size / 1e6:,.1f} MB"),
        ("layout", f"{cubes.layout} (/{next(iter(stored)).name}, ...)"),
        ("seeds", f"{len(cubes.seeds)} with both twins: {system.format_ranges(cubes.seeds)}"),
        ("gravities", ", ".join(f"{gravity} ({len(seeds[gravity])} cubes)" for gravity in GRAVITIES)),
        ("shape", _distinct(str(cube.shape) for cube in stored)),
        ("type", _distinct(str(cube.dtype) for cube in stored)),
        ("storage", _distinct(_storage(cube) for cube in stored)),
    ]
    for name, gravities in (*((g, [g]) for g in GRAVITIES), ("all values", list(GRAVITIES))):
        moments = [Moments() for _ in cubes.fields]
        for (_, gravity), parts in survey.moments.items():
            for total, part in zip(moments, parts if gravity in gravities else [], strict=False):
                total.merge(part)
        if moments[0].count:
            texts = [f"mean {total.mean:.6g}, std {total.std:.6g}" for total in moments]
            rows.append((name, "; ".join(texts)))
    rows.append(("attributes", "" if cubes.attributes else "none"))
    rows += [(f"  {key}", str(value)) for key, value in cubes.attributes.items()]
    wrong = [*cubes.problems.values(), *survey.unreadable]
    wrong += survey.problems(lambda key: f"/{cubes.cubes[key].name}")
    problems = _incomplete(cubes, seeds) + wrong
    count = len(problems)
    problems[MAX_PROBLEMS:] = [f"... and {len(problems) - MAX_PROBLEMS} more"] * (
        len(problems) > MAX_PROBLEMS
    )
    rows.append(("problems", "" if problems else "none"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    lines += [f"  {problem}" for problem in problems]
    if not wrong:
        types = {gravity: {cubes.cubes[s, gravity].dtype for s in seeds[gravity]} for gravity in GRAVITIES}
        warnings = survey.warnings()
        for name, total in zip(cubes.fields, moments, strict=True):
            warnings += checks.std_warnings(name, total.std)
        if all(types.values()) and types["newton"] != types["gr"]:
            listed = (f"{gravity} {_distinct(map(str, types[gravity]))}" for gravity in GRAVITIES)
            warnings.append(f"the gravities have other types: {', '.join(listed)}. Write both alike.")
        lines += [f"warning: {warning}" for warning in warnings]
    if slow := cubes.slow_chunks():
        lines.append("warning: " + slow.removeprefix(f"{path}: ").replace("\n", " "))
    return "\n".join(lines), count, not wrong


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _storage(cube: Cube) -> str:
    if cube.chunks is None:
        return "contiguous"
    return f"chunks {cube.chunks}" + (f", {' and '.join(cube.filters)}" if cube.filters else ", uncompressed")


def _incomplete(cubes: CubeFile, seeds: dict[str, set[int]]) -> list[str]:
    problems = []
    for gravity, twin in zip(GRAVITIES, reversed(GRAVITIES), strict=True):
        if alone := seeds[twin] - seeds[gravity]:
            problems.append(f"missing twins: no {gravity} cube for seeds {system.format_ranges(alone)}")
    present = seeds["newton"] | seeds["gr"]
    # If one seed is far too large, the first gaps suffice.
    if gaps := set(range(min(max(present), 2 * len(present)))) - present:
        problems.append(
            f"missing seeds: {system.format_ranges(gaps)}; training needs seeds 0, 1, 2, ...: "
            + cubes.renumber_command
        )
    return problems


def check_plot(out: Path, overwrite: bool) -> None:
    """Raise UserError unless a plot can be written to `out`; called before the file is read."""
    formats = FigureCanvasAgg.filetypes
    if out.suffix.removeprefix(".") not in formats:
        raise UserError(f"{out}: found ending {out.suffix!r}, allowed: {', '.join(sorted(formats))}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: no folder {out.absolute().parent}. Create it, or choose another.")
    require_new(out, overwrite=overwrite)


def plot(path: Path, out: Path) -> None:
    """Plot one slice of the first seed with both twins: GR, Newton, and GR - Newton.

    Raises UserError if no seed has two cubes of one shape, or if the plot cannot be written.
    """
    cubes = CubeFile(path, strict=False)
    if not cubes.seeds:
        raise UserError(f"{path}: nothing to plot: no seed has two cubes that can be read.")
    seed, position, attributes = cubes.seeds[0], cubes.size // 2, cubes.attributes
    slices = {gravity: cubes.read_planes(seed, gravity, 2)[0, 1].astype(np.float64) for gravity in GRAVITIES}
    standardized = "std" in attributes
    redshift, box_size = cubes.attr_float("redshift"), cubes.attr_float("box_size")
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
