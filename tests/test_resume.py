"""A run that is killed, stopped and started again ends as the one that was left alone: to the last bit."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from checkpoint import Checkpoint

KILLS, KILLS_OF_TWO = 24, 6
"""At random instants, of runs of one and of two processes."""
TIMING = {"seconds", "slices_per_second"}


class Trainer:
    """Starts trainer.py in processes of its own, on one experiment with everything random switched on."""

    def __init__(self, folder: Path, universe: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
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
                        "epochs": 3,
                        "lr": 0.001,
                        "log_dir": str(self.runs),
                        "batch_size": 24,
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
        program = [sys.executable, str(Path(__file__).parent / "restarts.py")]
        self._server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        with self._server:
            assert self._server.stdin is not None
            self._server.stdin.close()

    def start(self, name: str, *overrides: str, **order: Any) -> dict[str, Any]:
        """One start of the run `name`; see restarts.py for what `order` may hold."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        order["arguments"] = [str(self.experiment), f"model_params.name={name}", *overrides]
        order["out"] = str(self.folder / f"{name}.out")
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, universe: Path) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path_factory.mktemp("resume"), universe)
    yield trainer
    trainer.close()


def complete(run: Path) -> list[Checkpoint]:
    """The complete checkpoints, oldest first; nothing is tidied up."""
    found = [Checkpoint(path) for path in sorted(run.glob("checkpoints/step_????????"))]
    return [checkpoint for checkpoint in found if checkpoint.find_problem() is None]


def shown_by_tensorboard(run: Path) -> dict[str, list[tuple[int, bytes]]]:
    """(step, value) of each point of each tag that TensorBoard shows; no values of speeds."""
    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [
            (event.step, b"" if tag.split("/")[0] in TIMING else event.tensor_proto.SerializeToString())
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }


