"""What a run writes for people: `metrics.jsonl`, TensorBoard's events and lines on the console."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter


# The scalars that TensorBoard shows as NAME/PHASE.
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
# What the console shows, and what TensorBoard compares runs by.
SHOWN = ("loss", "accuracy", "auc", "cube_accuracy", "pair_accuracy")
METRICS_FILE = "metrics.jsonl"
logger = logging.getLogger(__name__)


def listen(*, main: bool) -> None:
    """Show what the rooms of this program log: notes of the main process, warnings of all."""
    logging.basicConfig(format="%(message)s")
    for room in ("checkpoint", "datasets", "logs", "models", "runtime", "state"):
        logging.getLogger(room).setLevel(logging.INFO if main else logging.WARNING)


class RunLog:
    """The log of one run, written by the main process alone; the others hold one that does nothing."""

    def __init__(self, run: Path, *, main: bool, step: int) -> None:
        """Open the log of `run` at `step`, the step it goes on from: what was logged after it is dropped."""
        self._main = main
        self._bar: tqdm[Any] | None = None
        if not main:
            return
        self._lines = run / METRICS_FILE
        self._logged = self._drop_lines_after(step)
        # Imported here: it takes a second, which the other processes need not spend.
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard reads the files of a run in the order of their names, which hold the second and then the
        # process: of two of one second the later one could come first, and purge what it should not.
        while any(run.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)
        self._events: SummaryWriter = SummaryWriter(str(run), purge_step=step + 1 if step else 0)

    def _drop_lines_after(self, step: int) -> set[tuple[str, int]]:
        """Keep the lines up to `step` and return their phases and steps; what a kill cut short goes too."""
        if not self._lines.exists():
            return set()
        kept, logged = [], set()
        for number, line in enumerate(self._lines.read_text("utf-8", errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                phase, at = str(record["phase"]), int(record["step"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: line %d is damaged and dropped", self._lines, number)
                continue
            if at <= step:
                kept.append(line + "\n")
                logged.add((phase, at))
        temporary = self._lines.with_suffix(".jsonl.part")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._lines)
        return logged

    def say(self, text: str) -> None:
        """One line on the console, from the main process."""
        if self._main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def phase(self, phase: str, numbers: dict[str, Any], *, seconds: float, target_epoch: int) -> None:
        """Record the numbers of a phase (`train` or `test`) that took `seconds`, in every place, once.

        They are on disk when it returns: the next checkpoint counts on them.
        """
        if not self._main or (phase, numbers["step"]) in self._logged:
            return  # logged before a kill that came between a test and its checkpoint
        speed = numbers["slices"] / seconds
        record = {
            "phase": phase,
            **numbers,
            "seconds": round(seconds, 3),
            "slices_per_second": round(speed, 1),
        }
        for name in SCALARS:
            if name in record:
                self._events.add_scalar(f"{name}/{phase}", record[name], record["step"])
        self._events.flush()
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        values = "  ".join(f"{name} {record[name]:.4f}" for name in SHOWN if name in record)
        self.say(f"epoch {record['epoch']:>3}/{target_epoch}  {phase:<5}  {values}  ({speed:.0f} slices/s)")

    def begin_epoch(self, epoch: int, steps: int, done: int) -> None:
        """Show a bar for `epoch`, of which `done` of `steps` steps are done, where there is a terminal."""
        if self._main and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=done, desc=f"epoch {epoch}", unit="step", leave=False)

    def advance(self) -> None:
        """One step on the bar."""
        if self._bar is not None:
            self._bar.update()

    def end_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def hyperparameters(self, config: dict[str, Any]) -> None:
        """The experiment's parameters beside the tags of its final metrics, so that runs can be compared."""
        if not self._main:
            return
        from torch.utils.tensorboard.summary import hparams

        flat = {
            f"{section}.{key}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for section, keys in config.items()
            for key, value in keys.items()
        }
        for summary in hparams(flat, dict.fromkeys((f"{name}/test" for name in SHOWN), 0.0)):
            self._events._get_file_writer().add_summary(summary)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number for TensorBoard alone."""
        if self._main:
            self._events.add_scalar(name, value, step)

    def slices(self, images: Tensor, labels: Tensor) -> None:
        """A few slices (b, N, N), in units of the standard deviation, as pictures between -3 and 3."""
        if self._main:
            for index, (image, label) in enumerate(zip(images.cpu(), labels.cpu(), strict=True)):
                name = f"slices/{index}_{'gr' if label else 'newton'}"
                self._events.add_image(name, ((image + 3) / 6).clamp(0, 1), 0, dataformats="HW")
            self._events.flush()  # a run that goes on does not show them again

    def test_curves(
        self, labels: np.ndarray, logits: np.ndarray, figures: dict[str, Figure], step: int
    ) -> None:
        """The precision-recall curve and the figures of a test."""
        if self._main and ("test", step) not in self._logged:
            self._events.add_pr_curve("precision_recall/test", labels, 1 / (1 + np.exp(-logits)), step)
            for name, figure in figures.items():
                self._events.add_figure(f"{name}/test", figure, step)

    def close(self) -> None:
        """Write what is pending."""
        self.end_progress()
        if self._main:
            self._events.close()
