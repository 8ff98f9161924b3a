"""A run that is killed, stopped and resumed ends bit for bit as an uninterrupted one."""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import ForkServer
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from test_checkpoint import rewrite_state, to_format_1

from training.checkpoint import Checkpoint, list_checkpoints

TIMING = {"seconds", "slices_per_second", "waiting_seconds", "data_waiting_share"}
STEPS, EPOCHS = 5, 3
KILLED, STOPPED, FAILED = -signal.SIGKILL, 0, 2


class Trainer:
    """Starts trainer.py in new processes, on one experiment that uses everything random."""

    def __init__(self, server: ForkServer, folder: Path, universe: Path) -> None:
        self.server, self.folder = server, folder
        self.experiment = folder / "experiment.yaml"
        self.experiment.write_text(
            yaml.safe_dump(
                {
                    "model_params": {
                        "architecture": "RACOON",
                        "layer_param": 1,
                        "dropout": 0.5,
                        "name": "run",
                    },
                    "data_params": {
                        "datafile": str(universe),
                        "train_seeds": 2,
                        "test_seeds": 1,
                        "newton_augmentation": 1.0,
                        "axes": [0],
                        "symmetries": True,
                    },
                    "train_params": {
                        "epochs": EPOCHS,
                        "lr": 0.001,
                        "log_dir": "given at each start",
                        "batch_size": 60,  # the last batch of an epoch is shorter
                        "gradient_accumulation_steps": 2,
                        "schedule": "cosine",
                        "warmup_epochs": 1,
                        "test_every": 2,
                        "save_every_steps": 2,
                        "keep_checkpoints": 2,
                    },
                }
            )
        )

    def start(self, name: str, *overrides: str, **request: Any) -> list[int]:
        """Start the run in folder `name` once; returns its exit codes. `request`: see ForkServer.train."""
        arguments = [str(self.experiment), f"train_params.log_dir={self.folder / name}", *overrides]
        return self.server.train(arguments, self.folder / f"{name}.out", **request)

    def finish(self, name: str, *overrides: str, **request: Any) -> dict[str, Any]:
        """Start the run and let it end; returns what it leaves."""
        assert set(self.start(name, *overrides, **request)) == {0}, self.output(name)
        return ending(self.run_dir(name))

    def copy(self, source: str, name: str) -> str:
        """A copy of a run, to be resumed in another folder."""
        shutil.copytree(self.folder / source, self.folder / name)
        return name

    def run_dir(self, name: str) -> Path:
        return self.folder / name / "run"

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()


@pytest.fixture(scope="module")
def trainer(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory, universe: Path) -> Trainer:
    return Trainer(fork_server, tmp_path_factory.mktemp("resume"), universe)


