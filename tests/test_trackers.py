"""Trackers receive each step once, whatever ends the program."""

import itertools
import json
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from test_resume import tensorboard_points

import trainer
from training import logger

Experiment = Callable[..., Path]


class FileTracker(GeneralTracker):
    """Writes every call to RECORDS at once."""

    name = "file_tracker"
    requires_logging_directory = False
    records: Path
    fail_from_step = float("inf")

    def __init__(self, project: str, **arguments: Any) -> None:
        super().__init__()
        self._write("start", project=project, **arguments)
        self.run_id = arguments.get("run_id", f"id of {arguments.get('run_name')}")

    def _write(self, call: str, **values: Any) -> None:
        with self.records.open("a") as file:
            file.write(json.dumps({"call": call, **values}) + "\n")

    @property
    def tracker(self) -> "FileTracker":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write("hyperparameters", values=values)

    def log(self, values: dict[str, Any], step: int | None = None, **arguments: Any) -> None:
        assert step is not None
        if step >= self.fail_from_step:
            raise ConnectionError("no route to host")
        self._write("log", values=values, step=step)

    def finish(self) -> None:
        self._write("finish")


@pytest.fixture(autouse=True)
def file_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FileTracker]]:
    """Makes FileTracker known to Accelerate and the trainer."""
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, FileTracker.name, FileTracker)
    interface = logger.TrackerInterface(
        arguments=lambda name, run_id: {"run_id": run_id} if run_id else {"run_name": name},
        id_of=lambda run: run.run_id,
    )
    monkeypatch.setitem(logger.TRACKERS, FileTracker.name, interface)
    monkeypatch.setitem(sys.modules, FileTracker.name, sys.modules[__name__])  # it counts as installed
    monkeypatch.setattr(FileTracker, "records", tmp_path / "records.jsonl", raising=False)
    return FileTracker


def calls(kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in FileTracker.records.read_text().splitlines()]
    return [call for call in found if call["call"] == kind]


def scalars() -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar, in the order of the calls."""
    found: dict[str, list[tuple[int, float]]] = {}
    for call in calls("log"):
        for name, value in call["values"].items():
            found.setdefault(name, []).append((call["step"], value))
    return found


class Killed(BaseException):
    """Ends a training without the code that follows a regular end or a signal."""


def start(arguments: list[str], kill: tuple[Any, str, int] | None = None) -> int | None:
    """Train until the end (returns the exit status), or to a call of a function (owner, name, n)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        if kill is not None:
            owner, name, last = kill
            original, count = getattr(owner, name), itertools.count()

            def guarded(*args: Any, **kwargs: Any) -> Any:
                if next(count) == last:
                    raise Killed
                return original(*args, **kwargs)

            patch.setattr(owner, name, guarded)
        try:
            return trainer.main(arguments)
        except Killed:
            return None


OPTIONS = {"epochs": 2, "test_every": 1, "log_every_steps": 1, "save_every_steps": 2, "batch_size": 128}
STEPS = 6


def test_a_tracker_gets_what_tensorboard_gets(experiment: Experiment, tmp_path: Path) -> None:
    path = experiment(**OPTIONS, trackers=["file_tracker"])
    assert start([str(path)]) == 0
    points = tensorboard_points(tmp_path / "runs" / "run")
    sent = scalars()
    expected = {tag for tag in points if tag.split("/")[0] not in TENSORBOARD_ONLY}
    assert set(sent) == expected
    assert {tag: [step for step, _ in values] for tag, values in sent.items()} == {
        tag: [step for step, _ in points[tag]] for tag in expected
    }
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    tests = [(line["step"], line["loss"]) for line in lines if line["phase"] == "test"]
    assert sent["loss/test"] == tests
    (hyperparameters,) = calls("hyperparameters")
    assert hyperparameters["values"]["train_params.batch_size"] == 128
    assert [call["step"] for call in calls("log")] == list(range(1, 2 * STEPS + 1))
    assert len(calls("finish")) == 1


TENSORBOARD_ONLY = {
    "custom_scalars__config__",
    "slices",
    "confusion",
    "twins",
    "precision_recall",
    "_hparams_",
}
KILLS = [
    (trainer, "train_step", 1),  # before the first checkpoint
    (trainer, "train_step", 4),
    (logger.RunLogger, "send_to_trackers", 1),  # a checkpoint is on disk, its steps are not sent
    (trainer, "evaluate", 0),
    (trainer, "save", 1),  # evaluated, not saved
    (trainer, "train_step", 3),
    (trainer, "export", 0),
]


def test_kills_send_no_step_twice(experiment: Experiment, tmp_path: Path) -> None:
    assert start([str(experiment(**OPTIONS, trackers=["file_tracker"])), "model_params.name=whole"]) == 0
    expected = without_times(scalars())
    FileTracker.records.unlink()
    path = experiment(**OPTIONS, trackers=["file_tracker"])
    for kill in KILLS:
        assert start([str(path)], kill) is None, kill
    assert start([str(path)]) == 0
    for name, points in without_times(scalars()).items():
        assert points == [point for point in expected[name] if point in points], f"{name}: gaps alone"
        assert points[-1] == expected[name][-1]
    runs = [call.get("run_id") for call in calls("start")]
    assert runs[:2] == [None, None]  # nothing was sent before the first checkpoint
    assert set(runs[2:]) == {"id of run"}


