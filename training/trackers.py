"""Experiment trackers through Accelerate: Weights & Biases, MLflow and Trackio receive each step once."""

from __future__ import annotations

import system
from system import UserError

import importlib.util
import logging
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from matplotlib.figure import Figure

PROJECT = "gravity-cnn"
UNSENT_FILE = "trackers.jsonl"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackerInterface:
    """What differs between trackers: how they name their runs, and how they write a step."""

    new: Callable[[str], dict[str, Any]]
    """Arguments of Accelerate's tracker that start a run of this name."""
    resumed: Callable[[str], dict[str, Any]]
    """Arguments that continue the run of this id."""
    id_of: Callable[[Any], str]
    """The id of a started run."""
    log_arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the last call of `log` for a step."""


TRACKERS = {
    "wandb": TrackerInterface(
        new=lambda name: {"name": name},
        resumed=lambda run_id: {"id": run_id, "resume": "allow"},
        id_of=lambda run: run.id,
        log_arguments={"commit": True},  # or the step would wait for the next one
    ),
    "mlflow": TrackerInterface(
        new=lambda name: {"run_name": name},
        resumed=lambda run_id: {"run_id": run_id},
        id_of=lambda run: run.info.run_id,
    ),
    # Trackio resumes the newest run of a name, so every run gets a name of its own.
    "trackio": TrackerInterface(
        new=lambda name: {"name": f"{name}-{uuid.uuid4().hex[:8]}"},
        resumed=lambda run_id: {"name": run_id, "resume": "allow"},
        id_of=lambda run: run.name,
    ),
}


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


class Trackers:
    """The trackers of a run, on the main process.

    A tracker cannot take a step back, and a run that is killed resumes from its last checkpoint. Records are
    therefore kept in RUN/trackers.jsonl until a checkpoint that includes their step is on disk. The file
    changes before they are sent: a kill in between loses them, but never sends them twice. Its first line
    names the last step that was sent, in case that checkpoint is damaged and an older one is resumed.

    Weights & Biases and Trackio write in the background. What they have not written yet is lost if the
    program gets SIGKILL; it is written if the run ends by itself or by a signal that it handles.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        *,
        runs: dict[str, str],
        step: int,
        hyperparameters: dict[str, Any],
    ) -> None:
        """Start or continue the trackers of `accelerator.log_with` at `step`.

        `runs` holds the ids of their runs; those of new runs are added. Raises UserError.
        """
        self._file = run_dir / UNSENT_FILE
        self._sent: dict[str, Any] = {"sent_step": -1, "names": []}
        self._unsent: list[dict[str, Any]] = []
        for record in system.read_json_lines(self._file) if runs else []:
            match record:
                case {"sent_step": int(), "names": list()}:
                    self._sent = record
                case {"step": int(), "values": dict()} if record["step"] <= step:
                    self._unsent.append(record)
        system.write_json_lines(self._file, [self._sent, *self._unsent])
        self._figures: list[tuple[int, str, Figure]] = []
        names = [str(tracker) for tracker in accelerator.log_with]
        arguments = {
            name: TRACKERS[name].resumed(runs[name]) if name in runs else TRACKERS[name].new(run_dir.name)
            for name in names
        }
        try:
            accelerator.init_trackers(PROJECT, init_kwargs=arguments)
            self._trackers: list[GeneralTracker] = list(accelerator.trackers)
            for tracker in self._trackers:
                if tracker.name not in runs:
                    tracker.store_init_configuration(hyperparameters)
                    runs[tracker.name] = TRACKERS[tracker.name].id_of(tracker.tracker)
        except Exception as error:  # each tracker has its own
            raise UserError(
                f"train_params.trackers: {', '.join(names)} cannot start: {type(error).__name__}: {error}\n"
                "Correct the settings of the tracker, or remove it from the list."
            ) from error

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        """Keep scalars until `step` is saved. Values that are not finite are left out."""
        new = {
            name: float(value)
            for name, value in values.items()
            if math.isfinite(value) and not self._was_sent(name, step)
        }
        if new:
            self._unsent.append({"step": step, "values": new})
            system.append_json_line(self._file, self._unsent[-1])

    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        """Keep a figure until `step` is saved."""
        if not self._was_sent(name, step):
            self._figures.append((step, name, figure))

    def _was_sent(self, name: str, step: int) -> bool:
        last = self._sent["sent_step"]
        return step < last or (step == last and name in self._sent["names"])

    def send(self, saved_step: int) -> None:
        """Send everything up to `saved_step`, the step of the last checkpoint on disk."""
        due = [record for record in self._unsent if record["step"] <= saved_step]
        figures = [entry for entry in self._figures if entry[0] <= saved_step]
        if not due and not figures:
            return
        self._unsent = [record for record in self._unsent if record["step"] > saved_step]
        self._figures = [entry for entry in self._figures if entry[0] > saved_step]
        scalars: dict[int, dict[str, float]] = {}
        for record in due:  # running metrics arrive some steps late
            scalars.setdefault(record["step"], {}).update(record["values"])
        last = max([*scalars, *(step for step, _, _ in figures)])
        names = [*scalars.get(last, {}), *(name for step, name, _ in figures if step == last)]
        if last == self._sent["sent_step"]:
            names += self._sent["names"]
        self._sent = {"sent_step": last, "names": names}
        system.write_json_lines(self._file, [self._sent, *self._unsent])
        for tracker in list(self._trackers):
            try:
                for step in sorted({*scalars, *(step for step, _, _ in figures)}):
                    for figure_step, name, figure in figures:
                        if figure_step == step:
                            _send_figure(tracker, name, figure, step)
                    arguments = TRACKERS[tracker.name].log_arguments
                    tracker.log(scalars.get(step, {}), step=step, **arguments)
            except Exception as error:  # a server that fails must not end a training
                self._trackers.remove(tracker)
                log.warning(
                    "%s failed and receives nothing more until the run is resumed: %s", tracker.name, error
                )

    def close(self) -> None:
        """End the runs of the trackers; a later start continues them."""
        for tracker in self._trackers:
            try:
                tracker.finish()
            except Exception as error:
                log.warning("%s failed at its end: %s", tracker.name, error)


def _send_figure(tracker: GeneralTracker, name: str, figure: Figure, step: int) -> None:
    """Send a figure as an image, or as a file where the tracker has files."""
    if hasattr(tracker, "log_figure"):
        tracker.log_figure(figure, f"{name}/step_{step:08d}.png")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from numpy import asarray

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = asarray(canvas.buffer_rgba())[..., :3]
    if hasattr(tracker, "log_images"):
        tracker.log_images({name: [image]}, step=step)
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(image)}, step=step)
