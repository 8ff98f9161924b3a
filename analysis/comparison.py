"""Several evaluated runs side by side: different experiments, or trainings of one experiment."""

from __future__ import annotations

import system
from system import UserError

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import figures, report, statistics
from analysis.findings import format_estimate, format_number
from training.metrics import Floats, Predictions

COLUMNS = {
    "accuracy": "accuracy",
    "auc": "AUC",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
    "cube_accuracy": "cube accuracy",
    "cube_auc": "cube AUC",
}
P_VALUE = "p against chance, adjusted for the number of runs"
ENSEMBLE_COLUMNS = ("accuracy", "auc", "cube_auc")
IN_PAPER = ("run", "network", "keys that differ", "AUC", P_VALUE)  # columns of comparison.tex
MAY_DIFFER = {  # between trainings of one experiment
    "model_params.name",
    "train_params.seed",
    "train_params.log_dir",
    "data_params.local_copy",
    "data_params.cache",
}


def compare(folder: Path, runs: Mapping[str, Path]) -> str:
    """Write `comparison.json`, `.md`, `.csv`, `.tex`, `.png` and `.pdf` of runs by name; returns the table.

    The p-value tests the slice AUC of each run against chance by exchanging the labels of twins, with the
    maximum over the runs as statistic (statistics.max_p_values). `AUC - first` is the paired difference to
    the first run; a line below the table says why values are blank. Runs without a report are left out, with
    a line on standard error. Raises UserError if none has one.
    """
    evaluated = {name: run for name, run in runs.items() if (run / "evaluation" / report.REPORT).is_file()}
    if missing := [name for name in runs if name not in evaluated]:
        print(f"without a report, left out: {', '.join(missing)}", file=sys.stderr)
    if not evaluated:
        raise UserError("--compare: no run has a report. Evaluate the runs first: evaluation.py RUN")
    reports, predictions = _read(evaluated)
    results, rows, note = _compare(reports, predictions)
    table = markdown(list(rows[0]), [list(row.values()) for row in rows]) + note
    _write(folder / "comparison", table, results)
    system.write_atomically(folder / "comparison.csv", as_csv(reports, results))
    system.write_atomically(folder / "comparison.tex", as_latex(rows))
    figures.save(figures.intervals(results, figures.COMPARED), folder / "comparison")
    return table


def _compare(
    reports: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, Predictions]
) -> tuple[dict[str, Any], list[dict[str, str]], str]:
    members = list(predictions.values())
    adjusted: dict[str, float] = {}
    if all(np.array_equal(members[0].seeds, member.seeds) for member in members):
        p_values = statistics.max_p_values([member.wins for member in members])
        adjusted = dict(zip(predictions, p_values, strict=True))
    first, results, rows = next(iter(reports)), {}, []
    keys = differing_keys(reports)
    for name, content in reports.items():
        row = {**content["slices"], **content["cubes"]}
        if np.array_equal(predictions[name].id, predictions[first].id):
            row["difference"] = statistics.difference(predictions[name], predictions[first])["auc"]
        results[name] = row | {"p_value": adjusted.get(name)}
        model, data = content["model"], content["data"]
        start, end = data["seeds"]
        paired = "difference" in row and name != first
        rows.append(
            {
                "run": name,
                "network": f"{model['architecture']} {model['layer_param']}",
                "keys that differ": ", ".join(f"{key}={value}" for key, value in keys[name].items()),
                "data, seeds, Newton x": f"{Path(data['file']).name}, {start} to {end - 1}, "
                f"{data['newton_augmentation']:g}",
                **{title: format_estimate(row[key]) for key, title in COLUMNS.items()},
                "AUC - first": format_estimate(row["difference"]) if paired else "",
                P_VALUE: format_number(adjusted[name]) if adjusted else "",
            }
        )
    note = ""
    if blank := [name for name in results if "difference" not in results[name]]:
        values = "difference" if adjusted else "difference and no p-value"
        note = (
            f"\nNo {values} where blank: {', '.join(blank)} and {first} were evaluated on other seeds or "
            "axes. "
            "Evaluate all runs on the same seeds (--seeds A:B).\n"
        )
    return results, rows, note


