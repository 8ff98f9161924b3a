"""The report of an evaluation: `report.json` with every number, `report.html` that opens anywhere."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from analysis import page

if TYPE_CHECKING:
    from metrics import Predictions

MAPS = ("image", "gradient", "integrated")  # shown as figures, too many numbers to list


def write(folder: Path, numbers: Mapping[str, Any], pictures: Iterable[str]) -> dict[str, Any]:
    """Write `report.json` and `report.html`; returns the numbers as JSON has them.

    `pictures` are the figures of `folder` to show, as PNG.
    """
    clean: dict[str, Any] = plain(numbers)
    write_text(folder / "report.json", json.dumps(clean, indent=1, allow_nan=False) + "\n")
    images = {name: (folder / f"{name}.png").read_bytes() for name in pictures}
    write_text(folder / "report.html", page.html(clean, images))
    return clean


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`: after a crash it is the old one or the new one."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Clock:
    """How long each part of an evaluation took, in seconds, told as it goes."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.seconds: dict[str, float] = {}
        self._say, self._last = say, time.perf_counter()

    def lap(self, name: str) -> None:
        """The part called `name` is done."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        self._say(f"{name}: {self.seconds[name]:.1f} s")


def history(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no such file."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # the last line of a run that was killed may be cut short
            lines.append(json.loads(line))
    return lines


def write_predictions(path: Path, slices: Predictions) -> None:
    """Logit, label and place of each slice, and under `cubes` the mean logit of each cube, as HDF5."""
    temporary = path.with_name(f"{path.name}.part")
    gravities = np.array(["newton", "gr"], dtype="S6")
    columns = {
        "logit": slices.logit,
        "label": slices.label,
        "seed": slices.seed,
        "gravity": gravities[slices.label],
        "axis": slices.axis,
        "position": slices.position,
        "cubes/seed": np.repeat(slices.seeds, 2),
        "cubes/gravity": np.tile(gravities, len(slices.seeds)),
        "cubes/mean_logit": slices.cube_logits.ravel(),
    }
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs["about"] = "positive logits and label 1: General Relativity"
            for name, column in columns.items():
                file.create_dataset(name, data=column)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def for_card(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card tells of an evaluation."""
    data = numbers["data"]
    estimates = {**numbers["slices"], **numbers["cubes"]}
    return {
        "data": Path(data["file"]).name,
        "seeds": data["seeds"],
        "slices": sum(numbers["confusion"].values()),
        "newton_augmentation": data["newton_augmentation"],
        "estimates": {
            key: plain([estimate["value"], estimate.get("low"), estimate.get("high")])
            for key, estimate in estimates.items()
        },
    }


def plain(value: Any) -> Any:
    """The same numbers as JSON has them: lists for arrays, null for what is not a number; no pictures."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if key not in MAPS}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
