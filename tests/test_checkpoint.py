"""Checkpoints are exact, complete or absent, and selected correctly after every kind of failure."""

from __future__ import annotations

import system
from system import UserError

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointManager,
    NewerFormatError,
    list_checkpoints,
    schema,
    select,
    storage,
    tensors,
)
from training.checkpoint import __main__ as program

ROOT = Path(__file__).parents[1]
FILES = ["extra.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors"]
FILES += ["random.safetensors", "state.json"]
PROCESSES = multiprocessing.get_context("forkserver")
pytestmark = pytest.mark.usefixtures("preloaded_processes")

IDENTITY = {
    "path": "/data/cubes.h5",
    "bytes": 123,
    "shape": [64, 64, 64],
    "seeds": [0, 2],
    "fingerprint": "a1",
}


class Training:
    """A small training that uses everything a checkpoint must hold."""

    def __init__(self, run_dir: Path, *, keep: int = 2, width: int = 4, **adam: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
            nn.Linear(width * 36, 1),
        ).to(memory_format=torch.channels_last)  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, **adam)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        rank = self.accelerator.process_index
        torch.manual_seed(10 + rank)
        np.random.seed(20 + rank)
        random.seed(30 + rank)
        self.draw()  # after an even number of steps, the generators hold a second normal number
        self.step = 0
        self.run_dir = run_dir
        self.checkpoints = CheckpointManager(run_dir, self.accelerator, keep=keep)

    def draw(self) -> list[float]:
        return [torch.rand(1).item(), np.random.standard_normal(), random.gauss(0, 1), random.random()]

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            images = torch.randn(3, 2, 8, 8) + sum(self.draw())
            self.optimizer.zero_grad()
            self.accelerator.backward(self.network(images).square().mean())
            self.optimizer.step()
            self.step += 1

    def counters(self) -> dict[str, Any]:
        return {
            "mean": 0.0,
            "std": 1.0,
            "epoch": 0,
            "step": self.step,
            "step_in_epoch": self.step,
            "seconds": 1.5,
            "waiting_seconds": 0.5,
            "running_sums": [0.5, 1.0, 2.0],
            "evaluation_pending": False,
            "first_epoch": 0,
            "target_epoch": 4,
            "test_loss": None,
            "best_loss": 0.1,
            "evaluations_without_improvement": 1,
            "stopped_early": False,
        }

    def predictions(self) -> dict[str, torch.Tensor]:
        ids = torch.arange(self.step)
        return {"ids": ids, "logits": ids / 2} if self.step else {}

    def save(self, *, test_loss: float | None = None, wait: bool = True, **changes: Any) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        given = {
            "train_state": self.counters(),
            "tensors": self.predictions(),
            "config": {"train_params": {"lr": 0.01}},
            "data_identity": IDENTITY,
        }
        self.checkpoints.save(self.network, self.optimizer, test_loss=test_loss, **(given | changes))
        if wait:
            self.checkpoints.close()

    def restore(self, **changes: Any) -> dict[str, torch.Tensor]:
        latest = self.checkpoints.latest_complete()
        assert latest is not None
        given = {"data_identity": IDENTITY, "seed": 5} | changes
        restored = self.checkpoints.restore(latest, self.network, self.optimizer, **given)
        self.step = latest.step
        assert latest.train_state == latest.train_state | self.counters()
        return restored

    def everything(self) -> dict[str, Any]:
        """All that must be equal for two trainings to be equal, random generators included."""
        network = self.accelerator.unwrap_model(self.network)
        state = {name: value.clone() for name, value in network.state_dict().items()}
        for name, parameter in network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"{name}/{key}"] = value.clone()
                assert key == "step" or value.stride() == parameter.stride()
        generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
        drawn = self.draw()
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])
        return state | {"drawn": torch.tensor(drawn, dtype=torch.float64)}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(folder: Path, **changes: bytes) -> None:
    """Replace files of a checkpoint, named without suffix, and write a manifest that matches them."""
    entries = {}
    for name in FILES:
        if name != "manifest.json":
            data = changes.get(name.split(".")[0], (folder / name).read_bytes())
            (folder / name).write_bytes(data)
            entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(storage._manifest(entries))


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    rewrite(folder, state=json.dumps(state).encode())


