"""Several trainings of one experiment that differ only in train_params.seed."""

from __future__ import annotations

import system
from system import UserError

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import report, statistics, summary
from analysis.comparison import markdown
from analysis.findings import format_estimate, format_number
from training.metrics import Predictions

MAY_DIFFER = {  # keys that do not change what a training computes
    "model_params.name",
    "train_params.seed",
    "train_params.log_dir",
    "data_params.local_copy",
    "data_params.cache",
}
METRICS = ("accuracy", "auc", "cube_auc")


def require_one_experiment(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError unless the configurations, by run, differ only in train_params.seed."""
    if len(configs) < 2:
        raise UserError("--ensemble: one run is no ensemble. Give two or more runs.")
    names = list(configs)
    first = _flatten(configs[names[0]])
    seeds = {first["train_params.seed"]: names[0]}
    for name in names[1:]:
        other = _flatten(configs[name])
        for key in sorted({*first, *other} - MAY_DIFFER):
            if first.get(key) != other.get(key):
                raise UserError(
                    f"{names[0]} and {name} differ in {key}: {first.get(key)} and {other.get(key)}. "
                    "Give runs that differ only in train_params.seed."
                )
        seed = other["train_params.seed"]
        if seed in seeds:
            raise UserError(
                f"{seeds[seed]} and {name} have the same train_params.seed {seed}. Train with different "
                "seeds."
            )
        seeds[seed] = name


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}


def require_same_slices(predictions: Mapping[str, Predictions]) -> None:
    """Raise UserError unless all runs were evaluated on the same slices."""
    names = list(predictions)
    for name in names[1:]:
        if not np.array_equal(predictions[names[0]].id, predictions[name].id):
            raise UserError(
                f"{names[0]} and {name} were evaluated on different slices. Evaluate all runs on the same "
                "seeds."
            )


def mean_logits(members: Sequence[Predictions]) -> Predictions:
    """The ensemble: the mean logit of each slice."""
    return members[0].with_logits(np.mean([member.logit for member in members], axis=0))


def write(folder: Path, runs: Mapping[str, Path]) -> str:
    """Write `ensemble.json` and `ensemble.md` of evaluated runs by name; returns the table.

    Raises UserError for runs without evaluation, and UserError for runs that do not belong together.
    """
    require_one_experiment({name: report.read(run)["config"] for name, run in runs.items()})
    predictions = {name: report.read_predictions(run) for name, run in runs.items()}
    require_same_slices(predictions)
    results = summarize(predictions)
    rows = [
        [name, *(format_estimate(found[key]) for key in METRICS)]
        for name, found in results["trainings"].items()
    ]
    mean, whole = results["mean"], results["ensemble"]
    ensemble = {**whole["slices"], **whole["cubes"]}
    rows += [
        ["mean", *(format_estimate(mean[key]) for key in METRICS)],
        *(
            [
                f"standard deviation over {what}",
                *(format_number(mean[key][f"spread_{what}"]) for key in METRICS),
            ]
            for what in ("trainings", "seeds")
        ),
        ["ensemble of mean logits", *(format_estimate(ensemble[key]) for key in METRICS)],
    ]
    table = markdown(["", "accuracy", "AUC", "cube AUC"], rows)
    folder.mkdir(parents=True, exist_ok=True)
    system.write_atomically(folder / "ensemble.md", table)
    text = json.dumps(report.to_json(results), indent=1, allow_nan=False) + "\n"
    system.write_atomically(folder / "ensemble.json", text)
    return table


def summarize(predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    """Metrics of the trainings, their mean and spreads, and the ensemble of mean logits.

    Of each of METRICS: the `mean` over trainings with its 95 % interval over seeds; `spread_trainings`, the
    standard deviation between trainings; `spread_seeds`, the standard error of the mean from the
    delete-one-seed jackknife.
    """
    members = list(predictions.values())
    without = [_without_each_seed(member) for member in members]
    rows = {}
    for metric in METRICS:
        values = np.array([found[metric][0] for found in without])
        leave_one_out = np.mean([found[metric][1] for found in without], axis=0)
        seeds = len(leave_one_out)
        scatter = np.sum((leave_one_out - leave_one_out.mean()) ** 2)
        rows[metric] = {
            **statistics.jackknife(float(values.mean()), leave_one_out),
            "spread_trainings": float(values.std(ddof=1)),
            "spread_seeds": float(np.sqrt((seeds - 1) / seeds * scatter)),
        }
    return {
        "trainings": {name: summary.headline(member) for name, member in predictions.items()},
        "mean": rows,
        "ensemble": summary.summarize(mean_logits(members)),
    }


def _without_each_seed(predictions: Predictions) -> dict[str, tuple[float, Any]]:
    """Value of each of METRICS, and its values without each seed."""
    index = predictions.seed_index
    right = np.bincount(index, (predictions.logit > 0) == (predictions.label == 1))
    count = np.bincount(index)
    return {
        "accuracy": (
            float(right.sum() / count.sum()),
            (right.sum() - right) / (count.sum() - count),
        ),
        "auc": statistics.leave_one_out_auc(statistics.mann_whitney(*summary.arrays(predictions))),
        "cube_auc": statistics.leave_one_out_auc(statistics.cube_wins(predictions.cube_logits)),
    }
