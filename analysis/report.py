"""The files of an evaluation: `report.json`, `report.html` and `predictions.h5`, written and read.

The HTML page contains findings, tables and figures, and needs no other file.
"""

from __future__ import annotations

import system
from system import UserError

import base64
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from analysis.figures import WIDTH
from analysis.findings import format_estimate, format_number
from analysis.saliency import MAPS
from training.metrics import Predictions

REPORT, PREDICTIONS = "report.json", "predictions.h5"
COLUMNS = ("id", "seed", "label", "axis", "position", "logit")
Results = Mapping[str, Any]

# Figures of the report; the captions stand in report.html.j2.
FIGURES: tuple[str, ...] = (
    "scales",
    "interventions",
    "power_spectra",
    "information",
    "roc",
    "twins",
)
FIGURES += ("confusion", "reliability", "saliency", "training")
FOLDER = Path(__file__).parent


class Stopwatch:
    """Seconds that each part of an evaluation took, printed when it ends."""

    def __init__(self, print_line: Callable[[str], Any]) -> None:
        self.seconds: dict[str, float] = {}
        self._print, self._last = print_line, time.perf_counter()

    def lap(self, name: str) -> None:
        """End the part `name`."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        self._print(f"{name}: {self.seconds[name]:.1f} s")


def write(folder: Path, results: Mapping[str, Any], figures: Iterable[str]) -> dict[str, Any]:
    """Write `report.json` and `report.html`; returns the results as JSON holds them.

    `figures` are names of PNG files in `folder` to show. Other figures of an earlier report are removed.
    """
    figures = list(figures)
    clean: dict[str, Any] = to_json(results)
    system.write_atomically(folder / REPORT, json.dumps(clean, indent=1, allow_nan=False) + "\n")
    images = {name: (folder / f"{name}.png").read_bytes() for name in figures}
    system.write_atomically(folder / "report.html", page(clean, images))
    for name in set(FIGURES).difference(figures):
        for suffix in ("png", "pdf"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    return clean


def read(run: Path) -> dict[str, Any]:
    """The report of an evaluated run. Raises UserError if it is missing or damaged."""
    path = run / "evaluation" / REPORT
    try:
        results = dict(json.loads(path.read_bytes()))
        if not {"slices", "cubes", "within_axis"} <= set(results):
            raise ValueError("it was written by an earlier version")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Evaluate the run: evaluation.py {run}") from None
    return results


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write logit, label and place of each slice, and under `cubes` the mean logit of each cube, as HDF5."""
    gravities = np.array(["newton", "gr"], dtype="S6")
    columns = {name: getattr(predictions, name) for name in COLUMNS} | {
        "gravity": gravities[predictions.label],
        "cubes/seed": np.repeat(predictions.seeds, 2),
        "cubes/gravity": np.tile(gravities, len(predictions.seeds)),
        "cubes/mean_logit": predictions.cube_logits.ravel(),
    }
    write_hdf5(path, columns, {"about": "positive logits and label 1: General Relativity"})


def write_hdf5(path: Path, columns: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Replace `path` by an HDF5 file of data sets by name, with attributes of the file."""
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.attrs.update(attributes)
        for name, column in columns.items():
            file.create_dataset(name, data=column, track_times=False)
    system.write_atomically(path, memory.getvalue())


def read_predictions(run: Path) -> Predictions:
    """The predictions of an evaluated run. Raises UserError if they are missing or damaged."""
    path = run / "evaluation" / PREDICTIONS
    try:
        with h5py.File(path, "r", locking=False) as file:
            return Predictions(**{name: file[name][:] for name in COLUMNS})
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Evaluate the run: evaluation.py {run}") from None


def card_record(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card shows of an evaluation."""
    data = results["data"]
    estimates = {**results["slices"], **results["cubes"], **results["pairs"]}
    return {
        "data": Path(data["file"]).name,
        "seeds": data["seeds"],
        "slices": sum(results["confusion"].values()),
        "newton_augmentation": data["newton_augmentation"],
        "finding": next(iter(results["findings"]), None),
        "estimates": {
            key: to_json([estimate["value"], estimate.get("low"), estimate.get("high")])
            for key, estimate in estimates.items()
        },
    }


def to_json(value: Any) -> Any:
    """The same values as JSON holds them: lists for arrays, null for NaN and infinity; without MAPS."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items() if key not in MAPS}
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# The page


def page(results: Results, images: Mapping[str, bytes]) -> str:
    """The report as one page without external files; `images` are PNG files by name."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "estimate": _estimate,
        "number": format_number,
        "setting": _setting,
        "typeset": _typeset,
    }
    figures = {
        name: {"data": base64.b64encode(png).decode(), "inches": _inches(png)} for name, png in images.items()
    }
    style = Markup((FOLDER / "report.css").read_text())
    return environment.get_template("report.html.j2").render(results, figures=figures, style=style)


def _estimate(estimate: Mapping[str, Any], small: float = 1e-3) -> Markup:
    """A value, and its interval in an element that a page shows on a line below."""
    value, _, interval = format_estimate(estimate, small=small).partition(" ")
    return _typeset(value) + (
        Markup('<span class="interval">{}</span>').format(_typeset(interval)) if interval else ""
    )


def _typeset(text: str) -> Markup:
    """Plain text in the typography of a paper: subscripts, signs and powers of ten."""
    html = str(escape(text))
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", html)
    html = re.sub(r"\b([Pkn])_(GR|N|[xyz0-2])\b", r"\1<sub>\2</sub>", html)
    html = re.sub(r"(\d)e([-+]?)0*(\d+)\b", r"\1 × 10<sup>\2\3</sup>", html).replace("<sup>+", "<sup>")
    html = re.sub(r"(?<![\w.)])-(?=\d)", "−", html).replace("<sup>-", "<sup>−")
    return Markup(html.replace("+-", "±").replace("&lt;=", "≤").replace("&gt;=", "≥"))


def _inches(png: bytes) -> float:
    """Width of a PNG file, from its header and its chunk pHYs; that of a column if it has no resolution."""
    resolution = png.partition(b"pHYs")[2]
    per_meter = int.from_bytes(resolution[:4], "big")
    return int.from_bytes(png[16:20], "big") / per_meter / 0.0254 if per_meter else WIDTH


def _setting(value: Any, key: str) -> str:
    """What a setting is: seeds as a range with its last one, numbers with the digits that matter."""
    if key == "seeds" and value:
        return f"{value[0]} to {value[1] - 1}"
    if key == "seconds":
        return ", ".join(f"{part} {seconds:.1f}" for part, seconds in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
