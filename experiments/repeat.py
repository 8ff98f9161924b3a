"""Repeat an experiment over trainings, folds and numbers of training seeds.

    python experiments/repeat.py experiments/lynx_z1.yaml --trainings 5 --folds 2 [--seeds 40 75 150]

Trainings differ in train_params.seed. Folds differ in the test seeds: fold k tests on the k-th block of
data_params.test_seeds seeds and trains on the first data_params.train_seeds of the others. `--seeds` repeats
this for other values of data_params.train_seeds: the learning curve.

Every repetition is an ordinary run in its own folder, evaluated by `evaluation.py --quick`. The same command
resumes what was interrupted. `--jobs N` runs N at a time, each on a share of the cores or on its own GPU. In
a SLURM array every task does its part. The command that finds all runs complete writes the summary:
LOG_DIR/NAME-repeat/summary.json, summary.md and learning_curve.png and .pdf.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import system
from system import UserError

import argparse

from processes import ROOT, make_parser, start, stop

# Before the imports below, which take seconds.
PARSER = make_parser(__doc__)
PARSER.add_argument("--trainings", type=int, default=5, help="trainings per fold (%(default)s)")
PARSER.add_argument("--folds", type=int, default=1, help="blocks of test seeds (%(default)s)")
PARSER.add_argument("--seeds", type=int, nargs="+", help="values of train_seeds (the experiment's)")
PARSER.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    PARSER.parse_args()

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import h5py
import numpy as np
import torch

import datasets
from analysis import figures, report, statistics
from analysis.comparison import markdown, mean_logits
from datasets.preparation.writer import new_file
from models.calibration import Calibration
from training import metrics
from training.config import MAY_CHANGE_IN_SERIES, Config, check_same_settings, load_config
from training.distributed import run_program

POLL_SECONDS = 0.5
METRICS = {"auc": "AUC of slices", "accuracy": "accuracy of slices"}
METRICS |= {"cube_auc": "AUC of cubes", "cube_accuracy": "accuracy of cubes"}


@dataclass(frozen=True)
class Repetition:
    """One run of the experiment."""

    run_dir: Path
    datafile: Path
    train_seeds: int
    fold: int
    training: int

    @property
    def trained(self) -> bool:
        """Whether the training is complete."""
        return (self.run_dir / "model" / "config.json").exists()

    @property
    def complete(self) -> bool:
        """Whether the run is trained and evaluated."""
        return self.trained and (self.run_dir / "evaluation" / report.REPORT).exists()

    def command(self, options: argparse.Namespace) -> list[str]:
        """The command that trains or, if the run is trained, evaluates this repetition."""
        if self.trained:
            return [*options.launcher, str(ROOT / "evaluation.py"), str(self.run_dir), "--quick"]
        settings = {
            "model_params.name": self.run_dir.name,
            "data_params.datafile": self.datafile,
            "data_params.train_seeds": self.train_seeds,
            "data_params.synthetic": "null",
            "train_params.log_dir": self.run_dir.parent,
            "train_params.seed": self.training,
        }
        changes = [f"{key}={value}" for key, value in settings.items()]
        trainer = str(ROOT / "trainer.py")
        return [*options.launcher, trainer, options.experiment, *options.overrides, *changes, "--no-extend"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = PARSER.parse_intermixed_args(arguments)
    if min(options.trainings, options.folds, options.jobs) < 1:
        PARSER.error("--trainings, --folds and --jobs: allowed: 1 and more")
    return run_program(lambda: repeat(load_config(options.experiment, options.overrides), options))


def repeat(config: Config, options: argparse.Namespace) -> None:
    """Run this task's part of the repetitions, then summarize if all are complete."""
    cubes = datasets.CubeFile(config.data_params.datafile)
    options.seeds = sorted(options.seeds or [config.data_params.train_seeds])
    check_seeds(config, cubes, options)
    folder = Path(config.train_params.log_dir) / f"{config.model_params.name}-repeat"
    folder.mkdir(parents=True, exist_ok=True)
    check_experiment(config, folder / "experiment.json")
    repetitions = list(plan(config, cubes, folder, options))
    task, first = (system.read_int(f"SLURM_ARRAY_TASK_{name}", 0) for name in ("ID", "MIN"))
    tasks = system.read_int("SLURM_ARRAY_TASK_COUNT", 1, minimum=1)
    execute(repetitions[(task - first) % tasks :: tasks], options)
    if missing := sum(not repetition.complete for repetition in repetitions):
        print(f"{len(repetitions) - missing} of {len(repetitions)} runs are complete")
        return
    summary = summarize(repetitions)
    text = table(summary, config.data_params.validation_seeds)
    system.write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    system.write_atomically(folder / "summary.md", text)
    figures.save(figures.learning_curve(summary, METRICS), folder / "learning_curve")
    print(text, f"written to {folder}", sep="\n")
    print(f"next: python evaluation.py --compare {folder}/{config.model_params.name}-*")


