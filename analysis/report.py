"""The files of an evaluation: `report.json`, `report.html` and `predictions.h5`, written and read."""

from __future__ import annotations

import system
from system import UserError

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from analysis import html_report
from training.metrics import Predictions

MAPS = ("image", "gradient", "integrated")  # drawn as figures, too large to list
REPORT, PREDICTIONS = "report.json", "predictions.h5"
COLUMNS = ("id", "seed", "label", "axis", "position", "logit")


class Section(BaseModel):
    """Strict types, no NaN or infinity; further keys are allowed."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class SavedEstimate(Section):
    """A value with its 95 % interval; null where undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Slices(Section):
    """Metrics of slices that other programs read."""

    accuracy: SavedEstimate
    auc: SavedEstimate
    log_loss: SavedEstimate
    calibration_error: SavedEstimate


class Cubes(Section):
    """Metrics of cubes that other programs read."""

    cube_accuracy: SavedEstimate
    cube_auc: SavedEstimate


class Model(Section):
    """The network."""

    architecture: str
    layer_param: int


class Data(Section):
    """The evaluated cubes."""

    file: str
    seeds: Annotated[list[int], Field(min_length=2, max_length=2)]
    newton_augmentation: float


class SavedReport(Section):
    """The part of report.json that other programs read."""

    run: str
    config: dict[str, dict[str, Any]]
    model: Model
    data: Data
    slices: Slices
    cubes: Cubes
    pairs: dict[str, SavedEstimate]
    significance: dict[str, Any]


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
    system.write_atomically(folder / "report.html", html_report.page(clean, images))
    for name in set(html_report.FIGURES).difference(figures):
        for suffix in ("png", "pdf"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    return clean


def read(run: Path) -> dict[str, Any]:
    """The report of an evaluated run. Raises UserError if it is missing, damaged or of an older version."""
    path = run / "evaluation" / REPORT
    fix = f"Evaluate the run first: evaluation.py {run}"
    try:
        found = pydantic_core.from_json(path.read_bytes(), allow_inf_nan=False)  # limits the depth
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file. {fix}") from None
    except ValueError as error:
        raise UserError(f"{path}: the file is damaged ({error}). {fix}") from None
    try:
        SavedReport.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])[:80]
        raise UserError(f"{path}: damaged, or of an earlier version ({key}: {first['msg']}). {fix}") from None
    return dict(found)


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
    fix = f"Evaluate the run again: evaluation.py {run}"
    try:
        with h5py.File(path, "r", locking=False) as file:
            columns = {name: file[name][:] for name in COLUMNS}
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: the predictions cannot be read ({error}). {fix}") from None
    ids, label, logit = columns["id"], columns["label"], columns["logit"]
    if problem := _problem(columns):
        raise UserError(f"{path}: {problem}. {fix}")
    integers = {name: columns[name].astype(np.int64) for name in ("seed", "axis", "position")}
    return Predictions(id=ids, label=label.astype(np.int64), logit=logit.astype(np.float64), **integers)


def _problem(columns: Mapping[str, Any]) -> str | None:
    """What is wrong with the columns of predictions; None if nothing is."""
    length = len(columns["id"])
    if not length or any(column.shape != (length,) for column in columns.values()):
        return "the columns are empty or differ in length"
    if any(column.dtype.kind not in "iu" for name, column in columns.items() if name != "logit"):
        return "ids, seeds, labels, axes and positions must be integers"
    if columns["logit"].dtype.kind != "f" or not np.isfinite(columns["logit"]).all():
        return "a logit is not a finite number"
    if (np.diff(columns["id"]) <= 0).any():
        return "the sample ids are not ascending"
    gravities = [np.unique(columns["seed"][columns["label"] == label]) for label in (0, 1)]
    if not np.isin(columns["label"], (0, 1)).all() or not np.array_equal(gravities[0], gravities[1]):
        return "one gravity is missing for some seeds"
    return None


def card_record(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card shows of an evaluation."""
    data = results["data"]
    estimates = {**results["slices"], **results["cubes"], **results["pairs"]}
    return {
        "data": Path(data["file"]).name,
        "seeds": data["seeds"],
        "slices": sum(results["confusion"].values()),
        "newton_augmentation": data["newton_augmentation"],
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
