"""Logging of a run: console lines, TensorBoard events and `metrics.jsonl`."""

from __future__ import annotations

import system

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from training.config import TrainParams
    from training.metrics import Predictions, RunningMetrics
    from training.trackers import Trackers


# Scalars that TensorBoard shows as NAME/PHASE.
SCALARS = (
    "loss",
    "accuracy",
    "precision",
    "recall",
    "f1",
    "tpr",
    "fpr",
    "auc",
    "cube_accuracy",
    "pair_accuracy",
    "slices_per_second",
)
# Metrics on the console and in TensorBoard's comparison of runs.
HEADLINE_METRICS = ("loss", "accuracy", "auc", "cube_accuracy", "pair_accuracy")
METRICS_FILE = "metrics.jsonl"
POINTS_PER_EPOCH = 200  # log points within an epoch at most, unless log_every_steps is set
LINE_SECONDS = 30.0  # between console lines within an epoch
PACKAGES = ("system", "training", "datasets", "models")
log = logging.getLogger(__name__)


Share = Annotated[float, Field(ge=0, le=1)]


class MetricsRecord(BaseModel):
    """A line of metrics.jsonl; further keys are allowed."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    phase: Literal["train", "validation", "test"]
    epoch: Annotated[int, Field(ge=0, lt=2**63)]
    step: Annotated[int, Field(ge=0, lt=2**63)]
    loss: Annotated[float, Field(ge=0, lt=1e39)]  # logits are float32
    accuracy: Share
    auc: Share


class EvaluationRecord(MetricsRecord):
    """A line of an evaluation."""

    cube_accuracy: Share
    pair_accuracy: Share


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; damaged ones are skipped with a warning."""
    records = []
    for record in system.read_json_lines(path):
        schema = MetricsRecord if record.get("phase") == "train" else EvaluationRecord
        try:
            schema.model_validate(record)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            log.warning("%s: a damaged record is skipped: %s: %s", path, first["loc"][0], first["msg"])
        else:
            records.append(record)
    return records


def setup_logging(*, main: bool) -> None:
    """Show log messages of this project: info on the main process, warnings on all."""
    logging.basicConfig(format="%(message)s")
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO if main else logging.WARNING)