def check_seeds(config: Config, cubes: datasets.CubeFile, options: argparse.Namespace) -> None:
    """Raise UserError unless every fold has its seeds."""
    data, seeds = config.data_params, len(cubes.seeds)
    first, last, largest = options.seeds[0], options.seeds[-1], seeds - data.test_seeds
    if options.folds * data.test_seeds > seeds or not data.validation_seeds < first <= last <= largest:
        raise UserError(
            f"{cubes.path}: found {seeds} seeds, --folds {options.folds} and train_seeds {first} to {last}. "
            f"With test_seeds {data.test_seeds} they allow at most {seeds // data.test_seeds} folds, and "
            f"train_seeds, validation seeds included, from {data.validation_seeds + 1} to {largest}."
        )


def check_experiment(config: Config, path: Path) -> None:
    """Record the experiment at `path`; raise UserError if runs of another one were started there."""
    if not path.exists():
        system.write_atomically(path, json.dumps(config.to_dict(), indent=1) + "\n")
    saved = json.loads(path.read_text(encoding="utf-8"))
    vary = {"data_params.train_seeds", "train_params.seed"}
    check_same_settings(path.parent, saved, config.to_dict(), MAY_CHANGE_IN_SERIES | vary)


def plan(
    config: Config, cubes: datasets.CubeFile, folder: Path, options: argparse.Namespace
) -> Iterator[Repetition]:
    """All repetitions; writes the data file of each fold."""
    count, name = config.data_params.test_seeds, config.model_params.name
    for train_seeds, fold in product(options.seeds, range(options.folds)):
        test = cubes.seeds[fold * count : (fold + 1) * count]
        train = [seed for seed in cubes.seeds if seed not in test][:train_seeds]
        datafile = folder / f"fold{fold}-seeds{train_seeds}.h5"
        if not datafile.exists():
            link_cubes(cubes, [*train, *test], datafile)
        for training in range(options.trainings):
            run_dir = folder / f"{name}-fold{fold}-seeds{train_seeds}-training{training}"
            yield Repetition(run_dir, datafile, train_seeds, fold, training)


def link_cubes(cubes: datasets.CubeFile, seeds: Sequence[int], path: Path) -> None:
    """Write a file whose seeds 0, 1, ... are links to `seeds` of another file, without data."""
    new = new_file(path, bytes_needed=0, overwrite=True)  # the tasks of an array may write it at once
    with h5py.File(cubes.path, "r", locking=False) as source, new as file:
        file.attrs.update(source.attrs)
        file.attrs["original_seeds"] = np.array(seeds)
        for (index, seed), gravity in product(enumerate(seeds), datasets.GRAVITIES):
            target = h5py.ExternalLink(str(cubes.path.absolute()), f"/{cubes.cubes[seed, gravity].name}")
            file[f"{gravity}_seed{index:04d}"] = target


