"""Search for the width, dropout and learning rate with the lowest test loss.

    python experiments/sweep.py experiments/temp.yaml --trials 20 [section.key=value ...]

Each trial is an ordinary run of trainer.py, NAME-000, NAME-001, ..., with its own folder under log_dir, logs
and checkpoints. Once three trials are complete, one whose lowest test loss so far is above the median of the
complete ones at the same epoch is stopped early. The study is kept in LOG_DIR/NAME-sweep.db: the same command
goes on where it was left, also after a kill, and a trial that was running goes on from its last checkpoint.
Only one sweep at a time may use one study.

The lowest test loss of a trial counts: judge the winner at that checkpoint, and by other seeds, as those of
the sweep are no longer unseen (evaluation.py --checkpoint best --seeds A:B).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config as experiment  # noqa: E402
import datasets  # noqa: E402

try:
    import optuna
    from optuna.trial import Trial, TrialState
except ModuleNotFoundError as missing:
    print(f"a sweep needs {missing.name}: pip install -e '.[sweep]'", file=sys.stderr)
    sys.exit(2)

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
LOOK_EVERY = 0.5  # seconds between looks at a trial's metrics


class SweepError(ValueError):
    """A sweep that cannot be done as asked."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the file")
    parser.add_argument("--trials", type=int, default=20, help="trials to reach in the study (%(default)s)")
    parser.add_argument("--layer-param", default="4:64", metavar="LOW:HIGH", help="range (%(default)s)")
    parser.add_argument("--dropout", default="0:0.7", metavar="LOW:HIGH", help="range (%(default)s)")
    parser.add_argument("--lr", default="1e-4:1e-2", metavar="LOW:HIGH", help="range (%(default)s)")
    parser.add_argument(
        "--launcher", default=sys.executable, help="what starts trainer.py, e.g. 'accelerate launch'"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        config = experiment.load(options.experiment, options.overrides)
        data = config.data_params
        if data.synthetic is None or Path(data.datafile).exists():
            datasets.CubeFile(data.datafile).require(range(data.train_seeds + data.test_seeds))
        search(config, options)
    except (SweepError, experiment.ConfigError, datasets.DataError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def search(config: experiment.Config, options: argparse.Namespace) -> None:
    """Run trials until the study holds as many as asked for, then say which is best."""
    ranges = {key: bounds(key, getattr(options, key)) for key in ("layer_param", "dropout", "lr")}
    name, folder = config.model_params.name, Path(config.train_params.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name,
        storage=f"sqlite:///{(folder / f'{name}-sweep.db').resolve()}",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
        load_if_exists=True,
    )
    # seeded by the number of trials too: a sweep that goes on must not draw its first trials again
    study.sampler = optuna.samplers.TPESampler(
        seed=(config.train_params.seed + len(study.trials)) % 2**32, n_startup_trials=5
    )
    adopt_orphans(study)
    while unfinished(study, options.trials):
        trial = study.ask()
        run_name = trial.user_attrs.get("run", f"{name}-{trial.number:03}")
        trial.set_user_attr("run", run_name)
        chosen = {
            "layer_param": trial.suggest_int("layer_param", *map(int, ranges["layer_param"]), log=True),
            "dropout": trial.suggest_float("dropout", *ranges["dropout"]),
            "lr": trial.suggest_float("lr", *ranges["lr"], log=True),
        }
        state, loss = run_trial(trial, folder / run_name, chosen, options)
        study.tell(trial, loss if state is TrialState.COMPLETE else None, state)
        print(f"{run_name}  {in_words(chosen)}  {state.name.lower()}  test loss {loss}", flush=True)
    done = study.get_trials(states=[TrialState.COMPLETE])
    if not done:
        raise SweepError(f"{folder}: no trial of {name} came to its end; their output tells why")
    best = min(done, key=lambda trial: trial.value or 0.0)
    print(f"best: {folder / best.user_attrs['run']}  {in_words(best.params)}  test loss {best.value:.4f}")


def bounds(key: str, text: str) -> tuple[float, float]:
    """The two ends of a range LOW:HIGH; SweepError if they are not."""
    try:
        low, high = (float(end) for end in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    least = {"layer_param": 1.0, "dropout": 0.0, "lr": 1e-12}[key]
    if not least <= low <= high < float("inf") or (key == "dropout" and high > 1):
        raise SweepError(f"--{key.replace('_', '-')}: found '{text}', allowed: LOW:HIGH from {least:g} on")
    return low, high


def unfinished(study: optuna.Study, trials: int) -> bool:
    """Whether there is more to run: trials taken up again have the run of the one that was killed."""
    ended = {trial.user_attrs.get("run") for trial in study.trials if trial.state.is_finished()}
    return bool(study.get_trials(states=[TrialState.WAITING])) or len(ended - {None}) < trials


def adopt_orphans(study: optuna.Study) -> None:
    """Queue again, under the same name, the trials that were running when a sweep was killed."""
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        if "run" in trial.user_attrs:
            study.enqueue_trial(trial.params, {"run": trial.user_attrs["run"]})


def run_trial(
    trial: Trial, run: Path, chosen: dict[str, Any], options: argparse.Namespace
) -> tuple[TrialState, float | None]:
    """One run of trainer.py from its start or its last checkpoint; how it ended and its lowest test loss."""
    settings = {"model_params.name": run.name, "train_params.lr": chosen["lr"]}
    settings |= {f"model_params.{key}": chosen[key] for key in ("layer_param", "dropout")}
    overrides = [*options.overrides, *(f"{key}={value}" for key, value in settings.items())]
    command = [*shlex.split(options.launcher), str(ROOT / "trainer.py"), options.experiment, *overrides]
    finished, losses = run / "model" / "config.json", dict[int, float]()
    if not finished.exists():  # else only the study missed its end
        # Noted and raised below: an exception out of a signal could be lost in a callback of the database.
        pressed: list[int] = []
        handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=end_with_parent) as process:
            try:
                while process.poll() is None:
                    if pressed:
                        raise KeyboardInterrupt
                    time.sleep(LOOK_EVERY)
                    for epoch, loss in tests(run):
                        if epoch not in losses:
                            losses[epoch] = loss
                            trial.report(loss, epoch)
                    if losses and trial.should_prune():
                        process.send_signal(signal.SIGTERM)  # the run saves and ends
                        process.wait()
                        return TrialState.PRUNED, min(losses.values())
                if pressed:
                    raise KeyboardInterrupt
            except BaseException:
                process.send_signal(signal.SIGTERM)
                raise
            finally:
                signal.signal(signal.SIGINT, handler)
    losses = dict(tests(run))
    if not finished.exists() or not losses:
        return TrialState.FAIL, None
    return TrialState.COMPLETE, min(losses.values())


def end_with_parent() -> None:
    """Have the kernel stop this process when the sweep is killed: two trainers must not share a run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def tests(run: Path) -> Iterator[tuple[int, float]]:
    """Epoch and loss of every test of a run so far."""
    path = run / "metrics.jsonl"
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and (record := json.loads(line))["phase"] == "test":
                yield record["epoch"], record["loss"]


def in_words(chosen: dict[str, Any]) -> str:
    """Settings in one line."""
    return "  ".join(f"{key} {value:.3g}" for key, value in chosen.items())


if __name__ == "__main__":
    sys.exit(main())