def differing_keys(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each run, by name, the keys of the experiment that differ between the runs, with their values."""
    configs = {name: _flat(content["config"]) for name, content in reports.items()}
    names = sorted(set().union(*configs.values()) - (MAY_DIFFER - {"train_params.seed"}))
    differing = [key for key in names if len({str(config.get(key)) for config in configs.values()}) > 1]
    return {name: {key: config.get(key) for key in differing} for name, config in configs.items()}


def _flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}


def as_csv(reports: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """One row per run: its name, network, keys that differ, estimates with their intervals, p-value."""
    keys, text = differing_keys(reports), io.StringIO()
    ends = [f"{key}{end}" for key in COLUMNS for end in ("", "_low", "_high")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "architecture", "layer_param", *next(iter(keys.values())), *ends, "p_value"])
    for name, row in results.items():
        model = reports[name]["model"]
        values = [row[key].get(end) for key in COLUMNS for end in ("value", "low", "high")]
        network = [model["architecture"], model["layer_param"]]
        writer.writerow([name, *network, *keys[name].values(), *values, row["p_value"]])
    return text.getvalue()


def as_latex(rows: Sequence[Mapping[str, str]]) -> str:
    """The columns IN_PAPER as a table of the LaTeX package booktabs."""
    escaped = str.maketrans({character: f"\\{character}" for character in "_%&#"})
    head, *lines = (
        " & ".join(cell.translate(escaped) for cell in cells) + r" \\"
        for cells in (IN_PAPER, *([row[key] for key in IN_PAPER] for row in rows))
    )
    columns = "l" * len(IN_PAPER)
    start = [r"\begin{tabular}{" + columns + "}", r"\toprule", head, r"\midrule"]
    return "\n".join([*start, *lines, r"\bottomrule", r"\end{tabular}", ""])


def ensemble(folder: Path, runs: Mapping[str, Path]) -> str:
    """Write `ensemble.json` and `ensemble.md` of evaluated runs by name; returns the table.

    Raises UserError for runs without evaluation, and for runs that differ in more than train_params.seed.
    """
    reports, predictions = _read(runs)
    require_one_experiment({name: content["config"] for name, content in reports.items()})
    first, *others = predictions
    for name in others:
        if not np.array_equal(predictions[first].id, predictions[name].id):
            raise UserError(
                f"{first} and {name} were evaluated on different slices. Evaluate all runs on the same seeds."
            )
    results = summarize_trainings(predictions)
    mean = results["mean"]
    rows = {name: map(format_estimate, _columns(row)) for name, row in results["trainings"].items()}
    rows["mean"] = map(format_estimate, _columns(mean))
    for what in ("trainings", "seeds"):
        spreads = (row[f"spread_{what}"] for row in _columns(mean))
        rows[f"standard deviation over {what}"] = map(format_number, spreads)
    whole = {**results["ensemble"]["slices"], **results["ensemble"]["cubes"]}
    rows["ensemble of mean logits"] = map(format_estimate, _columns(whole))
    table = markdown(["", "accuracy", "AUC", "cube AUC"], [[name, *row] for name, row in rows.items()])
    _write(folder / "ensemble", table, results)
    return table


def require_one_experiment(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError unless the configurations, by run, differ only in train_params.seed."""
    if len(configs) < 2:
        raise UserError("--ensemble: one run is no ensemble. Give two or more runs.")
    settings = {name: _flat(config) for name, config in configs.items()}
    seeds = {name: config["train_params.seed"] for name, config in settings.items()}
    if len(set(seeds.values())) < len(seeds):
        raise UserError(
            f"{seeds}: equal train_params.seed. Give runs that were trained with different seeds."
        )
    for key in sorted(set().union(*settings.values()) - MAY_DIFFER):
        values = {name: config.get(key) for name, config in settings.items()}
        if len({str(value) for value in values.values()}) > 1:
            raise UserError(f"{values}: different {key}. Give runs that differ only in train_params.seed.")


def summarize_trainings(predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    """Metrics of the trainings, their mean and spreads, and the ensemble: the mean logit of each slice.

    Of each of ENSEMBLE_COLUMNS: the `mean` over trainings with its 95 % interval over seeds;
    `spread_trainings`, the standard deviation between trainings; `spread_seeds`, the standard error of the
    mean from the delete-one-seed jackknife.
    """
    members = list(predictions.values())
    rows = {}
    for metric in ENSEMBLE_COLUMNS:
        parts = [_without_each_seed(member)[metric] for member in members]
        values = np.array([value for value, _ in parts])
        leave_one_out = np.mean([without for _, without in parts], axis=0)
        seeds = len(leave_one_out)
        rows[metric] = {
            **statistics.jackknife(float(values.mean()), leave_one_out),
            "spread_trainings": float(values.std(ddof=1)),
            "spread_seeds": float(np.sqrt(seeds - 1) * leave_one_out.std()),
        }
    return {
        "trainings": {name: statistics.headline(member) for name, member in predictions.items()},
        "mean": rows,
        "ensemble": statistics.summarize(mean_logits(members)),
    }


def mean_logits(members: Sequence[Predictions]) -> Predictions:
    """The ensemble: the mean logit of each slice."""
    return members[0].with_logits(np.mean([member.logit for member in members], axis=0))


def _without_each_seed(predictions: Predictions) -> dict[str, tuple[float, Floats]]:
    """Value of each of ENSEMBLE_COLUMNS, and its values without each seed."""
    count = statistics.per_seed(predictions, np.ones(len(predictions)))
    right = statistics.per_seed(predictions, (predictions.logit > 0) == (predictions.label == 1))
    return {
        "accuracy": (float(right.sum() / count.sum()), (right.sum() - right) / (count.sum() - count)),
        "auc": statistics.leave_one_out_auc(predictions.wins),
        "cube_auc": statistics.leave_one_out_auc(statistics.cube_wins(predictions.cube_logits)),
    }


def _read(runs: Mapping[str, Path]) -> tuple[dict[str, dict[str, Any]], dict[str, Predictions]]:
    return (
        {name: report.read(run) for name, run in runs.items()},
        {name: report.read_predictions(run) for name, run in runs.items()},
    )


def _columns(row: Mapping[str, Any]) -> Iterator[Any]:
    return (row[key] for key in ENSEMBLE_COLUMNS)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *rows))


def _write(path: Path, table: str, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    system.write_atomically(path.with_name(f"{path.name}.md"), table)
    text = json.dumps(report.to_json(results), indent=1, allow_nan=False) + "\n"
    system.write_atomically(path.with_name(f"{path.name}.json"), text)
