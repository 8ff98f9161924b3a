"""Several evaluated runs side by side."""

from __future__ import annotations

import system

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import figures, report, significance, statistics, style, summary
from analysis.findings import format_estimate, format_number
from training.metrics import Predictions

COLUMNS = {
    "accuracy": "accuracy",
    "auc": "AUC",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
    "cube_accuracy": "cube accuracy",
    "cube_auc": "cube AUC",
}

P_VALUE = "p against chance, adjusted for the number of runs"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *rows))


def p_values(predictions: Mapping[str, Predictions]) -> dict[str, float] | None:
    """p-values by run, adjusted for the number of runs; None unless all were evaluated on the same seeds."""
    members = list(predictions.values())
    if any(not np.array_equal(members[0].seeds, member.seeds) for member in members):
        return None
    wins = [statistics.mann_whitney(*summary.arrays(member)) for member in members]
    return dict(zip(predictions, significance.max_p_values(wins), strict=True))


def write(folder: Path, runs: Mapping[str, Path]) -> str:
    """Write `comparison.json`, `.md`, `.png` and `.pdf` of evaluated runs by name; returns the table.

    The p-value tests the slice AUC of each run against chance by exchanging the labels of twins, with the
    maximum over the runs as statistic (significance.max_p_values). `AUC - first` is the paired difference to
    the first run; a line below the table says why values are blank. Raises UserError for runs without
    evaluation.
    """
    reports = {name: report.read(run) for name, run in runs.items()}
    predictions = {name: report.read_predictions(run) for name, run in runs.items()}
    first_name, first = next(iter(predictions.items()))
    adjusted = p_values(predictions)
    results: dict[str, dict[str, Any]] = {}
    lines: list[list[str]] = []
    for name, found in reports.items():
        row = {**found["slices"], **found["cubes"]}
        if np.array_equal(predictions[name].id, first.id):
            row["difference"] = summary.difference(predictions[name], first)["auc"]
        results[name] = row | {"p_value": adjusted[name] if adjusted else None}
        model, data = found["model"], found["data"]
        start, end = data["seeds"]
        lines.append(
            [
                name,
                f"{model['architecture']} {model['layer_param']}",
                f"{Path(data['file']).name}, {start} to {end - 1}, {data['newton_augmentation']:g}",
                *(format_estimate(row[key]) for key in COLUMNS),
                format_estimate(row["difference"]) if "difference" in row and name != first_name else "",
                format_number(adjusted[name]) if adjusted else "",
            ]
        )
    table = markdown(
        ["run", "network", "data, seeds, Newton x", *COLUMNS.values(), "AUC - first", P_VALUE], lines
    )
    if blank := [name for name in runs if "difference" not in results[name]]:
        values = "difference" if adjusted else "difference and no p-value"
        table += (
            f"\nNo {values} where blank: {', '.join(blank)} and {first_name} were evaluated on other seeds "
            "or axes. Evaluate all runs on the same seeds (--seeds A:B).\n"
        )
    folder.mkdir(parents=True, exist_ok=True)
    system.write_atomically(folder / "comparison.md", table)
    system.write_atomically(
        folder / "comparison.json", json.dumps(report.to_json(results), indent=1, allow_nan=False) + "\n"
    )
    style.save(figures.intervals(results, figures.COMPARED), folder / "comparison")
    return table