def execute(repetitions: Sequence[Repetition], options: argparse.Namespace) -> None:
    """Train and evaluate what is not complete, `--jobs` runs at a time."""
    waiting = [repetition for repetition in repetitions if not repetition.complete]
    running: dict[int, tuple[Repetition, Any]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            for slot in range(options.jobs):
                if slot not in running and waiting:
                    first = waiting.pop(0)
                    running[slot] = first, start(first.command(options), share(slot, options.jobs))
            time.sleep(POLL_SECONDS)
            for slot, (repetition, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode:
                    failed.append(repetition.run_dir.name)
                elif not repetition.complete:
                    waiting.insert(0, repetition)  # trained; now it is evaluated
                else:
                    left = len(waiting) + len(running)
                    print(f"{repetition.run_dir.name}: complete, {left} left", flush=True)
    finally:
        for _, process in running.values():
            stop(process)
    if failed:
        raise UserError(f"{len(failed)} runs failed: {', '.join(failed[:5])}. Read their errors above.")


def share(slot: int, jobs: int) -> dict[str, str]:
    """Environment that gives each of several jobs its own cores or GPU."""
    if jobs == 1:
        return {}
    if (devices := torch.cuda.device_count()) > 1:
        return {"CUDA_VISIBLE_DEVICES": str(slot % devices)}
    return {"OMP_NUM_THREADS": str(max(1, system.available_cores() // jobs))}


def summarize(repetitions: Sequence[Repetition]) -> list[dict[str, Any]]:
    """For each number of training seeds: mean, spreads and ensemble of every metric.

    `trainings` is the standard deviation over trainings within a fold, `folds` that of the folds' means.
    """
    summary = []
    for train_seeds, group in groupby(repetitions, key=lambda repetition: repetition.train_seeds):
        rows, ensembles = [], []
        for _, fold in groupby(group, key=lambda repetition: repetition.fold):
            members = [read_predictions(repetition) for repetition in fold]
            rows.append([evaluate(*member) for member in members])
            ensembles.append(evaluate(*map(mean_logits, zip(*members, strict=True))))
        values = np.array(rows)  # (folds, trainings, metrics)
        folds, trainings, count = values.shape
        unknown = np.full(count, np.nan)
        columns = {
            "mean": values.mean((0, 1)),
            "trainings": np.sqrt(values.var(1, ddof=1).mean(0)) if trainings > 1 else unknown,
            "folds": values.mean(1).std(0, ddof=1) if folds > 1 else unknown,
            "ensemble": np.mean(ensembles, 0),
        }
        spreads = {
            key: {name: column[number] for name, column in columns.items()}
            for number, key in enumerate(METRICS)
        }
        counts = {"train_seeds": train_seeds, "folds": folds, "trainings": trainings}
        summary.append(counts | {"metrics": report.to_json(spreads)})
    return summary


def read_predictions(repetition: Repetition) -> tuple[metrics.Predictions, metrics.Predictions]:
    """Predictions on the test seeds: logits, and their calibrated log odds where there is a calibration."""
    predictions = report.read_predictions(repetition.run_dir)
    network = json.loads((repetition.run_dir / "model" / "config.json").read_bytes())
    calibration = Calibration.from_dict(network["calibration"]) or Calibration()
    log_odds = calibration.log_odds(predictions.logit, predictions.axis)
    return predictions, predictions.with_logits(log_odds.numpy())


def evaluate(predictions: metrics.Predictions, calibrated: metrics.Predictions) -> list[float]:
    """The metrics of METRICS: areas of the logits as in the report, accuracies of the calibrated log odds."""
    wins = predictions.wins, statistics.cube_wins(predictions.cube_logits)
    auc, cube_auc = (statistics.leave_one_out_auc(table)[0] for table in wins)
    return [auc, metrics.accuracy(calibrated), cube_auc, metrics.cube_accuracy(calibrated)]


def table(summary: list[dict[str, Any]], validation_seeds: int) -> str:
    """The summary as a Markdown table, with the meaning of its columns below."""
    threshold = f"calibrated by axis on the {validation_seeds} validation seeds" if validation_seeds else "0"
    rows = []
    for line in summary:
        for key, title in METRICS.items():
            values = (line["metrics"][key][name] for name in ("mean", "trainings", "folds", "ensemble"))
            cells = ["-" if value is None else f"{value:.4f}" for value in values]
            rows.append([str(line["train_seeds"]), title, *cells])
    head = ["train_seeds", "metric", "mean", "spread over trainings", "spread over folds", "ensemble"]
    note = "train_seeds: validation seeds included. Spreads are standard deviations. "
    note += "AUC over pairs of different seeds. "
    note += f"Accuracies at the logit threshold {threshold}."
    return f"{markdown(head, rows)}\n{note}\n"


if __name__ == "__main__":
    sys.exit(main())
