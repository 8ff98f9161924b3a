"""Style of figures: legible in black and white, at the width of a journal's column."""

from __future__ import annotations

import system

import io
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
    "figure.constrained_layout.w_pad": 0.08,  # inches, so that labels of one panel do not touch the next
    "figure.dpi": 110,
    "savefig.dpi": 300,
    "image.cmap": "gray",
    "pdf.fonttype": 42,  # text remains text in the PDF
    "svg.fonttype": "none",
}
# distinct in print: dark and light, with different lines and markers
NEWTON: dict[str, Any] = {"color": "#d08a26", "linestyle": "--", "marker": "o"}
GR: dict[str, Any] = {"color": "#16365c", "linestyle": "-", "marker": "s"}
GRAY = "0.55"
# Without dates, equal results give equal files.
NO_DATE: dict[str, dict[str, Any]] = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#16365c", "linestyle": "-", "marker": "s"},
    {"color": "#d08a26", "linestyle": "--", "marker": "o"},
    {"color": "0.45", "linestyle": "-.", "marker": "^"},
    {"color": "#7c3a6b", "linestyle": ":", "marker": "D"},
)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with STYLE, without changing matplotlib's settings."""

    @wraps(draw)
    def inside(*arguments: Any, **options: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*arguments, **options)

    return inside


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG and PDF beside each other; `path` has no suffix."""
    with mpl.rc_context(STYLE):
        for kind, metadata in NO_DATE.items():
            memory = io.BytesIO()
            figure.savefig(memory, format=kind, metadata=metadata)
            system.write_atomically(path.with_name(f"{path.name}.{kind}"), memory.getvalue())
            figure.set_layout_engine("none")  # the layout of the first file serves the second


def subplots(
    width: float = WIDTH, height: float = 2.6, columns: int = 1, rows: int = 1, **options: Any
) -> Any:
    """A figure of `width` by `height` inches with its axes, laid out so that labels fit."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