def in_children(target: Callable[..., None], *arguments: Any, world_size: int = 1) -> list[int | None]:
    """Run `target(rank, world_size, port, *arguments)` in new processes; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        PROCESSES.Process(target=target, args=(rank, world_size, port, *arguments))
        for rank in range(world_size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# ---------------------------------------------------------------- save and restore


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"amsgrad": True}], ids=["plain", "fused", "amsgrad"])
def test_a_restored_training_is_bit_exact(tmp_path: Path, adam: dict[str, Any], steps: int) -> None:
    whole = Training(tmp_path, **adam)
    whole.train(steps)
    whole.save()
    saved = whole.everything()
    whole.train(4)
    resumed = Training(tmp_path, **adam)
    resumed.train(1)  # is overwritten
    restored = resumed.restore()
    assert_same(resumed.everything(), saved)
    assert_same(restored, resumed.predictions())
    resumed.train(4)
    assert_same(resumed.everything(), whole.everything())


def test_a_checkpoint_before_the_first_step_restores(tmp_path: Path) -> None:
    Training(tmp_path).save()
    resumed = Training(tmp_path)
    resumed.restore()
    assert resumed.optimizer.state_dict()["state"] == {}
    resumed.train()


def test_only_one_program_locks_a_run_and_no_empty_folder_remains(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    first, second = Training(run_dir).checkpoints, Training(run_dir).checkpoints
    first.acquire_lock()
    with pytest.raises(CheckpointError, match="another program is training this run"):
        second.acquire_lock()
    second.close()
    assert run_dir.is_dir()
    first.close()
    assert not run_dir.parent.exists()
    second.acquire_lock()
    (run_dir / "config.yaml").touch()
    second.close()
    first.acquire_lock()
    first.close()
    assert (run_dir / "config.yaml").exists()


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert Training(tmp_path / "new").checkpoints.latest_complete() is None


def test_the_optimizer_keeps_its_own_settings(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.train()
    first.save()
    second = Training(tmp_path)
    second.optimizer.param_groups[0]["lr"] = 0.123
    second.restore()
    assert second.optimizer.param_groups[0]["lr"] == 0.123


def test_training_continues_while_the_exact_state_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path)
    training.train(2)
    may_write, original = threading.Event(), storage.write_checkpoint

    def late(*arguments: Any) -> None:
        may_write.wait()
        original(*arguments)

    monkeypatch.setattr(storage, "write_checkpoint", late)
    counters, predictions, expected = training.counters(), training.predictions(), training.predictions()
    training.save(wait=False, train_state=counters, tensors=predictions)
    saved = training.everything()
    training.train(3)
    predictions["logits"].zero_()
    counters["epoch"] = 99
    may_write.set()
    training.checkpoints.close()
    resumed = Training(tmp_path)
    assert_same(resumed.restore(), expected)
    assert_same(resumed.everything(), saved)


def test_compiled_and_plain_networks_share_their_checkpoints(tmp_path: Path) -> None:
    plain = Training(tmp_path)
    plain.train(2)
    plain.save()
    compiled = Training(tmp_path)
    compiled.network = torch.compile(compiled.network)
    compiled.restore()
    compiled.save()
    assert Checkpoint(step_dir(tmp_path, 2)).tensors("model").keys() == plain.network.state_dict().keys()


def test_a_checkpoint_is_a_folder_of_safetensors_and_json(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train()
    training.save(test_loss=0.5)
    folder = step_dir(tmp_path, 1)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    saved = json.loads((folder / "state.json").read_text())
    assert saved["format"] == 2
    assert saved["train_state"] == training.counters()
    assert saved["environment"].keys() == {"num_processes", "device", "python", "torch", "accelerate"}
    assert saved["environment"]["torch"] == torch.__version__
    assert saved["test_loss"] == 0.5
    assert saved["data_identity"] == IDENTITY
    moments = Checkpoint(folder).tensors("optimizer")
    assert moments.keys() == {
        f"{name}/{key}"
        for name, _ in training.network.named_parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    rows = Checkpoint(folder).tensors("random")
    assert {name: (value.dtype, len(value)) for name, value in rows.items()} == dict.fromkeys(
        ["torch", "numpy", "python"], (torch.uint8, 1)
    )
    latest = training.checkpoints.latest_complete()
    assert latest is not None
    assert (latest.step, latest.config) == (1, {"train_params": {"lr": 0.01}})
    assert latest.train_state["epoch"] == 0


def test_the_schema_holds_the_counters_of_a_run() -> None:
    from training import run

    counters = {field.name for field in dataclasses.fields(run.TrainState)} - {"predictions"}
    assert schema.SavedTrainState.model_fields.keys() == counters


def test_nothing_is_ever_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("pickle was used")

    for module, name in [(pickle, "loads"), (pickle, "load"), (pickle, "dumps"), (pickle, "dump")]:
        monkeypatch.setattr(module, name, refuse)
    for module, name in [(pickle, "Unpickler"), (pickle, "Pickler"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, refuse)
    training = Training(tmp_path)
    training.train()
    training.save()
    training.save()
    Training(tmp_path).restore()
    assert program.verify(tmp_path)


# ---------------------------------------------------------------- formats


def to_format_1(state: dict[str, Any]) -> None:
    """Rename the keys of state.json as the first version wrote them."""
    renamed = {"train_state": "progress", "data_identity": "identity", "environment": "circumstances"}
    renamed_counters = {
        "evaluation_pending": "awaiting_test",
        "evaluations_without_improvement": "tests_without_better",
        "stopped_early": "ended_early",
    }
    del state["format"]
    for name, field in schema.SavedTrainState.model_fields.items():
        if not field.is_required():  # was added later
            state["train_state"].pop(name, None)
    for new, old in renamed.items():
        state[old] = state.pop(new)
    for new, old in renamed_counters.items():
        state["progress"][old] = state["progress"].pop(new)
    state["circumstances"]["processes"] = state["circumstances"].pop("num_processes")


def test_a_run_of_format_1_resumes_bit_exactly(tmp_path: Path) -> None:
    whole = Training(tmp_path)
    whole.train(2)
    counters = whole.counters() | {"waiting_seconds": 0.0, "running_sums": [0.0, 0.0, 0.0]}
    whole.save(test_loss=0.5, train_state=counters)
    before = Checkpoint(step_dir(tmp_path, 2)).state
    rewrite_state(step_dir(tmp_path, 2), to_format_1)
    assert "train_state" not in json.loads((step_dir(tmp_path, 2) / "state.json").read_text())
    assert Checkpoint(step_dir(tmp_path, 2)).state == before
    assert program.verify(tmp_path)
    whole.train(3)
    resumed = Training(tmp_path)
    latest = resumed.checkpoints.latest_complete()
    assert latest is not None
    assert latest.train_state == latest.train_state | counters
    resumed.checkpoints.restore(latest, resumed.network, resumed.optimizer, data_identity=IDENTITY, seed=5)
    resumed.train(3)
    assert_same(resumed.everything(), whole.everything())


@pytest.mark.parametrize("suffix", ["", ".old"])
def test_a_newer_format_is_rejected_and_nothing_is_changed(
    run_dir: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = step_dir(run_dir, 1)
    rewrite_state(folder, lambda state: state.update(format=3, train_state={"unknown": 1}))
    folder.rename(folder.with_name(folder.name + suffix))
    shutil.copytree(step_dir(run_dir, 2), step_dir(run_dir, 3))
    flip(step_dir(run_dir, 3) / "model.safetensors")
    before = content(run_dir)
    with pytest.raises(NewerFormatError, match=r"state\.json has format 3.*Update the program") as error:
        Training(run_dir).checkpoints.latest_complete()
    assert str(folder) in str(error.value)
    assert content(run_dir) == before
    assert program.main(["verify", str(run_dir)]) == 2
    assert "1 complete, 1 damaged, 1 of a newer version" in capsys.readouterr().out
    if not suffix:
        with pytest.raises(NewerFormatError):
            select(run_dir / "checkpoints", "1")


# ---------------------------------------------------------------- damage


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with checkpoints of step 1 and 2, and the state at step 1."""
    run_dir = tmp_path_factory.mktemp("run")
    training = Training(run_dir)
    training.train()
    training.save(test_loss=0.7)
    saved = training.everything()
    training.train()
    training.save()
    return run_dir, saved


