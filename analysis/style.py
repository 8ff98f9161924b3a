"""How figures look: readable in black and white, at the width of a journal's column."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

WIDTH = 3.4  # inches: one column of a journal
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.handlelength": 3.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
    "savefig.dpi": 300,
    "image.cmap": "gray",
    "pdf.fonttype": 42,  # letters stay letters in the PDF
    "svg.fonttype": "none",
}
# dark and light enough to tell apart in print, with different lines and markers beside the colour
NEWTON: dict[str, Any] = {"color": "#d08a26", "linestyle": "--", "marker": "o"}
GR: dict[str, Any] = {"color": "#16365c", "linestyle": "-", "marker": "s"}
GREY = "0.55"
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#16365c", "linestyle": "-", "marker": "s"},
    {"color": "#d08a26", "linestyle": "--", "marker": "o"},
    {"color": "0.45", "linestyle": "-.", "marker": "^"},
    {"color": "#7c3a6b", "linestyle": ":", "marker": "D"},
)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with the style of this module and leave matplotlib's settings as they were."""

    @wraps(draw)
    def inside(*arguments: Any, **options: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*arguments, **options)

    return inside


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG and PDF beside each other; `path` has no suffix."""
    with mpl.rc_context(STYLE):
        for suffix in (".png", ".pdf"):
            # no dates inside: the same numbers give the same files
            figure.savefig(path.with_name(path.name + suffix), metadata=NO_DATE[suffix])


NO_DATE: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}


def subplots(
    width: float = WIDTH, height: float = 2.6, columns: int = 1, rows: int = 1, **options: Any
) -> Any:
    """A figure, in inches, with its axes; it makes room for labels by itself."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
