"""Logging of a run: console lines, TensorBoard events, experiment trackers and `metrics.jsonl`."""

from __future__ import annotations

import system
from system import UserError

import importlib.util
import json
import logging
import math
import shutil
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    from training.config import Config
    from training.metrics import Floats, Predictions
    from training.run import TrainState

# Metrics on the console and in TensorBoard's comparison of runs.
HEADLINE_METRICS = ("loss", "accuracy", "auc", "cube_accuracy", "pair_accuracy")
# Scalars that TensorBoard shows as NAME/PHASE.
SCALARS = (*HEADLINE_METRICS, "precision", "recall", "f1", "fpr", "slices_per_second")
# Hyperparameters that TensorBoard lists first.
MAIN_PARAMETERS = {"model_params.architecture", "model_params.layer_param", "model_params.dropout"}
MAIN_PARAMETERS |= {
    "data_params.train_seeds",
    "data_params.whiten",
    "train_params.lr",
    "train_params.batch_size",
}
METRICS_FILE = "metrics.jsonl"
POINTS_PER_EPOCH = 200  # log points within an epoch at most, unless log_every_steps is set
LINE_SECONDS = 30.0  # between console lines within an epoch
LINE_LENGTH = 100  # of console lines, unless a terminal has another width
ESTIMATE_STEPS = (5, 20)  # of a new run, whose time gives an estimate of the training's: the first are slower
PACKAGES = ("system", "training", "datasets", "models")
PROJECT = "gravity-cnn"  # in the trackers
log = logging.getLogger(__name__)


class TrackerInterface(NamedTuple):
    """How a tracker names its runs."""

    arguments: Callable[[str, str | None], dict[str, Any]]
    """Arguments of Accelerate's tracker that start a run of a name, or continue the run of an id."""
    id_of: Callable[[Any], str]
    """The id of a started run."""


TRACKERS = {
    "wandb": TrackerInterface(
        lambda name, run_id: {"id": run_id, "resume": "allow"} if run_id else {"name": name},
        lambda run: run.id,
    ),
    "mlflow": TrackerInterface(
        lambda name, run_id: {"run_id": run_id} if run_id else {"run_name": name},
        lambda run: run.info.run_id,
    ),
    # Trackio continues the newest run of a name, so every run gets a name that no other has.
    "trackio": TrackerInterface(
        lambda name, run_id: {"name": run_id or f"{name}-{uuid.uuid4().hex[:8]}", "resume": "allow"},
        lambda run: run.name,
    ),
}
# Otherwise Weights & Biases keeps a step until it receives the next one.
TRACKER_OPTIONS = {"wandb": {"commit": True}}


def require_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker that is unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"train_params.trackers: found {name!r}, allowed: {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train_params.trackers: {name} is not installed. Install it with `pip install {name}`, or "
                "remove it from the list."
            )


def setup_logging(*, main: bool) -> None:
    """Show log messages of this project: info on the main process, warnings on all."""
    logging.basicConfig(format="%(message)s")
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO if main else logging.WARNING)


