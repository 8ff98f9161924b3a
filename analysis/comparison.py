"""Several evaluated runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis import figures, page, report, style


class ComparisonError(ValueError):
    """Runs that cannot be compared."""


COLUMNS = {
    "accuracy": "accuracy",
    "auc": "AUC",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
    "cube_accuracy": "accuracy of cubes",
    "pair_accuracy": "pairs ranked correctly",
    "contrast": "contrast",
}


def read(run: Path) -> dict[str, Any]:
    """The report of an evaluated run; ComparisonError if there is none."""
    path = run / "evaluation" / "report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ComparisonError(f"{path}: not there; evaluate the run first: evaluation.py {run}") from None
    except ValueError as error:
        raise ComparisonError(f"{path}: damaged ({error}); evaluate the run again") from None


def write(folder: Path, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """`comparison.json`, `.md`, `.png` and `.pdf` of reports by the name of their run; returns the table."""
    rows = {name: {**found["slices"], **found["cubes"]} for name, found in reports.items()}
    head = ["run", "network", "data, seeds, Newton x", *COLUMNS.values()]
    lines = [head, ["---"] * len(head)]
    for name, found in reports.items():
        model, data = found["model"], found["data"]
        first, after = data["seeds"]
        numbers = (page.in_words(rows[name][key]) if key in rows[name] else "" for key in COLUMNS)
        about = f"{Path(data['file']).name}, {first} to {after - 1}, {data['newton_augmentation']:g}"
        lines.append([name, f"{model['architecture']} {model['layer_param']}", about, *numbers])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    report.write_text(folder / "comparison.md", table)
    report.write_text(folder / "comparison.json", json.dumps(rows, indent=1) + "\n")
    style.save(figures.intervals(rows, figures.CONTEST), folder / "comparison")
    return table
