"""Search for the hyperparameters with the lowest loss on validation seeds.

    python experiments/sweep.py experiments/temp.yaml --trials 20 [section.key=value ...]
        [--search train_params.lr=1e-4:1e-2:log] [--search data_params.whiten=none,isotropic] ...

Each trial is an ordinary run of trainer.py, NAME-000, NAME-001, ..., with its own folder under log_dir. After
three complete trials, a trial is pruned if its lowest loss so far is above the median of the complete ones at
the same epoch. The study is kept in LOG_DIR/NAME-sweep.journal: the same command resumes it after a kill,
and an interrupted trial resumes from its last checkpoint. Start the command several times, on any hosts that
share log_dir, to work on one study in parallel.

The lowest loss of a trial counts. Without data_params.validation_seeds it is the loss on test seeds. They are
then no longer unseen: evaluate the best trial on other seeds (evaluation.py --checkpoint best --seeds A:B).
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
SEARCH = ["model_params.layer_param=4:64:log", "model_params.dropout=0:0.7", "train_params.lr=1e-4:1e-2:log"]
FORMS = "section.key=LOW:HIGH, section.key=LOW:HIGH:log, section.key=A,B,..."
PARSER = make_parser(__doc__)
PARSER.add_argument("--trials", type=int, default=20, help="trials in the study (%(default)s)")
PARSER.add_argument(
    "--search",
    action="append",
    metavar="section.key=VALUES",
    help=f"values of a key to search, once per key: {FORMS} (default: {' '.join(SEARCH)})",
)
if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    PARSER.parse_args()

import fcntl
import json
import re
import time
from functools import reduce
from typing import Any

import datasets
from analysis.comparison import markdown
from training.config import MAY_CHANGE_IN_SERIES, Config, check_same_settings, load_config
from training.distributed import run_program

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage
    from optuna.trial import Trial, TrialState
except ModuleNotFoundError as missing:
    print(f"error: a sweep needs {missing.name}. Install it: pip install -e '.[sweep]'", file=sys.stderr)
    sys.exit(2)

POLL_SECONDS = 0.5  # between readings of a trial's metrics
LOCK = ".sweep-lock"  # in the folder of a run, held by the worker of its trial


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = PARSER.parse_intermixed_args(arguments)

    def program() -> None:
        config = load_config(options.experiment, options.overrides)
        space = {text.partition("=")[0]: parse_search(text, options) for text in options.search or SEARCH}
        data = config.data_params
        if data.synthetic is None or Path(data.datafile).exists():
            datasets.CubeFile(data.datafile).require(range(data.test_range.stop))
        search(config, space, options)

    return run_program(program)


def parse_search(text: str, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The method of Trial that draws a value of a --search, and its arguments. Raises UserError.

    The experiment with each value says whether the value is allowed, and whether it is an integer.
    """
    key, _, values = text.partition("=")
    is_range = re.fullmatch(r"[^,:\[]+:[^,:\[]+(:log)?", values)
    log = values.endswith(":log")
    texts = values.removesuffix(":log").split(":") if is_range else re.split(r",(?![^\[]*\])", values)

    def read(value: str) -> Any:
        config = load_config(options.experiment, [*options.overrides, f"{key}={value}"])
        return reduce(getattr, key.split("."), config)

    read_values = [read(value) for value in texts]
    if not is_range and len(set(texts)) == len(texts) > 1:
        return "suggest_categorical", {"choices": texts}
    numbers = is_range and all(type(value) in (int, float) for value in read_values)
    if not numbers or not read_values[0] <= read_values[1] or (log and read_values[0] <= 0):
        raise UserError(f"--search: found '{text}', allowed: {FORMS}; LOW <= HIGH, with log LOW > 0")
    method = "suggest_int" if isinstance(read_values[0], int) else "suggest_float"
    return method, {"low": read_values[0], "high": read_values[1], "log": log}