class RunLogger:
    """The log of one run. Only the main process writes; on other ranks every method does nothing.

    A tracker cannot take a step back, and a run that is killed resumes from its last checkpoint. Scalars
    therefore wait in memory until a checkpoint that includes their step is on disk: no step is sent twice. A
    kill in between may leave a gap in the tracker, never in TensorBoard or metrics.jsonl.
    """

    def __init__(self, config: Config, accelerator: Accelerator, state: TrainState) -> None:
        """Open the log to resume at `state.step`: records of later steps are dropped."""
        self._params, self._accelerator = config.train_params, accelerator
        self._main = accelerator.is_main_process
        self._bar: tqdm[Any] | None = None
        self._unsent: dict[int, dict[str, float]] = {}
        self._sent_step = -1
        self._estimate_from: float | None = None
        if not self._main:
            return
        self._lines = config.run_dir / METRICS_FILE
        records = [line for line in system.read_json_lines(self._lines) if line["step"] <= state.step]
        if self._lines.exists():
            system.write_json_lines(self._lines, records)
        self._logged = {(record["phase"], record["step"]) for record in records}
        # Imported here: it takes a second, which the other ranks need not spend.
        from torch.utils.tensorboard import SummaryWriter

        order_event_files(config.run_dir)
        purged = state.step + 1 if state.step else 0
        threading.excepthook = ignore_storage_errors
        self._events: SummaryWriter = SummaryWriter(str(config.run_dir), purge_step=purged)
        if self._params.trackers:
            self._start_trackers(config, state)
            # Steps up to the newest checkpoint were sent, even if it is damaged and an older one is resumed.
            folders = (config.run_dir / "checkpoints").glob("step_*")
            newest = max((int(path.name[5:].partition(".")[0]) for path in folders), default=-1)
            self._sent_step = newest if newest > state.step else state.step - 1
            # A program that was stopped before an evaluation has not sent the metrics of its epoch.
            for record in records if state.evaluation_pending else ():
                if record["step"] == state.step:
                    self._unsent.setdefault(state.step, {}).update(scalars_of(record))

    def _start_trackers(self, config: Config, state: TrainState) -> None:
        """Start or continue the runs of the trackers; adds the ids of new ones to `state`."""
        runs, name, names = state.tracker_runs, config.model_params.name, self._params.trackers
        arguments = {tracker: TRACKERS[tracker].arguments(name, runs.get(tracker)) for tracker in names}
        try:
            self._accelerator.init_trackers(PROJECT, init_kwargs=arguments)
            for tracker in self._accelerator.trackers:
                if tracker.name not in runs:
                    tracker.store_init_configuration(flatten(config.to_dict()))
                    runs[tracker.name] = TRACKERS[tracker.name].id_of(tracker.tracker)
        except Exception as error:  # each tracker has its own
            raise UserError(
                f"train_params.trackers: {', '.join(names)} cannot start: {type(error).__name__}: {error}\n"
                "Correct the settings of the tracker, or remove it from the list."
            ) from error

    def print(self, text: str) -> None:
        """Print one line from the main process."""
        if self._main:
            tqdm.write(wrap(text), file=sys.stdout)
            sys.stdout.flush()

    def log_metrics(
        self,
        phase: str,
        state: TrainState,
        values: dict[str, Any],
        *,
        seconds: float,
        waiting: float | None = None,
    ) -> None:
        """Record the metrics of a phase that took `seconds`, of which `waiting` for data, once.

        They are on disk when this returns: the next checkpoint relies on them.
        """
        if not self._main or (phase, state.step) in self._logged:
            return  # logged before a kill between an evaluation and its checkpoint
        speed = values["slices"] / seconds
        record = {
            "phase": phase,
            "epoch": state.epoch,
            "step": state.step,
            **values,
            "seconds": round(seconds, 3),
            "slices_per_second": round(speed, 1),
        }
        self.log_scalars(scalars_of(record), state.step)
        self._events.flush()
        system.append_json_line(self._lines, record)
        shown = [
            f"{name.replace('_accuracy', 's')} {record[name]:.4f}"
            for name in HEADLINE_METRICS
            if name in record
        ]
        if waiting is not None:
            self.log_scalars({"data_waiting_share/train": waiting / seconds}, state.step)
            shown.append(f"{speed:.0f} slices/s, {100 * waiting / seconds:.0f} % waiting")
        self.end_progress()
        self.print(f"epoch {state.epoch:>3}/{state.target_epoch}  {phase:<10}  {'  '.join(shown)}")

    def start_epoch(self, state: TrainState, steps: int) -> None:
        """Prepare for the running epoch of `steps` steps."""
        every = self._params.log_every_steps
        self._every = every or math.ceil(steps / POINTS_PER_EPOCH)
        self._line_seconds = 0.0 if every else LINE_SECONDS
        self._epoch, self._steps = f"epoch {state.epoch + 1:>3}/{state.target_epoch}", steps
        self._started_from = state.step_in_epoch
        self._started_at = self._line_at = time.perf_counter()
        if self._main and sys.stderr.isatty():
            initial = state.step_in_epoch
            self._bar = tqdm(total=steps, initial=initial, desc=self._epoch, unit="step", leave=False)

    def is_log_point(self, step_in_epoch: int) -> bool:
        """Whether the running metrics are read after this step; the same on all ranks."""
        return step_in_epoch % self._every == 0

    def log_step(self, state: TrainState, values: dict[str, float]) -> None:
        """Log the running metrics of a log point, or show the progress if there are no `values`."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.update()
        first, last = ESTIMATE_STEPS
        if state.step == first:
            self._estimate_from = time.perf_counter()
        if self._estimate_from is not None and state.step >= last:
            epoch = (time.perf_counter() - self._estimate_from) / (state.step - first) * self._steps
            training, self._estimate_from = epoch * state.target_epoch, None
            self.print(
                f"estimated time: {format_duration(epoch)} per epoch, {format_duration(training)} for "
                f"{state.target_epoch} epochs, without evaluations"
            )
        if values:
            self.log_scalars({f"{name}/step": value for name, value in values.items()}, state.step)
            self._show(state, f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.4f}  ")
        elif time.perf_counter() - self._line_at >= LINE_SECONDS:
            self._show(state, "")

    def _show(self, state: TrainState, metrics: str) -> None:
        """Show metrics, speed and the time remaining: on the bar, or else on a line."""
        now = time.perf_counter()
        speed = (state.step_in_epoch - self._started_from) / (now - self._started_at)  # steps per second
        steps_left = (state.target_epoch - state.epoch) * self._steps - state.step_in_epoch
        remaining = format_duration(steps_left / speed)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{metrics}{remaining} left")
        elif now - self._line_at >= self._line_seconds:
            self._line_at = now
            self.print(
                f"{self._epoch}  step {state.step_in_epoch}/{self._steps}  {metrics}"
                f"({speed * self._params.batch_size:.0f} slices/s, {remaining} left)"
            )

    def end_progress(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def log_hyperparameters(self, config: dict[str, Any]) -> None:
        """Log the parameters of a new run, metrics by which runs are compared, and the layout of charts."""
        if not self._main:
            return
        from torch.utils.tensorboard.summary import hparams

        metrics = dict.fromkeys((f"{name}/test" for name in HEADLINE_METRICS), 0.0)
        phases = ("train", "validation", "test")
        charts = {
            name: ["Multiline", [f"{name}/{phase}" for phase in phases]] for name in HEADLINE_METRICS[:3]
        }
        self._events.add_custom_scalars({"training": charts})
        values = flatten(config)
        ordered = {key: values[key] for key in sorted(values, key=lambda key: key not in MAIN_PARAMETERS)}
        for summary in hparams(ordered, metrics):
            self._events._get_file_writer().add_summary(summary)

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        """Log scalars to TensorBoard and, once a checkpoint includes `step`, to the trackers."""
        if not self._main:
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._accelerator.trackers and step > self._sent_step:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._unsent.setdefault(step, {}).update(finite)

    def send_to_trackers(self, saved_step: int) -> None:
        """Send what was logged up to `saved_step`, the last checkpoint on disk."""
        for step in [step for step in self._unsent if step <= saved_step]:
            try:
                self._accelerator.log(self._unsent.pop(step), step, log_kwargs=TRACKER_OPTIONS)
            except Exception as error:  # a server that fails must not end a training
                log.warning("the trackers receive nothing more until the run is resumed: %s", error)
                self._accelerator.trackers.clear()

    def log_twins(self, gr: Floats, newton: Floats) -> None:
        """Log one slice (N, N) of a cube, of its twin, and their difference, each from black to white."""
        if self._main:
            for name, image in {"gr": gr, "newton": newton, "difference": gr - newton}.items():
                scaled = (image - image.min()) / max(float(np.ptp(image)), 1e-30)
                self._events.add_image(f"slices/{name}", scaled, 0, dataformats="HW")
            self._events.flush()  # a resumed run does not log them again

    def log_figures(
        self, phase: str, predictions: Predictions, figures: dict[str, Figure], step: int
    ) -> None:
        """Log the figures of an evaluation and its precision-recall curve to TensorBoard."""
        if self._main and (phase, step) not in self._logged:
            self._events.add_pr_curve(
                f"precision_recall/{phase}", predictions.label, predictions.probability, step
            )
            for name, figure in figures.items():
                self._events.add_figure(f"{name}/{phase}", figure, step)

    def close(self) -> None:
        """Write pending events, and end the runs of the trackers; a later start continues them."""
        self.end_progress()
        if self._main:
            self._events.close()
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                log.warning("%s failed at its end: %s", tracker.name, error)


def order_event_files(run_dir: Path) -> None:
    """Let the names of older event files precede that of a new one, whatever the clock did since.

    TensorBoard reads them in the order of their names, which begin with the second in which they were made.
    """
    names, limit = [], int(time.time())
    for path in sorted(run_dir.glob("events.out.tfevents.*"), reverse=True):
        second, _, rest = path.name.removeprefix("events.out.tfevents.").partition(".")
        limit = min(int(second), limit - 1)
        names.append((path, f"events.out.tfevents.{limit:010}.{rest}"))
    for path, name in reversed(names):  # in this order no file replaces another
        path.rename(path.with_name(name))


def ignore_storage_errors(arguments: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's thread if the disk is full: the next call of the log raises it."""
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    """The scalars of a record of metrics.jsonl by their tags."""
    return {f"{name}/{record['phase']}": record[name] for name in SCALARS if name in record}


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an experiment as `section.key`, with numbers, texts and booleans as values."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section, keys in config.items()
        for key, value in keys.items()
    }


def wrap(text: str, indent: int = 4) -> str:
    """A line as lines that fit the terminal, or LINE_LENGTH columns elsewhere; words are never cut."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else LINE_LENGTH
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * indent}
    return textwrap.fill(text, columns, **options)  # type: ignore[arg-type]


def format_duration(seconds: float) -> str:
    """A duration as "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