def without_times(values: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {
        name: points
        for name, points in values.items()
        if not name.startswith(("slices_per_second", "data_waiting_share"))
    }


def test_a_damaged_checkpoint_sends_nothing_twice(experiment: Experiment, tmp_path: Path) -> None:
    path = experiment(**OPTIONS, trackers=["file_tracker"])
    assert start([str(path)]) == 0
    before = scalars()
    newest = sorted((tmp_path / "runs/run/checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"")
    assert start([str(path)]) == 0  # repeats the last steps
    assert scalars() == before
    assert start([str(path)]) == 0  # trains two more epochs
    after = scalars()["loss/step"]
    assert [step for step, _ in after] == [step for step in range(1, 4 * STEPS) if step % STEPS]


def test_a_stop_during_the_evaluation_repeats_no_step(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiment(**OPTIONS, trackers=["file_tracker"])
    original = trainer.evaluate

    def stopped(run: Any, *arguments: Any) -> bool:
        run.stop._received(signal.SIGTERM, None)
        return original(run, *arguments)

    monkeypatch.setattr(trainer, "evaluate", stopped)
    assert start([str(path)]) == 0
    assert max(call["step"] for call in calls("log")) < STEPS
    monkeypatch.setattr(trainer, "evaluate", original)
    assert start([str(path)]) == 0
    assert [call["step"] for call in calls("log")] == list(range(1, 2 * STEPS + 1))
    for phase in ("train", "test"):
        assert [step for step, _ in scalars()[f"loss/{phase}"]] == [STEPS, 2 * STEPS]


def test_a_tracker_changes_no_result(experiment: Experiment, tmp_path: Path) -> None:
    path = experiment(epochs=1)
    assert start([str(path)]) == 0
    assert start([str(path), "train_params.trackers=[file_tracker]", "model_params.name=tracked"]) == 0
    plain, tracked = (tmp_path / "runs" / name for name in ("run", "tracked"))
    assert (plain / "model/model.safetensors").read_bytes() == (
        tracked / "model/model.safetensors"
    ).read_bytes()


def test_a_tracker_that_fails_does_not_end_the_training(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FileTracker, "fail_from_step", 3)
    assert start([str(experiment(**OPTIONS, trackers=["file_tracker"]))]) == 0
    assert [call["step"] for call in calls("log")] == [1, 2]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "training.logger"]
    assert warning == "the trackers receive nothing more until the run is resumed: no route to host"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("wandbb", "found 'wandbb', allowed: wandb, mlflow, trackio"), ("absent", "pip install absent")],
)
def test_a_tracker_that_cannot_be_used_is_refused_before_anything_is_written(
    experiment: Experiment,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    expected: str,
) -> None:
    monkeypatch.setitem(logger.TRACKERS, "absent", logger.TRACKERS["wandb"])
    path = experiment(trackers=[name])
    assert start([str(path)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_a_tracker_that_cannot_start_is_reported(
    experiment: Experiment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FileTracker) -> None:
        raise PermissionError("no API key")

    monkeypatch.setattr(FileTracker, "start", fail)
    assert start([str(experiment(trackers=["file_tracker"]))]) == 2
    assert "file_tracker cannot start: PermissionError: no API key" in capsys.readouterr().err


def mlflow_steps(folder: Path) -> list[list[int]]:
    import mlflow

    client = mlflow.MlflowClient()
    (experiment,) = [found for found in client.search_experiments() if found.name == logger.PROJECT]
    return [
        [metric.step for metric in client.get_metric_history(found.info.run_id, "loss/step")]
        for found in client.search_runs([experiment.experiment_id])
    ]


def trackio_steps(folder: Path) -> list[list[int]]:
    with closing(sqlite3.connect(folder / "trackio" / f"{logger.PROJECT}.db")) as database:
        steps: dict[str, list[int]] = {}
        for run, step, values in database.execute("select run_id, step, metrics from metrics order by id"):
            if "loss/step" in json.loads(values):
                steps.setdefault(run, []).append(step)
    return list(steps.values())


@pytest.mark.parametrize(("name", "steps_of"), [("mlflow", mlflow_steps), ("trackio", trackio_steps)])
def test_a_real_tracker_has_one_run_with_each_step_once(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    steps_of: Callable[[Path], list[list[int]]],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(name, reason=f"the extra `trackers` installs {name}")  # it reads these at import
    path = experiment(**OPTIONS, trackers=[name])
    assert start([str(path)], (trainer, "train_step", 4)) is None
    assert start([str(path)]) == 0
    inside = [step for step in range(1, 2 * STEPS) if step != STEPS]
    assert steps_of(tmp_path) == [inside]