def search(config: Config, space: dict[str, Any], options: argparse.Namespace) -> None:
    """Run trials until the study has `options.trials`, then print the best one."""
    name, folder = config.model_params.name, Path(config.train_params.log_dir)
    phase = "validation" if config.data_params.validation_seeds else "test"
    study = open_study(config, space)
    requeue_orphans(study, folder)
    while count_trials(study) < options.trials or study.get_trials(states=[TrialState.WAITING]):
        trial = study.ask()
        # Seeded by the trial: workers, and a resumed sweep, must not draw the same settings again.
        study.sampler = optuna.samplers.TPESampler(
            seed=(config.train_params.seed + trial.number) % 2**32, n_startup_trials=5, constant_liar=True
        )
        run_name = trial.user_attrs.get("run", f"{name}-{trial.number:03}")
        (folder / run_name).mkdir(exist_ok=True)
        with (folder / run_name / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            trial.set_user_attr("run", run_name)
            settings = {key: getattr(trial, draw)(key, **values) for key, (draw, values) in space.items()}
            state, loss = run_trial(trial, folder / run_name, settings, options, phase)
            study.tell(trial, loss if state is TrialState.COMPLETE else None, state)
        print(f"{run_name}  {describe(settings)}  {state.name.lower()}  {phase} loss {loss}", flush=True)
    complete = study.get_trials(states=[TrialState.COMPLETE])
    if not complete:
        raise UserError(f"{folder}: no trial of {name} completed. Read the errors of the trials above.")
    complete.sort(key=lambda trial: trial.value or 0.0)
    rows = [[t.user_attrs["run"], *map(str, t.params.values()), f"{t.value:.4f}"] for t in complete]
    print("", markdown(["run", *complete[0].params, f"{phase} loss"], rows), sep="\n")
    run_dir = folder / complete[0].user_attrs["run"]
    print(f"best: {run_dir}; next: python evaluation.py {run_dir} --checkpoint best")


def open_study(config: Config, space: dict[str, Any]) -> optuna.Study:
    """The study in its journal, created or resumed.

    Losses of different data, seeds or epochs cannot be compared: raises UserError if the study was started
    with another experiment or another search.
    """
    folder, name = Path(config.train_params.log_dir), config.model_params.name
    journal = folder / f"{name}-sweep.journal"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            study_name=name,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
            load_if_exists=True,
        )
    except ValueError as error:
        raise UserError(f"{journal}: damaged: {error}. Remove the damaged lines.") from None
    if "experiment" not in study.user_attrs:
        study.set_user_attr("experiment", config.to_dict())
        study.set_user_attr("search", json.dumps(space))
    if study.user_attrs.get("search") != json.dumps(space):
        raise UserError(
            f"{journal}: this study was started with another --search. Use the same one, or another "
            "model_params.name."
        )
    saved = study.user_attrs["experiment"]
    check_same_settings(journal, saved, config.to_dict(), MAY_CHANGE_IN_SERIES | space.keys())
    return study


def requeue_orphans(study: optuna.Study, folder: Path) -> None:
    """Queue again, with the same run, the trials whose worker was killed: nobody locks their folders."""
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        if "run" not in trial.user_attrs:
            continue  # another worker has just asked for it
        with (folder / trial.user_attrs["run"] / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if study.trials[trial.number].state is TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params, {"run": trial.user_attrs["run"]})


def count_trials(study: optuna.Study) -> int:
    """Trials that ended or run; one that was requeued has the run of the interrupted one."""
    started = [trial for trial in study.get_trials() if trial.state is not TrialState.WAITING]
    return len({trial.user_attrs["run"] for trial in started if "run" in trial.user_attrs})


def run_trial(
    trial: Trial, run_dir: Path, settings: dict[str, Any], options: argparse.Namespace, phase: str
) -> tuple[TrialState, float | None]:
    """Train one trial, from its start or its last checkpoint; returns how it ended and its lowest loss."""
    command = [*options.launcher, str(ROOT / "trainer.py"), options.experiment, *options.overrides]
    command += [f"{key}={value}" for key, value in settings.items()]
    command += [f"model_params.name={run_dir.name}", "--no-extend"]
    finished, reported, status = run_dir / "model" / "config.json", set[int](), None
    # A run that stopped (max_minutes) resumes. The trainer refuses a run of other settings, complete or not.
    while status is None or (status == 0 and not finished.exists()):
        process = start(command)
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                for epoch, loss in losses(run_dir, phase).items():
                    if epoch not in reported:
                        trial.report(loss, epoch)
                        reported.add(epoch)
                if reported and trial.should_prune():
                    stop(process)
                    return TrialState.PRUNED, min(losses(run_dir, phase).values())
        finally:
            stop(process)
        status = process.returncode
    values = losses(run_dir, phase).values()
    if status != 0 or not values:
        return TrialState.FAIL, None
    return TrialState.COMPLETE, min(values)


def losses(run_dir: Path, phase: str) -> dict[int, float]:
    """Loss of each evaluation of a run so far, by epoch."""
    records = system.read_json_lines(run_dir / "metrics.jsonl")
    return {record["epoch"]: record["loss"] for record in records if record.get("phase") == phase}


def describe(settings: dict[str, Any]) -> str:
    """Settings in one line, as the command line of the trainer takes them."""
    texts = (f"{value:.4g}" if isinstance(value, float) else f"{value}" for value in settings.values())
    return " ".join(f"{key}={text}" for key, text in zip(settings, texts, strict=True))


if __name__ == "__main__":
    sys.exit(main())