class RunLogger:
    """The log of one run. Only the main process writes; on other ranks every method does nothing."""

    def __init__(self, run_dir: Path, *, main: bool, step: int, trackers: Trackers | None = None) -> None:
        """Open the log to resume at `step`: records of later steps are dropped."""
        self._main, self._trackers = main, trackers
        self._bar: tqdm[Any] | None = None
        if not main:
            return
        self._lines = run_dir / METRICS_FILE
        self._logged = self._drop_records_after(step)
        # Imported here: it takes a second, which the other ranks need not spend.
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard reads event files in the order of their names: the second, then the process id. Of two
        # files of one second the later could come first, and purge steps that it should not.
        while any(run_dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)
        self._events: SummaryWriter = SummaryWriter(str(run_dir), purge_step=step + 1 if step else 0)

    def _drop_records_after(self, step: int) -> set[tuple[str, int]]:
        """Keep the records up to `step`; returns their phases and steps."""
        if not self._lines.exists():
            return set()
        kept = [record for record in read_records(self._lines) if record["step"] <= step]
        system.write_json_lines(self._lines, kept)
        return {(record["phase"], record["step"]) for record in kept}

    def print(self, text: str) -> None:
        """Print one line from the main process."""
        if self._main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def log_metrics(
        self,
        phase: str,
        values: dict[str, Any],
        *,
        seconds: float,
        target_epoch: int,
        waiting: float | None = None,
    ) -> None:
        """Record the metrics of a phase that took `seconds`, of which `waiting` for data, once.

        They are on disk when this returns: the next checkpoint relies on them.
        """
        if not self._main or (phase, values["step"]) in self._logged:
            return  # logged before a kill between an evaluation and its checkpoint
        speed = values["slices"] / seconds
        record = {
            "phase": phase,
            **values,
            "seconds": round(seconds, 3),
            "slices_per_second": round(speed, 1),
        }
        self._log_scalars(
            {f"{name}/{phase}": record[name] for name in SCALARS if name in record}, record["step"]
        )
        self._events.flush()
        system.append_json_line(self._lines, record)
        shown = "  ".join(f"{name} {record[name]:.4f}" for name in HEADLINE_METRICS if name in record)
        share = "" if waiting is None else f", {100 * waiting / seconds:.0f} % of the time waiting for data"
        if waiting is not None:
            self._log_scalars({"data_waiting_share/train": waiting / seconds}, record["step"])
        self.end_progress()
        self.print(
            f"epoch {record['epoch']:>3}/{target_epoch}  {phase:<5}  {shown}  ({speed:.0f} slices/s{share})"
        )

    def start_epoch(
        self, epoch: int, target_epoch: int, *, first_step: int, step: int, steps: int, params: TrainParams
    ) -> None:
        """Prepare for an epoch of `steps` steps that began after `first_step`; training resumes at `step`.

        `epoch` epochs of `target_epoch` are completed.
        """
        self._every = params.log_every_steps or math.ceil(steps / POINTS_PER_EPOCH)
        self._line_seconds = 0.0 if params.log_every_steps else LINE_SECONDS
        self._epoch = f"epoch {epoch + 1:>3}/{target_epoch}"
        self._first_step, self._started_from = first_step, step
        self._steps, self._steps_left = steps, (target_epoch - epoch) * steps
        self._batch_size = params.batch_size
        self._started_at = self._line_at = time.perf_counter()
        if self._main and sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=step - first_step, desc=self._epoch, unit="step", leave=False
            )

    def log_step(self, running: RunningMetrics, step: int, lr: float) -> None:
        """Log running metrics at every log point within an epoch. Does not synchronize with the device."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.update()
        if (step - self._first_step) % self._every == 0:
            values = running.read(step)
            self._log_scalars({"lr/step": lr}, step)
            self.log_running(values)
        elif time.perf_counter() - self._line_at >= LINE_SECONDS:
            self._show(step, "")

    def log_running(self, values: dict[str, float] | None) -> None:
        """Log the running metrics of one log point."""
        if not self._main or values is None:
            return
        step = int(values["step"])
        self._log_scalars({f"{name}/step": values[name] for name in ("loss", "accuracy")}, step)
        self._show(step, f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.4f}  ")

    def _show(self, step: int, metrics: str) -> None:
        """Show the metrics of `step`, the speed and the time remaining: on the bar, or else on a line."""
        now = time.perf_counter()
        speed = (step - self._started_from) / (now - self._started_at)  # steps per second
        if speed <= 0:
            return  # a log point before the resume
        remaining = format_duration((self._steps_left - (step - self._first_step)) / speed)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{metrics}{remaining} left")
        elif now - self._line_at >= self._line_seconds:
            self._line_at = now
            self.print(
                f"{self._epoch}  step {step - self._first_step}/{self._steps}  {metrics}"
                f"({speed * self._batch_size:.0f} slices/s, {remaining} left)"
            )

    def end_progress(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def log_hyperparameters(self, config: dict[str, Any]) -> None:
        """Log the parameters of the experiment with the tags of the metrics by which runs are compared."""
        if not self._main:
            return
        from torch.utils.tensorboard.summary import hparams

        metrics = dict.fromkeys((f"{name}/test" for name in HEADLINE_METRICS), 0.0)
        for summary in hparams(flatten(config), metrics):
            self._events._get_file_writer().add_summary(summary)

    def log_scalar(self, name: str, value: float, step: int) -> None:
        """Log one scalar that is no metric."""
        if self._main:
            self._log_scalars({name: value}, step)

    def _log_scalars(self, values: dict[str, float], step: int) -> None:
        """Log scalars to TensorBoard and the trackers."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._trackers is not None:
            self._trackers.log_scalars(values, step)

    def send_to_trackers(self, saved_step: int) -> None:
        """Send what was logged up to the last checkpoint on disk."""
        if self._trackers is not None:
            self._trackers.send(saved_step)

    def log_images(self, images: Tensor, labels: Tensor) -> None:
        """Log slices (b, N, N), in standard deviations, as images that map -3..3 to black..white."""
        if self._main:
            for index, (image, label) in enumerate(zip(images.cpu(), labels.cpu(), strict=True)):
                name = f"slices/{index}_{'gr' if label else 'newton'}"
                self._events.add_image(name, ((image + 3) / 6).clamp(0, 1), 0, dataformats="HW")
            self._events.flush()  # a resumed run does not log them again

    def log_figures(
        self, phase: str, predictions: Predictions, figures: dict[str, Figure], step: int
    ) -> None:
        """Log the figures of an evaluation, and to TensorBoard also its precision-recall curve."""
        if self._main and (phase, step) not in self._logged:
            self._events.add_pr_curve(
                f"precision_recall/{phase}", predictions.label, predictions.probability, step
            )
            for name, figure in figures.items():
                self._events.add_figure(f"{name}/{phase}", figure, step)
                if self._trackers is not None:
                    self._trackers.log_figure(f"{name}/{phase}", figure, step)

    def close(self) -> None:
        """Write pending events."""
        self.end_progress()
        if self._main:
            self._events.close()
        if self._trackers is not None:
            self._trackers.close()


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an experiment as `section.key`, with numbers, texts and booleans as values."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section, keys in config.items()
        for key, value in keys.items()
    }


def format_duration(seconds: float) -> str:
    """A duration as "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