def complete(run_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints, oldest first; nothing is cleaned up."""
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    return [checkpoint for checkpoint in checkpoints if checkpoint.find_problem() is None]


def tensorboard_points(run_dir: Path) -> dict[str, list[tuple[int, bytes]]]:
    """(step, value) of each point of each tag that TensorBoard shows; without the values of timings."""
    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [
            (event.step, b"" if tag.split("/")[0] in TIMING else event.tensor_proto.SerializeToString())
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }


def without_timing(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMING}


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def ending(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves, apart from timings."""
    ended = {
        "metrics": [without_timing(record) for record in records(run_dir)],
        "tensorboard": tensorboard_points(run_dir),
        "network": (run_dir / "model" / "model.safetensors").read_bytes(),
        "suffixes": {path.suffix for path in run_dir.rglob("*") if path.is_file()},
    }
    # The last one, and the one before from within an epoch, with the sample ids of its first steps.
    for checkpoint in complete(run_dir)[-2:]:
        name = checkpoint.folder.name
        ended[f"{name}/train_state"] = without_timing(checkpoint.train_state)
        for part in ("model", "optimizer", "random", "extra"):
            ended[f"{name}/{part}"] = checkpoint.read(f"{part}.safetensors")
    return ended


def assert_equal(ended: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ended.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, bytes):  # pytest would take minutes to show how they differ
            same = ended[key] == value
            assert same, f"{key} differs"
        else:
            assert ended[key] == value, f"{key} differs"


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> dict[str, Any]:
    """What an uninterrupted run leaves."""
    return trainer.finish("whole")


@pytest.fixture(scope="module")
def whole_of_two(trainer: Trainer) -> dict[str, Any]:
    return trainer.finish("whole-of-two", world_size=2)


@pytest.fixture(scope="module")
def interrupted(trainer: Trainer) -> str:
    """The name of a run that was killed in its second epoch; to be copied."""
    assert trainer.start("interrupted", send=["SIGKILL", "trainer.train_step", 7]) == [KILLED]
    return "interrupted"


@pytest.fixture(scope="module")
def interrupted_of_two(trainer: Trainer) -> str:
    """The name of a run of two ranks that was killed; to be copied."""
    request = {"world_size": 2, "rank": 0, "send": ["SIGKILL", "trainer.train_step", STEPS]}
    assert trainer.start("interrupted-of-two", **request) == [KILLED, FAILED]
    return "interrupted-of-two"


def test_a_run_leaves_no_file_that_could_be_unpickled(whole: dict[str, Any]) -> None:
    # The lock has no suffix and no content.
    known = {"", ".safetensors", ".json", ".jsonl", ".yaml", ".md", ".png", ".pdf", ".0"}
    assert whole["suffixes"] <= known


def test_each_tag_has_each_step_once(whole: dict[str, Any]) -> None:
    for tag, points in whole["tensorboard"].items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag


def test_kills_at_random_steps_change_nothing(trainer: Trainer, whole: dict[str, Any]) -> None:
    generator, kills = random.Random(20), 0
    while (
        codes := trainer.start("killed", send=["SIGKILL", "trainer.train_step", generator.randrange(9)])
    ) != [0]:
        assert codes == [KILLED], trainer.output("killed")
        kills += 1
        assert kills < 50, trainer.output("killed")
    assert kills > 2
    assert_equal(ending(trainer.run_dir("killed")), whole)


# In the order in which one run gets to them: it resumes after each kill.
PLACES = [
    ("trainer.setup_run", 0),  # before anything exists
    ("training.config.Config.save", 0),
    ("training.checkpoint.storage.write_checkpoint", 0),  # of step 2, before it is written
    ("training.checkpoint.storage.rotate", 0),  # of step 2, after it is written
    ("trainer.train_step", 0),  # at once after a resume
    ("training.run.TrainState.end_epoch", 0),
    ("training.logger.RunLogger.log_metrics", 0),
    ("trainer.save", 1),  # of epoch 1, after its metrics were logged
    ("trainer.evaluate", 0),
    (
        "training.run.TrainState.end_evaluation",
        0,
    ),  # after the evaluation was logged, before a checkpoint knows of it
    ("training.checkpoint.storage.rotate", 2),
    ("trainer.export", 0),
    ("training.checkpoint.storage.write_checkpoint", 0),  # of the last step, after the network was exported
]


def test_kills_at_every_kind_of_place_change_nothing(trainer: Trainer, whole: dict[str, Any]) -> None:
    for place, call in PLACES:
        codes = trainer.start("placed", send=["SIGKILL", place, call])
        assert codes == [KILLED], f"{place} {call}: {trainer.output('placed')}"
        if place == "training.run.TrainState.end_evaluation":
            assert [record["phase"] for record in records(trainer.run_dir("placed"))] == [
                "train",
                "train",
                "test",
            ]
            assert complete(trainer.run_dir("placed"))[-1].step < 2 * STEPS
    # As writers leave them that are killed; `whole` has no file with that suffix.
    for name in ("config.yaml", "metrics.jsonl", "model/model.safetensors", "model/config.json"):
        (trainer.run_dir("placed") / f"{name}.part").touch()
    assert_equal(trainer.finish("placed"), whole)


def test_signals_end_the_run_with_a_checkpoint_and_change_nothing(
    trainer: Trainer, whole: dict[str, Any]
) -> None:
    for name, function, call, step in (
        ("SIGTERM", "trainer.train_step", 3, 4),
        ("SIGINT", "trainer.train_step", 1, 6),
        ("SIGUSR1", "trainer.train_step", 3, 2 * STEPS),  # in the last step of an epoch
        ("SIGTERM", "trainer.evaluate", 0, 2 * STEPS),
        ("SIGTERM", "training.checkpoint.storage.write_checkpoint", 0, None),
    ):
        assert trainer.start("signals", send=[name, function, call]) == [STOPPED], trainer.output("signals")
        stopped = complete(trainer.run_dir("signals"))[-1].step
        assert f"stopped at step {stopped} ({name}); the same command resumes" in trainer.output("signals")
        assert step in (None, stopped), (name, function)
        assert not (trainer.run_dir("signals") / "model").exists()
    assert_equal(trainer.finish("signals"), whole)


def test_two_ranks_survive_a_signal_and_kills_of_one_of_them(
    trainer: Trainer, whole_of_two: dict[str, Any], interrupted_of_two: str
) -> None:
    name = trainer.copy(interrupted_of_two, "two")
    one_signal = {"world_size": 2, "rank": 1, "send": ["SIGTERM", "trainer.train_step", 1]}
    assert trainer.start(name, **one_signal) == [STOPPED, STOPPED], trainer.output(name)
    assert complete(trainer.run_dir(name))[-1].train_state["step_in_epoch"]
    one_kill = {"world_size": 2, "rank": 1, "send": ["SIGKILL", "trainer.train_step", 4]}
    assert trainer.start(name, **one_kill) == [FAILED, KILLED], trainer.output(name)
    assert "error: " in trainer.output(name)
    assert "Traceback" not in trainer.output(name)
    in_evaluation = {
        "world_size": 2,
        "rank": 0,
        "send": ["SIGKILL", "training.metrics.PredictionBuffer.add", 6],
    }
    assert trainer.start(name, **in_evaluation)[0] == KILLED, trainer.output(name)
    assert_equal(trainer.finish(name, world_size=2), whole_of_two)


def test_the_last_bits_of_sums_over_three_ranks_are_kept(trainer: Trainer) -> None:
    """DDP changes the order of its sums after its first step, and each rank has buffers of its own."""
    override = "train_params.sync_batch_norm=false"
    expected = trainer.finish("whole-of-three", override, world_size=3)
    kill = {"world_size": 3, "send": ["SIGKILL", "trainer.train_step", 7]}
    assert set(trainer.start("three", override, **kill)) == {KILLED}, trainer.output("three")
    stop = {"world_size": 3, "send": ["SIGTERM", "trainer.evaluate", 0]}
    assert set(trainer.start("three", override, **stop)) == {STOPPED}, trainer.output("three")
    assert_equal(trainer.finish("three", override, world_size=3), expected)


def test_max_minutes_stops_a_run_and_changes_nothing(trainer: Trainer, whole: dict[str, Any]) -> None:
    assert trainer.start("timed", "train_params.max_minutes=1e-6") == [STOPPED]
    assert "stopped at step 1 (max_minutes); the same command resumes" in trainer.output("timed")
    assert_equal(trainer.finish("timed"), whole)


def test_starts_that_are_shorter_than_an_evaluation_end_with_an_error(
    trainer: Trainer, whole: dict[str, Any]
) -> None:
    in_evaluation = ["SIGTERM", "trainer.evaluate_phase", 0]
    assert trainer.start("short", send=in_evaluation) == [STOPPED]
    for _ in range(2):  # the second start gets no further than the first, the third says so
        codes = trainer.start("short", "train_params.max_minutes=1e-6")
    assert codes == [FAILED], trainer.output("short")
    last = trainer.output("short").splitlines()[-2:]
    assert last[0].startswith(
        f"error: stopped at step {2 * STEPS}, within the same evaluation as the 2 starts"
    )
    assert "Raise train_params.max_minutes" in last[1]
    assert_equal(trainer.finish("short", "train_params.max_minutes=60"), whole)


def test_a_copied_and_a_renamed_run_resume_under_their_new_names(
    trainer: Trainer, whole: dict[str, Any], interrupted: str
) -> None:
    folder = trainer.folder / trainer.copy(interrupted, "named")

    def with_tracker(state: dict[str, Any]) -> None:
        state["train_state"]["tracker_runs"] = {"wandb": "id"}
        state["config"]["train_params"]["log_dir"] = str(folder)

    for saved in complete(folder / "run"):
        rewrite_state(saved.folder, with_tracker)
    shutil.copytree(folder / "run", folder / "copied")
    for name, tracker_runs in (("copied", {}), ("renamed", {"wandb": "id"})):
        if name == "renamed":
            (folder / "run").rename(folder / "renamed")
        assert trainer.start("named", f"model_params.name={name}") == [0], trainer.output("named")
        ended, expected = ending(folder / name), copy.deepcopy(whole)
        for key in expected:
            if key.endswith("train_state"):  # a copy leaves the trackers to the original
                expected[key]["tracker_runs"] = tracker_runs
        assert_equal(ended, expected)
    assert trainer.output("named").count("resumed from") == 2


def test_an_interrupted_run_keeps_its_epochs_at_the_end_of_one(
    trainer: Trainer, whole: dict[str, Any]
) -> None:
    """The last checkpoint is that of epoch 1: other epochs apply after those of the interrupted training."""
    after_the_third_save = ["SIGKILL", "training.checkpoint.storage.rotate", 2]
    assert trainer.start("between", send=after_the_third_save) == [KILLED]
    assert complete(trainer.run_dir("between"))[-1].train_state["step_in_epoch"] == 0
    assert_equal(trainer.finish("between", "train_params.epochs=7"), whole)
    assert f"train_params.epochs 7 applies after epoch {EPOCHS}" in trainer.output("between")


def test_a_finished_run_that_is_extended_may_be_killed(trainer: Trainer, whole: dict[str, Any]) -> None:
    expected = trainer.finish(trainer.copy("whole", "extended"), "train_params.epochs=1")
    name = trainer.copy("whole", "extended-killed")
    kill = ["SIGKILL", "trainer.train_step", 3]
    assert trainer.start(name, "train_params.epochs=1", send=kill) == [KILLED]
    ended = trainer.finish(name, "train_params.epochs=1")
    assert [record["epoch"] for record in ended["metrics"] if record["phase"] == "train"] == [1, 2, 3, 4]
    assert_equal(ended, expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_ends_the_run_and_changes_nothing(
    trainer: Trainer, request: pytest.FixtureRequest, world_size: int
) -> None:
    source, expected = ("interrupted", "whole") if world_size == 1 else ("interrupted_of_two", "whole_of_two")
    name = trainer.copy(request.getfixturevalue(source), f"full-{world_size}")
    before = complete(trainer.run_dir(name))[-1]
    largest = max(file["bytes"] for file in before.files.values())
    # Each save waits for the one before, so the run ends before figures are written.
    limit = {"max_bytes": largest - 1, "world_size": world_size}
    failed = trainer.start(name, "train_params.save_every_steps=1", **limit)
    assert failed == [FAILED] * world_size, trainer.output(name)
    output = trainer.output(name)
    assert "error: " in output
    assert "File too large" in output
    assert f"{before.folder} is unchanged" in output
    assert "Traceback" not in output
    assert complete(trainer.run_dir(name))[-1].step == before.step
    assert_equal(trainer.finish(name, world_size=world_size), request.getfixturevalue(expected))


def test_a_damaged_checkpoint_costs_only_its_steps(
    trainer: Trainer, whole: dict[str, Any], interrupted: str
) -> None:
    name = trainer.copy(interrupted, "damaged")
    newest = complete(trainer.run_dir(name))[-1].folder
    (newest / "model.safetensors").write_bytes(b"")
    assert_equal(trainer.finish(name), whole)
    assert f"{newest} is damaged (model.safetensors has 0 of" in trainer.output(name)
    for checkpoint in complete(trainer.run_dir(name)):
        rewrite_state(checkpoint.folder, lambda state: state["train_state"].update(unknown=1))
    assert trainer.start(name) == [FAILED]
    assert "cannot be restored" in trainer.output(name)
    for checkpoint in complete(trainer.run_dir(name)):
        (checkpoint.folder / "state.json").unlink()
    assert trainer.start(name) == [FAILED]
    assert "no complete checkpoint is left" in trainer.output(name)
    assert "Traceback" not in trainer.output(name)


def test_a_run_of_format_1_ends_as_if_it_were_new(
    trainer: Trainer, whole: dict[str, Any], interrupted: str
) -> None:
    name = trainer.copy(interrupted, "format-1")
    for checkpoint in complete(trainer.run_dir(name)):
        rewrite_state(checkpoint.folder, to_format_1)
    assert trainer.finish(name)["network"] == whole["network"]
    assert "resumed from" in trainer.output(name)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_of_two_ranks_resumes_with_fewer_and_with_more(
    trainer: Trainer, interrupted_of_two: str, world_size: int
) -> None:
    name = trainer.copy(interrupted_of_two, f"by-{world_size}")
    before = complete(trainer.run_dir(name))[-1]
    trainer.finish(name, world_size=world_size)
    assert f"{before.folder}: results may differ" in trainer.output(name)
    assert f"num_processes: was 2, is {world_size}" in trainer.output(name)
    assert complete(trainer.run_dir(name))[-1].step == EPOCHS * STEPS