def ending(run: Path) -> dict[str, Any]:
    """All that a run leaves, apart from what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ended = {
        "metrics": [{key: value for key, value in line.items() if key not in TIMING} for line in lines],
        "tensorboard": shown_by_tensorboard(run),
        "network": (run / "model" / "model.safetensors").read_bytes(),
        "suffixes": {path.suffix for path in run.rglob("*") if path.is_file()},
    }
    # The last one, and the one before from the middle of an epoch with the sample ids of its first steps.
    for checkpoint in complete(run)[-2:]:
        name = checkpoint.folder.name
        ended[f"{name}/progress"] = {k: v for k, v in checkpoint.progress.items() if k not in TIMING}
        for part in ("model", "optimizer", "random", "extra"):
            ended[f"{name}/{part}"] = checkpoint.read(f"{part}.safetensors")
    return ended


def assert_equal(ended: dict[str, Any], expected: dict[str, Any], history: object) -> None:
    assert ended.keys() == expected.keys(), history
    for key, value in expected.items():
        if isinstance(value, bytes):  # pytest would take minutes to show how they differ
            same = ended[key] == value
            assert same, f"{key} differs after {history}"
        else:
            assert ended[key] == value, f"{key} differs after {history}"


class Whole(NamedTuple):
    """A run that nobody disturbed."""

    ended: dict[str, Any]
    seconds: float


def undisturbed(trainer: Trainer, name: str, *overrides: str, **order: Any) -> Whole:
    answer = trainer.start(name, *overrides, **order)
    assert set(answer["codes"]) == {0}, trainer.said(name)
    return Whole(ending(trainer.runs / name), answer["seconds"])


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> Whole:
    undisturbed(trainer, "warm")  # the first start may have to compile
    return undisturbed(trainer, "whole")


@pytest.fixture(scope="module")
def whole_of_two(trainer: Trainer) -> Whole:
    undisturbed(trainer, "warm-of-two", processes=2)
    return undisturbed(trainer, "whole-of-two", processes=2)


def finished(run: Path, epochs: int = 3) -> bool:
    progress = complete(run)[-1].progress if complete(run) else {"epoch": 0}
    return progress["epoch"] == epochs and not progress["evaluation_pending"]


def until_finished(
    trainer: Trainer, name: str, kill: Callable[[], dict[str, Any]], processes: int = 1
) -> list[dict[str, Any]]:
    """Start the run again and again, each time with a kill, until it is finished; returns the kills."""
    kills = []
    while not finished(trainer.runs / name):
        order = kill()
        codes = trainer.start(name, processes=processes, **order)["codes"]
        if codes == [0] * processes:
            break
        assert -signal.SIGKILL in codes, trainer.said(name)
        kills.append(order | {"left": [checkpoint.step for checkpoint in complete(trainer.runs / name)]})
    return kills


def test_a_run_leaves_no_file_that_could_be_unpickled(whole: Whole) -> None:
    # the lock has no suffix and no content
    assert whole.ended["suffixes"] <= {"", ".safetensors", ".json", ".jsonl", ".yaml", ".md", ".0"}


def test_each_tag_has_each_step_once(whole: Whole) -> None:
    for tag, points in whole.ended["tensorboard"].items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag


def killed_again_and_again(
    trainer: Trainer, kill: Callable[[], dict[str, Any]], kills: int, whole: Whole, processes: int = 1
) -> None:
    """Runs that get at least so many kills all together, each of which ends as the undisturbed one."""
    done = 0
    for name in (f"killed-{processes}-{run}" for run in itertools.count()):
        history = until_finished(trainer, name, kill, processes)
        assert_equal(ending(trainer.runs / name), whole.ended, history)
        done += len(history)
        if done >= kills:
            return


def test_kills_at_random_instants_change_nothing(trainer: Trainer, whole: Whole) -> None:
    chance = random.Random(20)
    kill = lambda: (  # noqa: E731
        {"call": chance.randrange(80)}  # inside a save
        if chance.random() < 0.35
        else {"after": chance.uniform(0.1, 0.6) * whole.seconds}
    )
    killed_again_and_again(trainer, kill, KILLS, whole)


def test_kills_of_one_of_two_processes_change_nothing(trainer: Trainer, whole_of_two: Whole) -> None:
    chance = random.Random(21)

    def kill() -> dict[str, Any]:
        if chance.random() < 0.4:
            return {"call": chance.randrange(80)}
        return {"rank": chance.randrange(2), "send": ["SIGKILL", "trainer.train_step", chance.randrange(20)]}

    killed_again_and_again(trainer, kill, KILLS_OF_TWO, whole_of_two, processes=2)


@pytest.mark.parametrize(
    ("name", "function", "call", "step"),
    [
        ("SIGTERM", "trainer.train_step", 6, 7),
        ("SIGINT", "trainer.train_step", 15, 16),
        ("SIGUSR1", "trainer.train_step", 10, 12),  # in the last step of an epoch
        ("SIGTERM", "trainer.test", 0, 22),
        ("SIGTERM", "state.write", 3, None),
    ],
)
def test_a_signal_ends_the_run_well_and_changes_nothing(
    trainer: Trainer, whole: Whole, name: str, function: str, call: int, step: int | None
) -> None:
    run = f"{name}-{function}-{call}"
    assert trainer.start(run, send=[name, function, call])["codes"] == [0], trainer.said(run)
    stopped = complete(trainer.runs / run)[-1].step
    assert f"stopped at step {stopped} ({name}); the same command goes on" in trainer.said(run)
    assert step in (None, stopped)
    assert not (trainer.runs / run / "model").exists()
    assert trainer.start(run)["codes"] == [0]
    assert_equal(ending(trainer.runs / run), whole.ended, run)


def test_two_processes_stop_together_though_one_got_the_signal(trainer: Trainer, whole_of_two: Whole) -> None:
    order = {"processes": 2, "rank": 1, "send": ["SIGTERM", "trainer.train_step", 6]}
    assert trainer.start("signal-of-two", **order)["codes"] == [0, 0], trainer.said("signal-of-two")
    assert complete(trainer.runs / "signal-of-two")[-1].progress["step_in_epoch"]
    assert trainer.start("signal-of-two", processes=2)["codes"] == [0, 0]
    assert_equal(ending(trainer.runs / "signal-of-two"), whole_of_two.ended, "a signal")


def test_a_process_whose_partner_is_gone_says_so(trainer: Trainer) -> None:
    order = {"processes": 2, "rank": 1, "send": ["SIGKILL", "trainer.train_step", 6]}
    assert trainer.start("left-alone", **order)["codes"] == [2, -signal.SIGKILL], trainer.said("left-alone")
    assert "LaunchError: another process ended; its message says why" in trainer.said("left-alone")
    assert "Traceback" not in trainer.said("left-alone")


def test_the_last_bits_of_sums_over_three_processes_are_kept(trainer: Trainer) -> None:
    """DDP changes the order of its sums after its first step, and each process has buffers of its own."""
    override = "train_params.sync_batch_norm=false"
    whole = undisturbed(trainer, "whole-of-three", override, processes=3)
    for send in (["SIGKILL", "trainer.train_step", 7], ["SIGTERM", "trainer.test", 0]):
        name = f"{send[0]}-of-three"
        codes = trainer.start(name, override, processes=3, send=send)["codes"]
        assert set(codes) == {-signal.SIGKILL if send[0] == "SIGKILL" else 0}, trainer.said(name)
        assert_equal(undisturbed(trainer, name, override, processes=3).ended, whole.ended, send)


def test_a_kill_between_a_test_and_its_checkpoint_logs_the_test_once(trainer: Trainer, whole: Whole) -> None:
    assert trainer.start("tested", send=["SIGTERM", "trainer.test", 0])["codes"] == [0]
    assert trainer.start("tested", send=["SIGKILL", "trainer.save", 0])["codes"] == [-signal.SIGKILL]
    lines = (trainer.runs / "tested" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines] == ["train", "train", "test"]
    assert trainer.start("tested")["codes"] == [0]
    assert_equal(ending(trainer.runs / "tested"), whole.ended, "a kill after a test")


def test_the_time_that_is_granted_is_kept_and_changes_nothing(trainer: Trainer, whole: Whole) -> None:
    stops = 0
    while not finished(trainer.runs / "timed"):
        assert stops < 40
        minutes = whole.seconds / 60 / 3
        assert trainer.start("timed", f"train_params.max_minutes={minutes}")["codes"] == [0]
        stops += 1
    assert stops > 1
    assert "(max_minutes); the same command goes on" in trainer.said("timed")
    assert_equal(ending(trainer.runs / "timed"), whole.ended, f"{stops} stops")


def test_a_finished_run_that_goes_on_may_be_killed_too(trainer: Trainer) -> None:
    for name in ("twice", "twice-killed"):
        undisturbed(trainer, name, "train_params.epochs=1")
    expected = undisturbed(trainer, "twice", "train_params.epochs=2")
    order = {"send": ["SIGKILL", "trainer.train_step", 13]}
    codes = trainer.start("twice-killed", "train_params.epochs=2", **order)["codes"]
    assert codes == [-signal.SIGKILL]
    ended = undisturbed(trainer, "twice-killed", "train_params.epochs=2").ended
    assert [line["epoch"] for line in ended["metrics"] if line["phase"] == "train"] == [1, 2, 3]
    assert_equal(ended, expected.ended, "a kill")


def test_a_full_disk_ends_the_run_and_changes_nothing(trainer: Trainer, whole: Whole) -> None:
    assert trainer.start("full", send=["SIGKILL", "trainer.train_step", 8])["codes"] == [-signal.SIGKILL]
    [*_, before] = complete(trainer.runs / "full")
    # The moments are the largest of the files.
    sizes = sorted(file["bytes"] for file in before.files.values())
    assert trainer.start("full", room=sizes[-1] - 1)["codes"] == [2]
    said = trainer.said("full")
    assert "CheckpointError" in said
    assert "File too large" in said
    assert f"{before.folder} is untouched" in said
    assert "Traceback" not in said
    assert complete(trainer.runs / "full")[-1].step == before.step
    assert trainer.start("full")["codes"] == [0]
    assert_equal(ending(trainer.runs / "full"), whole.ended, "a full disk")


def test_a_damaged_checkpoint_costs_its_steps_only(trainer: Trainer, whole: Whole) -> None:
    assert trainer.start("hurt", send=["SIGKILL", "trainer.train_step", 15])["codes"] == [-signal.SIGKILL]
    newest = complete(trainer.runs / "hurt")[-1].folder
    (newest / "model.safetensors").write_bytes(b"")
    assert trainer.start("hurt")["codes"] == [0]
    assert f"{newest} is damaged (model.safetensors has 0 of" in trainer.said("hurt")
    assert_equal(ending(trainer.runs / "hurt"), whole.ended, "damage")
    for checkpoint in complete(trainer.runs / "hurt"):
        (checkpoint.folder / "state.json").unlink()
    assert trainer.start("hurt")["codes"] == [2]
    assert "no complete checkpoint is left" in trainer.said("hurt")


def test_a_run_of_two_processes_goes_on_with_one(trainer: Trainer) -> None:
    order = {"processes": 2, "send": ["SIGKILL", "trainer.train_step", 8]}
    assert -signal.SIGKILL in trainer.start("fewer", **order)["codes"]
    before = complete(trainer.runs / "fewer")[-1]
    assert trainer.start("fewer")["codes"] == [0]
    assert f"{before.folder}: the bits may differ from here on, as processes: was 2, is 1" in trainer.said(
        "fewer"
    )
    assert finished(trainer.runs / "fewer")
