"""Search for the hyperparameters with the lowest loss on validation seeds.

    python experiments/sweep.py experiments/temp.yaml --trials 20 [section.key=value ...]

Each trial is an ordinary run of trainer.py, NAME-000, NAME-001, ..., with its own folder under log_dir. After
three complete trials, a trial is pruned if its lowest loss so far is above the median of the complete ones at
the same epoch. The study is kept in LOG_DIR/NAME-sweep.journal: the same command resumes it after a kill,
and an interrupted trial resumes from its last checkpoint. Start the command several times, on any hosts that
share log_dir, to work on one study in parallel.

The lowest loss of a trial counts. Without data_params.validation_seeds it is the loss on test seeds. They are
then no longer unseen: evaluate the best trial on other seeds (evaluation.py --checkpoint best --seeds A:B).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import system
from system import UserError

import argparse
import fcntl
import json
import os
import secrets
import signal
import socket
import time
from contextlib import suppress
from datetime import datetime
from typing import Any, TextIO

from processes import ROOT, deferred_interrupt, parse_launcher, start

import datasets
import models
from training import config as experiment

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import Trial, TrialState
except ModuleNotFoundError as missing:
    print(f"a sweep needs {missing.name}: pip install -e '.[sweep]'", file=sys.stderr)
    sys.exit(2)

POLL_SECONDS = 0.5  # between readings of a trial's metrics
RANGES = {"layer_param": "4:64", "dropout": "0:0.7", "lr": "1e-4:1e-2"}
CHOICES = {
    "architecture": tuple(models.REGISTRY),
    "whiten": ("none", "isotropic"),
    "pairs": ("false", "true"),
    "shifts": ("false", "true"),
}
NAMING_SECONDS = 60  # within which a worker records that a trial is its own
SECTION = dict.fromkeys(("whiten", "pairs", "shifts"), "data_params") | {"lr": "train_params"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the file")
    parser.add_argument("--trials", type=int, default=20, help="trials in the study (%(default)s)")
    for key, default in RANGES.items():
        name = f"--{key.replace('_', '-')}"
        parser.add_argument(name, default=default, metavar="LOW:HIGH", help="range (%(default)s)")
    for key, values in CHOICES.items():
        parser.add_argument(f"--{key}", metavar=",".join(values), help="values to search (not searched)")
    parser.add_argument(
        "--launcher", default=sys.executable, help="command that starts trainer.py, e.g. 'accelerate launch'"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        options.launcher = parse_launcher(options.launcher)
        config = experiment.load_config(options.experiment, options.overrides)
        data = config.data_params
        if data.synthetic is None or Path(data.datafile).exists():
            datasets.CubeFile(data.datafile).require(range(data.test_range.stop))
        search(config, options)
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def search(config: experiment.Config, options: argparse.Namespace) -> None:
    """Run trials until the study holds `options.trials`, then print the best one."""
    ranges = {key: parse_range(key, getattr(options, key)) for key in RANGES}
    for key in CHOICES:
        parse_choices(key, getattr(options, key) or CHOICES[key][0])
    name, folder = config.model_params.name, Path(config.train_params.log_dir)
    phase = "validation" if config.data_params.validation_seeds else "test"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal, workers = folder / f"{name}-sweep.journal", folder / f"{name}-sweep-workers"
    with Worker(workers) as worker:
        if worker.alone:
            remove_unfinished_line(journal)
        try:
            study = optuna.create_study(
                study_name=name,
                storage=JournalStorage(JournalFileBackend(str(journal))),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
                load_if_exists=True,
            )
        except json.JSONDecodeError as error:
            raise UserError(f"{journal}: damaged: {error}. Remove the damaged lines.") from None
        check_experiment(study, config, journal)
        worker.requeue_orphans(study)
        while count_trials(study) < options.trials or study.get_trials(states=[TrialState.WAITING]):
            trial = study.ask()
            # Seeded by the trial: workers, and a resumed sweep, must not draw the same settings again.
            study.sampler = optuna.samplers.TPESampler(
                seed=(config.train_params.seed + trial.number) % 2**32, n_startup_trials=5, constant_liar=True
            )
            run_name = trial.user_attrs.get("run", f"{name}-{trial.number:03}")
            trial.set_user_attr("run", run_name)
            trial.set_user_attr("worker", worker.name)
            settings = suggest(trial, ranges, options)
            state, loss = run_trial(trial, folder / run_name, settings, options, phase)
            study.tell(trial, loss if state is TrialState.COMPLETE else None, state)
            print(
                f"{run_name}  {format_settings(settings)}  {state.name.lower()}  {phase} loss {loss}",
                flush=True,
            )
    complete = study.get_trials(states=[TrialState.COMPLETE])
    if not complete:
        raise UserError(f"{folder}: no trial of {name} completed. Read the errors of the trials above.")
    best = min(complete, key=lambda trial: trial.value if trial.value is not None else float("inf"))
    print(
        f"best: {folder / best.user_attrs['run']}  {format_settings(best.params)}  "
        f"{phase} loss {best.value:.4f}"
    )


def suggest(
    trial: Trial, ranges: dict[str, tuple[float, float]], options: argparse.Namespace
) -> dict[str, Any]:
    """The settings of a trial."""
    settings: dict[str, Any] = {
        "layer_param": trial.suggest_int("layer_param", *map(int, ranges["layer_param"]), log=True),
        "dropout": trial.suggest_float("dropout", *ranges["dropout"]),
        "lr": trial.suggest_float("lr", *ranges["lr"], log=True),
    }
    for key in CHOICES:
        if getattr(options, key) is not None:
            settings[key] = trial.suggest_categorical(key, parse_choices(key, getattr(options, key)))
    return settings


def parse_choices(key: str, text: str) -> list[str]:
    """The values A,B,... of a setting. Raises UserError."""
    values = text.split(",")
    if not set(values) <= set(CHOICES[key]) or len(set(values)) < len(values):
        raise UserError(f"--{key}: found '{text}', allowed: some of {','.join(CHOICES[key])}")
    return values


def parse_range(key: str, text: str) -> tuple[float, float]:
    """The ends of a range LOW:HIGH. Raises UserError."""
    try:
        low, high = (float(end) for end in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    least = {"layer_param": 1.0, "dropout": 0.0, "lr": 1e-12}[key]
    if not least <= low <= high < float("inf") or (key == "dropout" and high > 1):
        raise UserError(f"--{key.replace('_', '-')}: found '{text}', allowed: LOW:HIGH from {least:g} on")
    return low, high


def remove_unfinished_line(journal: Path) -> None:
    """Remove the line that a killed worker left unfinished: the next record would be appended to it."""
    if journal.exists():
        content = journal.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)


def check_experiment(study: optuna.Study, config: experiment.Config, journal: Path) -> None:
    """Record the experiment of a new study; raise UserError if a resumed one was started with another.

    Losses of different data, seeds or epochs cannot be compared. The searched keys may differ.
    """
    current = config.to_dict()
    saved = study.user_attrs.get("experiment")
    if saved is None:
        study.set_user_attr("experiment", current)
        return
    for key in (*RANGES, *CHOICES):
        section = SECTION.get(key, "model_params")
        current[section][key] = saved[section][key]
    may_change = experiment.MAY_CHANGE - {"train_params.epochs", "data_params.datafile"}
    experiment.check_same_settings(journal, saved, current, may_change)


def count_trials(study: optuna.Study) -> int:
    """Trials that ended or run; one that was requeued has the run of the interrupted one."""
    started = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return len({trial.user_attrs.get("run", trial.number) for trial in study.get_trials(states=started)})


class Worker:
    """One process that works on a study. It holds a file lock, so that others see whether it is alive."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._folder = folder
        self._lock: TextIO | None = None

    def __enter__(self) -> Worker:
        self._folder.mkdir(exist_ok=True)
        self._lock = (self._folder / self.name).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(self, *error: object) -> None:
        (self._folder / self.name).unlink(missing_ok=True)
        assert self._lock is not None
        self._lock.close()
        with suppress(OSError):  # other workers are still there
            self._folder.rmdir()

    @property
    def alone(self) -> bool:
        """Whether no other worker of the study is alive."""
        others = [path.name for path in self._folder.iterdir() if path.name != self.name]
        return not any(self._alive(name) for name in others)

    def requeue_orphans(self, study: optuna.Study) -> None:
        """Queue again, with the same run, the trials whose worker was killed."""
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            age = datetime.now() - (trial.datetime_start or datetime.now())
            if "worker" not in trial.user_attrs and age.total_seconds() < NAMING_SECONDS:
                continue  # another worker has just asked for it
            if self._alive(trial.user_attrs.get("worker", "")):
                continue
            study.tell(trial.number, state=TrialState.FAIL)
            if "run" in trial.user_attrs:
                study.enqueue_trial(trial.params, {"run": trial.user_attrs["run"]})

    def _alive(self, name: str) -> bool:
        try:
            with (self._folder / name).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        (self._folder / name).unlink(missing_ok=True)
        return False


