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

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import system
from system import UserError

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import h5py
import numpy as np
from processes import ROOT, deferred_interrupt, parse_launcher, start

import datasets
from training import config as experiment
from training import metrics

POLL_SECONDS = 0.5
METRICS: dict[str, str] = {
    "auc": "AUC of slices",
    "accuracy": "accuracy of slices",
    "cube_auc": "AUC of cubes",
    "cube_accuracy": "accuracy of cubes",
}


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
        return self.trained and (self.run_dir / "evaluation" / "predictions.h5").exists()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the file")
    parser.add_argument("--trainings", type=int, default=5, help="trainings per fold (%(default)s)")
    parser.add_argument("--folds", type=int, default=1, help="blocks of test seeds (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="values of train_seeds (the experiment's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        help="command that starts the programs, e.g. 'accelerate launch'",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        options.launcher = parse_launcher(options.launcher)
        repeat(experiment.load_config(options.experiment, options.overrides), options)
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def repeat(config: experiment.Config, options: argparse.Namespace) -> None:
    """Run this task's part of the repetitions, then summarize if all are complete."""
    if min(options.trainings, options.folds, options.jobs) < 1:
        raise UserError("--trainings, --folds and --jobs: allowed: 1 and more")
    cubes = datasets.CubeFile(config.data_params.datafile)
    check_seeds(config, cubes, options)
    folder = Path(config.train_params.log_dir) / f"{config.model_params.name}-repeat"
    folder.mkdir(parents=True, exist_ok=True)
    repetitions = list(plan(config, cubes, folder, options))
    for one in repetitions:
        check_settings(one, options)
    try:
        task, first = (system.read_int(f"SLURM_ARRAY_TASK_{name}", 0) for name in ("ID", "MIN"))
        tasks = system.read_int("SLURM_ARRAY_TASK_COUNT", 1, minimum=1)
    except ValueError as error:
        raise UserError(str(error)) from None
    execute(repetitions[(task - first) % tasks :: tasks], options)
    if remaining := [one.run_dir.name for one in repetitions if not one.complete]:
        print(f"{len(repetitions) - len(remaining)} of {len(repetitions)} runs are complete")
        return
    summary = summarize(repetitions)
    system.write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    text = table(summary, config.data_params.validation_seeds)
    system.write_atomically(folder / "summary.md", text)
    draw(summary, folder)
    print(text, f"written to {folder}", sep="\n")


def check_seeds(config: experiment.Config, cubes: datasets.CubeFile, options: argparse.Namespace) -> None:
    """Raise UserError unless every fold has its seeds."""
    data, found = config.data_params, len(cubes.seeds)
    largest = max(options.seeds or [data.train_seeds])
    smallest = min(options.seeds or [data.train_seeds])
    if options.folds * data.test_seeds > found:
        raise UserError(
            f"--folds: found {options.folds}, allowed: at most {found // data.test_seeds} blocks of "
            f"{data.test_seeds} test seeds among the {found} seeds of {cubes.path}"
        )
    if largest + data.test_seeds > found or smallest <= data.validation_seeds:
        raise UserError(
            f"train_seeds: found {smallest} to {largest}, allowed: more than validation_seeds "
            f"{data.validation_seeds}, at most {found - data.test_seeds}: {found} seeds of {cubes.path} less "
            f"test_seeds {data.test_seeds}"
        )


def plan(
    config: experiment.Config, cubes: datasets.CubeFile, folder: Path, options: argparse.Namespace
) -> Iterator[Repetition]:
    """All repetitions; writes the data file of each fold."""
    data, name = config.data_params, config.model_params.name
    for train_seeds, fold in product(options.seeds or [data.train_seeds], range(options.folds)):
        test = cubes.seeds[fold * data.test_seeds : (fold + 1) * data.test_seeds]
        train = [seed for seed in cubes.seeds if seed not in test][:train_seeds]
        datafile = folder / f"fold{fold}-seeds{train_seeds}.h5"
        if not datafile.exists():
            link_cubes(cubes, [*train, *test], datafile)
        elif read_links(datafile) != (str(cubes.path.absolute()), [*train, *test]):
            raise UserError(
                f"{datafile}: made from another data file or other seeds. Choose another model_params.name, "
                f"or remove {folder}."
            )
        for training in range(options.trainings):
            run = f"{name}-fold{fold}-seeds{train_seeds}-training{training}"
            yield Repetition(folder / run, datafile, train_seeds, fold, training)


def link_cubes(cubes: datasets.CubeFile, seeds: Sequence[int], path: Path) -> None:
    """Write a file whose seeds 0, 1, ... are links to `seeds` of another file; it holds no data."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with h5py.File(cubes.path, "r", locking=False) as source, h5py.File(temporary, "w") as file:
        for key, value in source.attrs.items():
            file.attrs[key] = value
        for index, (seed, gravity) in enumerate(product(seeds, datasets.GRAVITIES)):
            target = h5py.ExternalLink(str(cubes.path.absolute()), f"/{cubes.cubes[seed, gravity].name}")
            file[f"{gravity}_seed{index // 2:04d}"] = target
        file.attrs["original_seeds"] = np.array(seeds)
    temporary.replace(path)


def read_links(path: Path) -> tuple[str, list[int]]:
    """The data file and the seeds that `link_cubes` linked."""
    with h5py.File(path, "r", locking=False) as file:
        link = next((file.get(name, getlink=True) for name in file), None)
        return getattr(link, "filename", ""), [int(seed) for seed in file.attrs.get("original_seeds", ())]


def check_settings(one: Repetition, options: argparse.Namespace) -> None:
    """Raise UserError if a run that exists was trained with other settings."""
    path = one.run_dir / "config.yaml"
    if not path.exists():
        return
    wanted = experiment.load_config(options.experiment, [*options.overrides, *changes(one)]).to_dict()
    saved = experiment.load_config(path, []).to_dict()
    for section, keys in wanted.items():
        keys |= {
            key: saved[section][key] for key, value in keys.items() if value is None
        }  # the launch decided
    may_change = experiment.MAY_CHANGE - {"train_params.epochs"}
    experiment.check_same_settings(one.run_dir, saved, wanted, may_change)


def execute(repetitions: Sequence[Repetition], options: argparse.Namespace) -> None:
    """Train and evaluate what is not complete, `--jobs` runs at a time."""
    waiting = [one for one in repetitions if not one.complete]
    running: dict[int, tuple[Repetition, Any]] = {}
    failed: list[str] = []
    with deferred_interrupt() as interrupts:
        try:
            while waiting or running:
                for slot in range(options.jobs):
                    if slot not in running and waiting:
                        one = waiting.pop(0)
                        running[slot] = one, start(command(one, options), share(slot, options.jobs))
                time.sleep(POLL_SECONDS)
                if interrupts:
                    raise KeyboardInterrupt
                for slot, (one, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    if process.returncode:
                        failed.append(one.run_dir.name)
                    elif not one.complete:
                        waiting.insert(0, one)  # trained; now it is evaluated
                    else:
                        print(f"{one.run_dir.name}: complete, {len(waiting) + len(running)} left", flush=True)
        finally:
            for _, process in running.values():
                process.terminate()  # the run saves and stops
                process.wait()
    if failed:
        raise UserError(f"{len(failed)} runs failed: {', '.join(failed[:5])}. Read their errors above.")


def command(one: Repetition, options: argparse.Namespace) -> list[str]:
    """The command that trains or, if the run is trained, evaluates a repetition."""
    if one.trained:
        return [*options.launcher, str(ROOT / "evaluation.py"), str(one.run_dir), "--quick"]
    return [
        *options.launcher,
        str(ROOT / "trainer.py"),
        options.experiment,
        *options.overrides,
        *changes(one),
    ]


def changes(one: Repetition) -> list[str]:
    """The overrides that make the experiment this repetition."""
    settings = {
        "model_params.name": one.run_dir.name,
        "data_params.datafile": one.datafile,
        "data_params.train_seeds": one.train_seeds,
        "data_params.synthetic": "null",
        "train_params.log_dir": one.run_dir.parent,
        "train_params.seed": one.training,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def share(slot: int, jobs: int) -> dict[str, str]:
    """Environment that gives each of several jobs its own cores or GPU."""
    import torch

    if jobs == 1:
        return {}
    if (devices := torch.cuda.device_count()) > 1:
        return {"CUDA_VISIBLE_DEVICES": str(slot % devices)}
    return {"OMP_NUM_THREADS": str(max(1, system.available_cores() // jobs))}


def summarize(repetitions: Sequence[Repetition]) -> list[dict[str, Any]]:
    """For each number of training seeds: mean, spreads and ensemble of every metric."""
    summary = []
    ordered = sorted(repetitions, key=lambda one: (one.train_seeds, one.fold, one.training))
    for train_seeds, group in groupby(ordered, key=lambda one: one.train_seeds):
        values, ensembles = [], []
        for _, fold in groupby(group, key=lambda one: one.fold):
            predictions, thresholds = zip(*map(read_predictions, fold), strict=True)
            values.append([evaluate(*pair) for pair in zip(predictions, thresholds, strict=True)])
            mean = predictions[0].with_logits(np.mean([one.logit for one in predictions], axis=0))
            ensembles.append(evaluate(mean, float(np.mean(thresholds))))
        summary.append(
            {
                "train_seeds": train_seeds,
                "folds": len(values),
                "trainings": len(values[0]),
                "metrics": {
                    key: spread(
                        np.array([[one[key] for one in fold] for fold in values]),
                        np.array([one[key] for one in ensembles]),
                    )
                    for key in METRICS
                },
            }
        )
    return summary


def spread(values: np.ndarray, ensembles: np.ndarray) -> dict[str, float | None]:
    """Statistics of `values` (folds, trainings) and `ensembles` (folds,).

    `trainings` is the standard deviation over trainings within a fold, `folds` that of the folds' means.
    """
    folds, trainings = values.shape
    return {
        "mean": float(values.mean()),
        "trainings": float(np.sqrt(values.var(axis=1, ddof=1).mean())) if trainings > 1 else None,
        "folds": float(values.mean(axis=1).std(ddof=1)) if folds > 1 else None,
        "ensemble": float(ensembles.mean()),
    }


def read_predictions(one: Repetition) -> tuple[metrics.Predictions, float]:
    """Predictions on the test seeds, and the calibrated threshold (0 without validation seeds)."""
    path = one.run_dir / "evaluation" / "predictions.h5"
    try:
        with h5py.File(path, "r") as file:
            columns = [file[key][:] for key in ("seed", "label", "axis", "position", "logit")]
    except (OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error}. Remove {path.parent}, then run the same command again.") from None
    path = one.run_dir / "model" / "config.json"
    try:
        calibration = json.loads(path.read_text(encoding="utf-8")).get("calibration") or {}
        threshold = float(calibration.get("threshold", 0.0))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {error}. Remove {one.run_dir} to train it again.") from None
    return metrics.Predictions(np.arange(len(columns[0])), *columns), threshold


def evaluate(predictions: metrics.Predictions, threshold: float) -> dict[str, float]:
    """The metrics of METRICS, accuracies at `threshold`."""
    shifted = predictions.with_logits(predictions.logit - threshold)
    cubes = predictions.cube_logits.ravel()
    labels = np.tile([0, 1], len(predictions.seeds))
    zeros = np.zeros_like(labels)
    return {
        "auc": metrics.auc(predictions),
        "accuracy": metrics.accuracy(shifted),
        "cube_auc": metrics.auc(metrics.Predictions(zeros, zeros, labels, zeros, zeros, cubes)),
        "cube_accuracy": metrics.cube_accuracy(shifted),
    }


def table(summary: list[dict[str, Any]], validation_seeds: int) -> str:
    """The summary as a Markdown table, with its conventions below."""
    threshold = f"calibrated on {validation_seeds} of the train_seeds" if validation_seeds else "0"
    lines = [
        "| train_seeds | metric | mean | spread over trainings | spread over folds | ensemble |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in summary:
        for key, title in METRICS.items():
            values = (row["metrics"][key][name] for name in ("mean", "trainings", "folds", "ensemble"))
            cells = " | ".join("-" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"| {row['train_seeds']} | {title} | {cells} |")
    note = f"Accuracies at the logit threshold {threshold}. Spreads are standard deviations."
    return "\n".join([*lines, "", note]) + "\n"


def draw(summary: list[dict[str, Any]], folder: Path) -> None:
    """The learning curve: every metric by number of training seeds, with the spread over folds."""
    from analysis import style  # imports matplotlib, which the runs need not wait for
    from analysis.learning_curve import learning_curve

    style.save(learning_curve(summary, METRICS), folder / "learning_curve")


if __name__ == "__main__":
    sys.exit(main())