@pytest.fixture
def run_dir(two_checkpoints: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_checkpoints[0], tmp_path / "run"))


def test_a_storage_that_fails_does_not_make_checkpoints_damaged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(run_dir)

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        Training(run_dir).checkpoints.latest_complete()
    assert names(run_dir) == before
    assert program.main(["verify", str(run_dir)]) == 2
    assert "cannot be read: Input/output error" in capsys.readouterr().out


@pytest.mark.parametrize(("owner", "function"), [(storage, "write_checkpoint"), (Checkpoint, "find_problem")])
def test_a_run_folder_renamed_during_a_write_is_reported_and_not_created_again(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str
) -> None:
    original = getattr(owner, function)

    def rename_first(*arguments: Any) -> Any:
        run_dir.rename(tmp_path / "moved")
        return original(*arguments)

    training = Training(run_dir)
    training.checkpoints.acquire_lock()
    training.train()
    monkeypatch.setattr(owner, function, rename_first)
    with pytest.raises(CheckpointError, match=r"this folder, or its \.lock, was renamed or removed"):
        training.save()
    assert not run_dir.exists()


@pytest.mark.parametrize("damage", [flip, truncate, empty, os.unlink, pipe])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_quarantined_and_the_previous_one_is_used(
    run_dir: Path,
    two_checkpoints: tuple[Path, dict[str, Any]],
    name: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(step_dir(run_dir, 2) / name)
    assert not program.verify(run_dir)
    training = Training(run_dir)
    training.restore()
    assert training.step == 1
    assert_same(training.everything(), two_checkpoints[1])
    assert names(run_dir) == ["step_00000001", "step_00000002.damaged"]
    assert "step_00000002" in caplog.text
    assert name in caplog.text
    training.train()
    training.save()  # the same step again, under its own name
    assert names(run_dir) == ["step_00000001", "step_00000002", "step_00000002.damaged"]
    assert program.verify(run_dir)
    damage(step_dir(run_dir, 2) / name)
    Training(run_dir).restore()
    assert names(run_dir)[1:] == ["step_00000002.damaged", "step_00000002.damaged-again"]


def test_any_flipped_bit_of_the_manifest_is_detected(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = step_dir(run_dir, 2)
    manifest = (folder / "manifest.json").read_bytes()
    assert Checkpoint(folder).files
    for position in range(len(manifest)):
        for bit in range(8):
            damaged = bytearray(manifest)
            damaged[position] ^= 1 << bit
            # In memory: thousands of writes take a minute on a busy disk.
            monkeypatch.setattr(Checkpoint, "_content", lambda self, name, content=damaged: bytes(content))
            with pytest.raises(CheckpointError, match=r"manifest\.json is not what was written"):
                assert Checkpoint(folder).files


def keys(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


NESTED: list[Any] = []
for _ in range(300):
    NESTED = [NESTED]
WRONG_STATES: dict[str, bytes | Callable[[dict[str, Any]], Any]] = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "null": b"null",
    "a list": b"[]",
    "no keys": b"{}",
    "deeply nested": b"[" * 100_000,
    "nested config": keys("config", "train_params", "lr", value=NESTED),
    "5000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "format text": keys("format", value="2"),
    "format true": keys("format", value=True),
    "format 0": keys("format", value=0),
    "format beyond 64 bits": keys("format", value=2**70),
    "no format": lambda state: state.pop("format") and state.pop("train_state"),
    "no step": lambda state: state["train_state"].pop("step"),
    "another step": keys("train_state", "step", value=3),
    "step text": keys("train_state", "step", value="2"),
    "step float": keys("train_state", "step", value=2.0),
    "step true": keys("train_state", "step", value=True),
    "step negative": keys("train_state", "step", value=-2),
    "step of 64 bits": keys("train_state", "step", value=2**63),
    "step beyond 64 bits": keys("train_state", "step", value=10**30),
    "epoch beyond 64 bits": keys("train_state", "epoch", value=2**64),
    "huge seconds": keys("train_state", "seconds", value=10**400),
    "seconds NaN": keys("train_state", "seconds", value=float("nan")),
    "loss infinite": keys("test_loss", value=float("inf")),
    "two sums": keys("train_state", "running_sums", value=[0.0, 0.0]),
    "std zero": keys("train_state", "std", value=0.0),
    "counters a list": keys("train_state", value=[1, 2]),
    "unknown counter": keys("train_state", "surprise", value=1),
    "unknown key": keys("\x1b[31m" * 100, value=1),
    "config a list": keys("config", value=[]),
    "section a number": keys("config", "train_params", value=1),
    "more steps than epochs": keys("train_state", "epoch", value=1),
    "no environment": lambda state: state.pop("environment"),
    "other ranks": keys("environment", "num_processes", value=2),
    "shape of the data": keys("data_identity", "shape", value=[64]),
    "scale negative": keys("scaler", value={"scale": -1.0}),
}


def assert_previous_is_used(run_dir: Path, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After damage to the content of step 2."""
    assert program.main(["verify", str(run_dir)]) == 2
    output = capsys.readouterr()
    assert "1 complete, 1 damaged" in output.out
    assert named in output.out
    assert "\x1b" not in output.out
    assert len(output.out) < 1500
    with pytest.raises(CheckpointError):
        select(run_dir / "checkpoints", "2")
    training = Training(run_dir)
    training.restore()
    assert training.step == 1
    assert names(run_dir) == ["step_00000001", "step_00000002.damaged"]


@pytest.mark.parametrize("case", WRONG_STATES)
def test_a_wrong_state_in_a_valid_manifest_is_damage(
    run_dir: Path, case: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = WRONG_STATES[case]
    if isinstance(wrong, bytes):
        rewrite(step_dir(run_dir, 2), state=wrong)
    else:
        rewrite_state(step_dir(run_dir, 2), wrong)
    named = "random.safetensors" if case == "other ranks" else "state.json"
    assert_previous_is_used(run_dir, named, capsys)
    assert named in caplog.text


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    return lambda part: part.update({name: change(part[name]).contiguous()})


def noise(state: torch.Tensor) -> torch.Tensor:
    return torch.randint(0, 256, state.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def with_word(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(state: torch.Tensor) -> torch.Tensor:
        numbers = state.clone().view(torch.float64)
        numbers[0, index] = value
        return numbers.view(torch.uint8)

    return change


WRONG_TENSORS: dict[str, tuple[str, bytes | Callable[[dict[str, Any]], Any]]] = {
    "no safetensors": ("model", b"not safetensors at all"),
    "huge header": ("model", b"\xff" * 8 + b"{}"),
    "weight of another shape": ("model", changed("0.weight", lambda weight: weight[:2])),
    "weight of another type": ("model", changed("0.weight", torch.Tensor.double)),
    "weight of 8 bits": ("model", changed("0.weight", lambda weight: weight.to(torch.float8_e4m3fn))),
    "weight missing": ("model", lambda part: part.pop("0.weight")),
    "weight NaN": ("model", changed("0.weight", lambda weight: weight * float("nan"))),
    "moment of another shape": ("optimizer", changed("0.weight/exp_avg", lambda moment: moment[0])),
    "moment infinite": ("optimizer", changed("0.weight/exp_avg", lambda moment: moment / 0)),
    "moment missing": ("optimizer", lambda part: part.pop("0.weight/exp_avg_sq")),
    "no moments": ("optimizer", lambda part: part.clear()),
    "steps a vector": ("optimizer", changed("0.weight/step", lambda step: step.expand(3))),
    "moment of nothing": ("optimizer", lambda part: part.update({"9.weight/exp_avg": torch.zeros(1)})),
    "moment without name": ("optimizer", lambda part: part.update({"exp_avg": torch.zeros(1)})),
    "torch missing": ("random", lambda part: part.pop("torch")),
    "torch too short": ("random", changed("torch", lambda state: state[:, :100])),
    "torch too long": ("random", changed("torch", lambda state: state.repeat(1, 2))),
    "torch noise": ("random", changed("torch", noise)),
    "torch floats": ("random", changed("torch", torch.Tensor.float)),
    "torch of two ranks": ("random", changed("torch", lambda state: state.repeat(2, 1))),
    "torch a vector": ("random", changed("torch", lambda state: state[0])),
    "numpy noise": ("random", changed("numpy", noise)),
    "numpy too short": ("random", changed("numpy", lambda state: state[:, :-3])),
    "numpy beyond its words": ("random", changed("numpy", with_word(624, 700))),
    "numpy beyond 32 bits": ("random", changed("numpy", with_word(3, 2.0**32))),
    "python noise": ("random", changed("python", noise)),
    "python empty": ("random", changed("python", lambda state: state[:, :0])),
    "python beyond its words": ("random", changed("python", with_word(624, 700))),
    "python NaN": ("random", changed("python", with_word(5, float("nan")))),
    "python fractional": ("random", changed("python", with_word(5, 0.5))),
    "device of two ranks": ("random", lambda part: part.update(cuda=torch.zeros(2, 16, dtype=torch.uint8))),
    "predictions missing": ("extra", lambda part: part.clear()),
    "logits missing": ("extra", lambda part: part.pop("logits")),
    "other tensors": ("extra", lambda part: part.update(more=torch.zeros(2))),
    "ids as floats": ("extra", changed("ids", torch.Tensor.float)),
    "ids negative": ("extra", changed("ids", lambda ids: ids - 1)),
    "ids twice": ("extra", changed("ids", torch.zeros_like)),
    "logits NaN": ("extra", changed("logits", lambda logits: logits / 0)),
    "predictions of half a step": (
        "extra",
        lambda part: part.update(ids=torch.arange(3), logits=torch.zeros(3)),
    ),
    "fewer logits": ("extra", changed("logits", lambda logits: logits[:1])),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_in_a_valid_manifest_are_damage(
    run_dir: Path, case: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    part, wrong = WRONG_TENSORS[case]
    folder = step_dir(run_dir, 2)
    if callable(wrong):
        loaded = Checkpoint(folder).tensors(part)
        wrong(loaded)
        wrong = safetensors.torch.save(loaded)
    rewrite(folder, **{part: wrong})
    assert_previous_is_used(run_dir, "safetensors", capsys)
    assert f"{folder} is damaged" in caplog.text


def test_predictions_between_epochs_are_damage(run_dir: Path) -> None:
    between = {"epoch": 1, "step_in_epoch": 0}
    rewrite_state(step_dir(run_dir, 2), lambda state: state["train_state"].update(between))
    assert "extra.safetensors" in str(Checkpoint(step_dir(run_dir, 2)).find_problem())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", changed("1.running_mean", lambda mean: mean[:2]), r"1\.running_mean: saved as \[2\] torch"),
        (
            "model",
            changed("1.running_var", torch.Tensor.bfloat16),
            r"1\.running_var: .*now \[4\] torch\.float32",
        ),
        ("optimizer", lambda part: [part.pop(key) for key in list(part) if "0.weight" in key], r"0\.weight"),
    ],
)
def test_tensors_that_only_the_network_can_check_are_an_error(
    run_dir: Path, part: str, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    loaded = Checkpoint(step_dir(run_dir, 2)).tensors(part)
    change(loaded)
    rewrite(step_dir(run_dir, 2), **{part: safetensors.torch.save(loaded)})
    training = Training(run_dir)
    before = training.everything()
    with pytest.raises(CheckpointError, match=message):
        training.restore()
    assert_same(training.everything(), before)


def test_other_files_are_ignored_and_named(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (step_dir(run_dir, 2) / ".nfs0001").write_text("not ours")
    (step_dir(run_dir, 2) / "notes").mkdir()
    (run_dir / "checkpoints" / "step_old").mkdir()
    (run_dir / "checkpoints" / "readme.txt").write_text("not ours either")
    assert program.verify(run_dir)
    training = Training(run_dir, keep=1)
    training.restore()
    assert training.step == 2
    assert ".nfs0001, notes" in caplog.text
    training.train()
    training.save()
    assert names(run_dir) == ["readme.txt", "step_00000001", "step_00000003", "step_old"]


def test_a_folder_under_the_name_of_another_step_is_damaged(
    run_dir: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("step_00000007", f"step_{10**30}"):
        shutil.copytree(step_dir(run_dir, 1), run_dir / "checkpoints" / name)
    assert program.main(["verify", str(run_dir)]) == 2
    assert "2 complete, 2 damaged" in capsys.readouterr().out
    training = Training(run_dir)
    training.restore()
    assert training.step == 2
    assert f"step_{10**30} is damaged (state.json was saved at step 1)" in caplog.text
    assert names(run_dir)[2:] == ["step_00000007.damaged", f"step_{10**30}.damaged"]


def test_a_run_with_damaged_checkpoints_only_never_starts_again(run_dir: Path) -> None:
    for step in (1, 2):
        flip(step_dir(run_dir, step) / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no complete checkpoint is left") as error:
            Training(run_dir).checkpoints.latest_complete()
        assert "step_00000001: model.safetensors is not what was written" in str(error.value)
        assert "To start again, remove that folder" in str(error.value)
    for step in (1, 2):
        step_dir(run_dir, step).rename(f"{step_dir(run_dir, step)}.damaged")
    with pytest.raises(CheckpointError, match="quarantined earlier"):
        Training(run_dir).checkpoints.latest_complete()


def test_damage_after_the_selection_is_an_error(run_dir: Path) -> None:
    training = Training(run_dir)
    latest = training.checkpoints.latest_complete()
    assert latest is not None
    before = training.everything()
    flip(latest.folder / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is not what was written"):
        training.checkpoints.restore(
            latest, training.network, training.optimizer, data_identity=IDENTITY, seed=0
        )
    assert_same(training.everything(), before)


def test_only_a_renamed_checkpoint_counts(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / "step_00000009.partial")
    truncate(folder / "step_00000009.partial" / "model.safetensors")
    shutil.copytree(folder / "step_00000002", folder / "step_00000008.partial")  # complete, but not renamed
    shutil.copytree(folder / "step_00000001", folder / "step_00000001.old")  # being deleted
    (folder / "step_00000002").rename(folder / "step_00000002.old")  # being replaced
    assert program.verify(run_dir)
    training = Training(run_dir)
    training.restore()
    assert training.step == 2
    assert names(run_dir) == ["step_00000001", "step_00000002"]
    assert "step_00000009.partial was being written when the run ended" in caplog.text
    assert "step_00000008.partial was being written when the run ended" in caplog.text


# ---------------------------------------------------------------- what must not be restored or saved


def test_another_network_or_other_data_is_rejected_and_nothing_is_changed(run_dir: Path) -> None:
    training = Training(run_dir, width=8)
    before = training.everything()
    other = IDENTITY | {"path": "/moved.h5", "seeds": [0, 3], "fingerprint": "b2"}
    with pytest.raises(CheckpointError) as error:
        training.restore(data_identity=other)
    assert "data_params.datafile.fingerprint: was 'a1', is 'b2'" in str(error.value)
    assert "data_params.datafile.seeds: was [0, 2], is [0, 3]" in str(error.value)
    assert "0.weight: saved as [4, 2, 3, 3] torch.float32, now [8, 2, 3, 3] torch.float32" in str(error.value)
    assert "another model_params.name" in str(error.value)
    assert "path" not in str(error.value)
    assert_same(training.everything(), before)


def test_data_may_move_and_tuples_equal_lists(run_dir: Path) -> None:
    training = Training(run_dir)
    training.restore(data_identity=IDENTITY | {"path": "/moved.h5", "bytes": 9, "seeds": (0, 2)})
    assert training.step == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(run_dir: Path, value: float) -> None:
    training = Training(run_dir)
    training.restore()
    before = content(run_dir)
    training.train()
    with torch.no_grad():
        training.network[0].weight[1, 0, 0, 0] = value
    with pytest.raises(CheckpointError, match=r"step 3 is not saved: 0\.weight not finite") as error:
        training.save()
    assert "step_00000002 is unchanged" in str(error.value)
    assert content(run_dir) == before


def test_a_sharded_state_is_rejected(tmp_path: Path) -> None:
    class Sharded:
        distributed_type = type("Kind", (), {"value": "FSDP"})

    with pytest.raises(CheckpointError, match="distributed_type FSDP"):
        CheckpointManager(tmp_path, Sharded(), keep=1)


def test_the_gradient_scaler_is_restored(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.train()
    first.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    first.accelerator.scaler.load_state_dict(first.accelerator.scaler.state_dict() | {"_growth_tracker": 2})
    first.save()
    second = Training(tmp_path)
    second.accelerator.scaler = torch.amp.GradScaler("cpu")
    second.restore()
    assert second.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()
    assert second.accelerator.scaler.get_scale() == 2.0**20


def test_another_environment_is_reported(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite_state(step_dir(run_dir, 2), keys("environment", "torch", value="1.0"))
    Training(run_dir).restore()
    assert f"torch: was '1.0', is '{torch.__version__}'" in caplog.text


# ---------------------------------------------------------------- rotation and selection


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, keep=2)
    kept = []
    for loss in (0.9, 0.3, float("nan"), 0.5, None, 0.3, 0.2, 0.4):
        training.train()
        training.save(test_loss=loss)
        kept.append([int(name[-1]) for name in names(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7], [7, 8]]
    assert program.verify(tmp_path)


def test_a_checkpoint_is_selected_by_name(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    assert [one.step for one in list_checkpoints(folder)] == [1, 2]
    assert [select(folder, name).step for name in ("best", "last", "1", "2")] == [1, 2, 1, 2]
    with pytest.raises(CheckpointError, match=r"found no checkpoint '7', allowed: 1, 2, last, best"):
        select(folder, "7")
    flip(step_dir(run_dir, 1) / "model.safetensors")
    for name in ("best", "last", "1"):
        with pytest.raises(CheckpointError, match=r"step_00000001 is damaged: model\.safetensors"):
            select(folder, name)
    assert select(folder, "2").step == 2


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train()
    training.save()
    training.save(test_loss=0.5)
    assert names(tmp_path) == ["step_00000001"]
    assert Checkpoint(step_dir(tmp_path, 1)).state["test_loss"] == 0.5


def test_old_ones_stay_if_the_new_one_cannot_be_read_back(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(run_dir, keep=1)
    training.restore()
    before = content(run_dir)
    training.train()
    write = storage._write_file

    def bad_disk(path: Path, data: bytes) -> dict[str, Any]:
        result = write(path, data)
        if path.name == "optimizer.safetensors":
            flip(path)
        return result

    monkeypatch.setattr(storage, "_write_file", bad_disk)
    with pytest.raises(CheckpointError, match=r"cannot be read back: optimizer\.safetensors"):
        training.save()
    assert content(run_dir) == before


# ---------------------------------------------------------------- disks and permissions


def test_an_error_in_the_background_is_raised_by_every_method(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(run_dir)
    training.restore()
    training.checkpoints.raise_write_error()
    assert training.checkpoints.minutes_since_save < 1
    training.train()

    def broken(*arguments: Any) -> None:
        raise OSError(122, "Disk quota exceeded", "/quota/model.safetensors")

    monkeypatch.setattr(storage, "write_checkpoint", broken)
    training.save(wait=False)
    for method in (training.checkpoints.close, training.checkpoints.raise_write_error, training.save):
        with pytest.raises(CheckpointError, match=r"/quota/model\.safetensors: Disk quota exceeded") as error:
            method()
        assert "step_00000002 is unchanged" in str(error.value)
    assert training.checkpoints.minutes_since_save == float("inf")


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(run_dir: Path) -> None:
    training = Training(run_dir)
    training.restore()
    before = content(run_dir)
    training.train()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the weights, not for the moments.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"partial/optimizer\.safetensors: File too large") as error:
            training.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_00000002 is unchanged" in str(error.value)
    assert content(run_dir) == before
    resumed = Training(run_dir)
    resumed.restore()
    resumed.train()
    resumed.save()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_during_a_run(small_disk: Path) -> None:
    training = Training(small_disk / "run", keep=100)
    with pytest.raises(CheckpointError, match="No space left on device"):  # noqa: PT012
        for _ in range(100):
            training.train()
            training.save()
    resumed = Training(small_disk / "run", keep=1)
    resumed.restore()
    assert resumed.step == training.step - 1


def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    training = Training(small_disk / "run")
    training.train()
    training.save()
    (small_disk / "other").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    training.train()
    with pytest.raises(CheckpointError, match="Read-only file system"):
        training.save()
    other = Training(small_disk / "other")
    other.train()
    with pytest.raises(CheckpointError, match="Read-only file system"):
        other.save()


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    training = Training(tmp_path)
    training.train()
    with pytest.raises(CheckpointError, match=f"{tmp_path}/checkpoints.*: Not a directory"):
        training.save()


def drop_capabilities() -> None:
    """Let permissions apply to this thread, also if its user is root. See capset(2)."""
    version_3, this_thread = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version_3, this_thread)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


def save_without_permission(rank: int, world_size: int, port: int, run_dir: Path, out: Path) -> None:
    training = Training(run_dir)
    training.train()
    drop_capabilities()
    try:
        training.save()
    except CheckpointError as error:
        out.write_text(str(error))


@pytest.mark.skipif(sys.platform != "linux", reason="needs capset")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    assert in_children(save_without_permission, tmp_path / "run", tmp_path / "error") == [0]
    assert (tmp_path / "error").read_text().startswith(f"{tmp_path}/run/checkpoints: Permission denied.")


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_files_get_the_permissions_of_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        training = Training(tmp_path / "run")
        training.checkpoints.latest_complete()
        training.save()
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


# ---------------------------------------------------------------- kills


class Boundaries:
    """Every call that changes the disk; SIGKILL at the one of the given index, also inside a write."""

    def __init__(self, fatal: int) -> None:
        self.passed, self.fatal = 0, fatal

    def cross(self) -> None:
        if self.passed == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            self.cross()
            return function(*arguments, **keywords)

        return guarded

    @contextlib.contextmanager
    def open(self, *arguments: Any) -> Iterator[Any]:
        self.cross()
        with open(*arguments) as file:

            def in_two_parts(data: bytes) -> None:
                for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                    self.cross()
                    file.write(part)
                    file.flush()

            yield types.SimpleNamespace(write=in_two_parts, flush=file.flush, fileno=file.fileno)


def save_with_kills(rank: int, world_size: int, port: int, start: Path, again: bool) -> None:
    """Fork one process per boundary, in a copy of the run each, until one survives its save."""
    torch.set_num_threads(1)
    training = Training(start, keep=1)
    training.restore()
    training.train(0 if again else 1)
    generator = random.getstate()
    for fatal in itertools.count():
        run_dir = Path(shutil.copytree(start, start.with_name(str(fatal))))
        child = os.fork()
        if child == 0:
            random.setstate(generator)  # Python seeds it again after a fork
            training.checkpoints = CheckpointManager(run_dir, training.accelerator, keep=1)
            boundaries = Boundaries(fatal)
            for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
                setattr(os, name, boundaries.guard(getattr(os, name)))
            system.open = boundaries.open  # type: ignore[attr-defined]
            training.save()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            os._exit(status)


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_kill_at_every_write_boundary_leaves_a_complete_checkpoint(tmp_path: Path, again: bool) -> None:
    training = Training(tmp_path / "start", keep=1)
    training.train(2)
    training.save()
    before = training.everything()
    training.train(0 if again else 1)
    after = training.everything()
    assert in_children(save_with_kills, tmp_path / "start", again) == [0]
    resumed_steps = []
    for run_dir in sorted(tmp_path.glob("[0-9]*"), key=lambda path: int(path.name)):
        complete = [one for one in run_dir.glob("checkpoints/step_*") if not Checkpoint(one).find_problem()]
        assert complete, f"no complete checkpoint after a kill at boundary {run_dir.name}"
        resumed = Training(run_dir, keep=1)
        resumed.restore()
        resumed_steps.append(resumed.step)
        assert_same(resumed.everything(), before if resumed.step == 2 else after)
        assert all(name.removeprefix("step_").isdigit() for name in names(run_dir)), names(run_dir)
        resumed.train()
        resumed.save()
        assert program.verify(run_dir)
    # Of six files: opened, written twice, synced. Then the folder, its name, and the end of the old one.
    assert len(resumed_steps) > 4 * len(FILES) + 8
    if not again:
        assert resumed_steps == sorted(resumed_steps)
        assert set(resumed_steps) == {2, 3}


def test_everything_is_durable_before_it_counts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure may lose what was not synced: each name must come after what it names."""
    training = Training(run_dir, keep=1)
    training.restore()
    training.train()
    events: list[tuple[str, str]] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def record_sync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    def record_unlink(path: Any, **keywords: Any) -> None:
        events.append(("unlink", Path(path).name))
        unlink(path, **keywords)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "unlink", record_unlink)
    training.save()
    assert {name for _, name in events[:5]} == set(FILES) - {"manifest.json"}
    assert events[5:10] == [
        ("sync", "manifest.json"),
        ("sync", "step_00000003.partial"),
        ("rename", "step_00000003"),
        ("sync", "checkpoints"),
        ("rename", "step_00000002.old"),
    ]
    assert {kind for kind, _ in events[10:]} == {"unlink"}


# ---------------------------------------------------------------- several ranks


def join_group(rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    logging.basicConfig(level=logging.WARNING)


def save_in_group(rank: int, world_size: int, port: int, run_dir: Path, out: Path) -> None:
    join_group(rank, world_size, port)
    training = Training(run_dir)
    assert training.accelerator.num_processes == world_size
    assert training.checkpoints.latest_complete() is None
    training.train(2)
    training.save()
    training.train(2)
    np.save(out / f"whole-{rank}.npy", np.array(training.draw()))
    weights = training.accelerator.unwrap_model(training.network).state_dict()
    np.save(out / f"whole-weight-{rank}.npy", weights["0.weight"].numpy())


def restore_in_group(rank: int, world_size: int, port: int, run_dir: Path, out: Path) -> None:
    join_group(rank, world_size, port)
    training = Training(run_dir)
    training.restore()
    network = training.accelerator.unwrap_model(training.network)
    np.save(out / f"restored-{world_size}-{rank}.npy", network.state_dict()["0.weight"].numpy())
    state = torch.get_rng_state()
    np.save(out / f"drawn-{world_size}-{rank}.npy", np.array(training.draw()))
    training.restore()
    assert torch.equal(torch.get_rng_state(), state)  # derived states are the same each time
    if world_size == 2:
        training.train(2)
        np.save(out / f"resumed-{rank}.npy", np.array(training.draw()))
        np.save(out / f"resumed-weight-{rank}.npy", network.state_dict()["0.weight"].numpy())


def test_one_two_or_three_ranks_resume_a_run_of_two(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert in_children(save_in_group, run_dir, tmp_path, world_size=2) == [0, 0]
    saved = Checkpoint(step_dir(run_dir, 2))
    rows = saved.tensors("random")
    assert {name: len(row) for name, row in rows.items()} == {"torch": 2, "numpy": 2, "python": 2}
    assert all(not torch.equal(row[0], row[1]) for row in rows.values())
    weights = saved.tensors("model")["0.weight"]
    for world_size in (1, 2, 3):
        assert in_children(restore_in_group, run_dir, tmp_path, world_size=world_size) == [0] * world_size
        drawn = [np.load(tmp_path / f"drawn-{world_size}-{rank}.npy") for rank in range(world_size)]
        assert len({values.tobytes() for values in drawn}) == world_size
        for rank in range(world_size):
            restored = np.load(tmp_path / f"restored-{world_size}-{rank}.npy")
            assert np.array_equal(restored, weights.numpy())
    for one, other in (("drawn-1-0", "drawn-3-0"), ("drawn-2-1", "drawn-3-1")):
        assert np.array_equal(np.load(tmp_path / f"{one}.npy"), np.load(tmp_path / f"{other}.npy"))
    for rank, what in itertools.product(range(2), ("", "-weight")):
        whole, resumed = (np.load(tmp_path / f"{name}{what}-{rank}.npy") for name in ("whole", "resumed"))
        assert np.array_equal(whole, resumed)


def fail_in_group(rank: int, world_size: int, port: int, run_dir: Path, out: Path) -> None:
    join_group(rank, world_size, port)
    training = Training(run_dir)
    training.restore()
    training.train()

    def broken(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "/full")

    storage.write_checkpoint = broken  # called on the main process only
    training.save(wait=False)
    training.checkpoints.raise_write_error()  # does nothing: all ranks stop at the next save
    try:
        training.save()
    except UserError as error:
        (out / f"save-{rank}").write_text(f"{type(error).__name__}: {error}")
    flip(step_dir(run_dir, 1) / "model.safetensors") if rank == 0 else None
    try:
        training.checkpoints.latest_complete()
    except UserError as error:
        (out / f"latest-{rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


def test_an_error_of_the_main_process_is_raised_on_all_ranks(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.train()
    training.save()
    assert in_children(fail_in_group, tmp_path / "run", tmp_path, world_size=2) == [0, 0]
    for name, text in (("save", "No space left on device"), ("latest", "no complete checkpoint")):
        main, other = ((tmp_path / f"{name}-{rank}").read_text() for rank in range(2))
        assert main.startswith("CheckpointError")
        assert other.startswith("UserError")
        assert text in main
        assert text in other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generator_of_the_device_is_restored() -> None:
    device = torch.device("cuda")
    saved = tensors._generators(device)
    assert saved["cuda"].dtype == torch.uint8
    drawn = torch.rand(5, device=device)
    torch.rand(5, device=device)
    tensors._set_generators(saved, device)
    assert torch.equal(torch.rand(5, device=device), drawn)


# ---------------------------------------------------------------- the program


def test_verify_lists_the_checkpoints_and_never_writes(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    command = [sys.executable, "-m", "training.checkpoint", "verify", str(run_dir)]
    complete = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert complete.returncode == 0, complete.stderr
    lines = complete.stdout.splitlines()
    assert lines[1].split()[0:2] == ["step_00000001", "0"]
    assert lines[1].split()[3:] == ["0.700000", "complete"]
    assert lines[2].split()[3:] == ["-", "complete"]
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    truncate(step_dir(run_dir, 2) / "random.safetensors")
    assert program.main(["verify", str(run_dir)]) == 2
    assert "random.safetensors has" in capsys.readouterr().out


def test_verify_needs_a_complete_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not program.verify(tmp_path)
    assert f"0 complete, 0 damaged in {tmp_path}/checkpoints" in capsys.readouterr().out
    assert not program.verify(tmp_path / "absent")
    assert "no such folder" in capsys.readouterr().err