def run_trial(
    trial: Trial, run_dir: Path, settings: dict[str, Any], options: argparse.Namespace, phase: str
) -> tuple[TrialState, float | None]:
    """Train one trial, from its start or its last checkpoint; returns how it ended and its lowest loss."""
    overrides = {"model_params.name": run_dir.name}
    overrides |= {f"{SECTION.get(key, 'model_params')}.{key}": value for key, value in settings.items()}
    command = [*options.launcher, str(ROOT / "trainer.py"), options.experiment]
    command += [*options.overrides, *(f"{key}={value}" for key, value in overrides.items())]
    finished, reported = run_dir / "model" / "config.json", dict[int, float]()
    if not finished.exists():  # otherwise only the study missed its end
        with deferred_interrupt() as interrupts, start(command) as process:
            try:
                while process.poll() is None:
                    if interrupts:
                        raise KeyboardInterrupt
                    time.sleep(POLL_SECONDS)
                    for epoch, loss in losses(run_dir, phase).items():
                        if epoch not in reported:
                            reported[epoch] = loss
                            trial.report(loss, epoch)
                    if reported and trial.should_prune():
                        process.send_signal(signal.SIGTERM)  # the run saves and stops
                        process.wait()
                        return TrialState.PRUNED, min(reported.values())
                if interrupts:
                    raise KeyboardInterrupt
            except BaseException:
                process.send_signal(signal.SIGTERM)
                raise
    found = losses(run_dir, phase)
    if not finished.exists() or not found:
        return TrialState.FAIL, None
    return TrialState.COMPLETE, min(found.values())


def losses(run_dir: Path, phase: str) -> dict[int, float]:
    """Loss of each evaluation of a run so far, by epoch."""
    records = system.read_json_lines(run_dir / "metrics.jsonl")
    return {record["epoch"]: record["loss"] for record in records if record.get("phase") == phase}


def format_settings(settings: dict[str, Any]) -> str:
    """Settings in one line."""
    return "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in settings.items()
    )


if __name__ == "__main__":
    sys.exit(main())
