"""Checkpoints are exact, complete or absent, and selected correctly after every kind of failure."""

from __future__ import annotations

import system
from system import UserError

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
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

from training.checkpoint import Checkpoint, CheckpointManager, list_checkpoints, select, storage, tensors
from training.checkpoint import __main__ as program
from training.config import Config

ROOT = Path(__file__).parents[1]
FILES = ["extra.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors"]
FILES += ["random.safetensors", "state.json"]
IDENTITY = {"path": "/data/cubes.h5", "bytes": 123, "seeds": [0, 2], "fingerprint": "a1"}


class Training:
    """A small training that uses everything a checkpoint must hold."""

    def __init__(self, run_dir: Path, *, keep: int = 2, **adam: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        network = nn.Sequential(*layers, nn.Linear(144, 1)).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, **adam)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        np.random.seed(20)
        random.seed(30)
        self.draw()  # after an even number of steps, the generators hold a second normal number
        self.step = 0
        self.open(run_dir, keep)

    def open(self, run_dir: Path, keep: int = 2, lr: float = 0.01) -> None:
        """Train the run in this folder, whatever was trained before."""
        model = {"architecture": "RACOON", "layer_param": 1, "dropout": 0.5, "name": run_dir.name}
        data = {"datafile": "/data/cubes.h5", "train_seeds": 2, "test_seeds": 1, "newton_augmentation": 1.0}
        train = {"epochs": 4, "lr": lr, "log_dir": str(run_dir.parent), "keep_checkpoints": keep}
        config = Config.model_validate({"model_params": model, "data_params": data, "train_params": train})
        self.run_dir, self.config = run_dir, config
        self.checkpoints = CheckpointManager(config, self.accelerator)

    def draw(self) -> list[float]:
        return [torch.rand(1).item(), np.random.standard_normal(), random.gauss(0, 1), random.random()]

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            images = torch.randn(3, 2, 8, 8) + sum(self.draw())
            self.optimizer.zero_grad()
            self.accelerator.backward(self.network(images).square().mean())
            self.optimizer.step()
            self.step += 1

    def counters(self, test_loss: float | None = None) -> dict[str, Any]:
        return {
            "epoch": 0,
            "target_epoch": 1,
            "stopped_early": False,
            "step": self.step,
            "step_in_epoch": self.step if test_loss is None else 0,
            "evaluation_pending": False,
            "test_loss": test_loss,
            "evaluations_without_improvement": 1,
        }

    def predictions(self) -> dict[str, torch.Tensor]:
        ids = torch.arange(self.step)
        return {"ids": ids, "logits": ids / 2} if self.step else {}

    def save(self, *, test_loss: float | None = None, wait: bool = True, **changes: Any) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        given = {"train_state": self.counters(test_loss), "predictions": self.predictions()} | changes
        self.checkpoints.save(self.network, self.optimizer, data_identity=IDENTITY, **given)
        if wait:
            self.checkpoints.close()

    def restore(self, identity: dict[str, Any] = IDENTITY) -> dict[str, torch.Tensor]:
        latest = self.checkpoints.latest_complete()
        assert latest is not None
        restored = self.checkpoints.restore(latest, self.network, self.optimizer, data_identity=identity)
        self.step = latest.step
        return restored

    def everything(self) -> dict[str, Any]:
        """All that must be equal for two trainings to be equal, random generators included."""
        state = {name: value.clone() for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"{name}/{key}"] = value.clone()
                assert key == "step" or value.stride() == parameter.stride()
        generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
        drawn = self.draw()
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])
        return state | {"drawn": torch.tensor(drawn, dtype=torch.float64)}


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


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
    (folder / "manifest.json").write_text(json.dumps({"files": entries}))


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    rewrite(folder, state=json.dumps(state).encode())


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with checkpoints of step 1 and 2, and the state at step 1."""
    training = Training(tmp_path_factory.mktemp("run"))
    training.train()
    training.save(test_loss=0.7)
    saved = training.everything()
    training.train()
    training.save()
    return training.run_dir, saved


@pytest.fixture
def run_dir(two_checkpoints: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_checkpoints[0], tmp_path / "run"))


# ---------------------------------------------------------------- save and restore


@pytest.mark.parametrize("steps", [0, 2, 3])
@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"amsgrad": True}], ids=["plain", "fused", "amsgrad"])
def test_a_restored_training_is_bit_exact(tmp_path: Path, adam: dict[str, Any], steps: int) -> None:
    whole = Training(tmp_path, **adam)
    whole.train(steps)
    whole.save()
    saved = whole.everything()
    whole.train(4)
    resumed = Training(tmp_path, **adam)
    resumed.train(1)  # is overwritten
    resumed.optimizer.param_groups[0]["lr"] = 0.123
    restored = resumed.restore()
    assert_same(resumed.everything(), saved)
    assert_same(restored, resumed.predictions())
    assert resumed.optimizer.param_groups[0]["lr"] == 0.123  # the trainer sets it at each step
    resumed.optimizer.param_groups[0]["lr"] = 1e-2
    resumed.train(4)
    assert_same(resumed.everything(), whole.everything())


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
    training.save(wait=False, train_state=counters, predictions=predictions)
    saved = training.everything()
    training.train(3)
    predictions["logits"].zero_()
    counters["epoch"] = 99
    may_write.set()
    training.checkpoints.close()
    resumed = Training(tmp_path)
    assert_same(resumed.restore(), expected)
    assert_same(resumed.everything(), saved)


def test_a_checkpoint_is_a_folder_of_safetensors_and_json(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train()
    training.save(test_loss=0.5)
    folder = step_dir(tmp_path, 1)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    saved = json.loads((folder / "state.json").read_text())
    assert saved["format"] == 2
    assert saved["train_state"] == training.counters(0.5)
    assert saved["data_identity"] == IDENTITY
    assert saved["config"] == training.config.to_dict()
    parameters = [name for name, _ in training.network.named_parameters()]
    moments = [f"{name}/{key}" for name in parameters for key in ("exp_avg", "exp_avg_sq", "step")]
    assert sorted(Checkpoint(folder).parts["optimizer"]) == sorted(moments)
    rows = {name: (row.dtype, len(row)) for name, row in Checkpoint(folder).parts["random"].items()}
    assert rows == dict.fromkeys(["torch", "numpy", "python"], (torch.uint8, 1))


def test_a_new_rank_gets_generators_that_its_seed_determines(run_dir: Path) -> None:
    """Ranks that the saved run had get theirs back; ranks beyond differ from one another."""
    training = Training(run_dir)
    parts, drawn = Checkpoint(step_dir(run_dir, 2)).parts, []
    for rank in (0, 1, 2, 1):
        accelerator = types.SimpleNamespace(
            process_index=rank, device=torch.device("cpu"), unwrap_model=lambda model: model
        )
        tensors.restore(parts, accelerator, training.network, training.optimizer, seed=5, step=2)
        drawn.append(training.draw())
    assert drawn[1] == drawn[3]
    assert len({str(numbers) for numbers in drawn}) == 3
    training.restore()
    assert training.draw() == drawn[0]


def test_each_file_of_the_restored_checkpoint_is_read_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, paths = Path.read_bytes, []

    def record(path: Path) -> bytes:
        paths.append(path)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", record)
    Training(run_dir).restore()
    assert sorted(paths) == [step_dir(run_dir, 2) / name for name in FILES]


def test_only_one_program_locks_a_run_and_no_empty_folder_remains(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    first, second = Training(run_dir).checkpoints, Training(run_dir).checkpoints
    first.acquire_lock()
    with pytest.raises(UserError, match="another program is training this run"):
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
    assert second.latest_complete() is None


# ---------------------------------------------------------------- formats


ADDED_LATER = {"power", "calibration", "waiting_seconds", "running_sums", "tracker_runs"}


def to_format_1(state: dict[str, Any]) -> None:
    """Rename the keys of state.json as the first version wrote them."""
    del state["format"]
    for name in ADDED_LATER:
        state["train_state"].pop(name, None)
    new_names = {new: old for old, new in storage.RENAMED_SINCE_FORMAT_1.items()}
    for section in (state["train_state"], state["environment"], state):
        for name in list(section):
            section[new_names.get(name, name)] = section.pop(name)


def test_format_1_is_read_as_format_2(run_dir: Path) -> None:
    folder = step_dir(run_dir, 2)
    expected = Checkpoint(folder).state
    rewrite_state(folder, to_format_1)
    raw = json.loads((folder / "state.json").read_text())
    assert {"progress", "identity", "circumstances"} < raw.keys()
    assert {"awaiting_test", "tests_without_better", "ended_early"} < raw["progress"].keys()
    assert Checkpoint(folder).state | {"format": 2} == expected
    assert program.verify(run_dir)


@pytest.mark.parametrize("suffix", ["", ".old"])
def test_a_newer_format_is_rejected_by_name_and_stays(
    run_dir: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = step_dir(run_dir, 2)
    rewrite_state(folder, lambda state: state.update(format=3, train_state={"unknown": 1}))
    shutil.copytree(step_dir(run_dir, 1), step_dir(run_dir, 3))
    flip(step_dir(run_dir, 3) / "model.safetensors")
    before = content(run_dir)
    folder.rename(folder.with_name(folder.name + suffix))
    with pytest.raises(UserError, match=r"state\.json has format 3.*Update the program") as error:
        Training(run_dir).checkpoints.latest_complete()
    assert str(folder) in str(error.value)
    assert content(run_dir) == before
    assert program.main(["verify", str(run_dir)]) == 2
    assert "1 complete, 2 unusable" in capsys.readouterr().out
    with pytest.raises(UserError, match="format 3"):
        select(run_dir / "checkpoints", "2")


# ---------------------------------------------------------------- damage


def test_a_storage_that_fails_does_not_make_checkpoints_damaged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(run_dir)

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Training(run_dir).checkpoints.latest_complete()
    assert names(run_dir) == before
    assert program.main(["verify", str(run_dir)]) == 2
    assert "Input/output error" in capsys.readouterr().out


@pytest.mark.parametrize(("owner", "function"), [(storage, "write_checkpoint"), (Checkpoint, "verify")])
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
    with pytest.raises(UserError, match=r"this folder, or its \.lock, was renamed or removed"):
        training.save()
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("damage", "name"),
    [(damage, "model.safetensors") for damage in (truncate, os.unlink)] + [(flip, name) for name in FILES],
)
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
    manifest, expected = (folder / "manifest.json").read_bytes(), Checkpoint(folder).files
    for position, bit in itertools.product(range(len(manifest)), range(8)):
        damaged = bytearray(manifest)
        damaged[position] ^= 1 << bit
        # In memory: thousands of writes take a minute on a busy disk.
        monkeypatch.setattr(Checkpoint, "_content", lambda self, name, content=damaged: bytes(content))
        with contextlib.suppress(ValueError, KeyError):
            assert Checkpoint(folder).files != expected, (position, bit)


@pytest.mark.parametrize(
    ("part", "changes", "cause"),
    [
        ("model", {"0.weight": torch.zeros(8, 2, 3, 3)}, "RuntimeError: .*size mismatch for 0.weight"),
        ("model", {"1.running_mean": None}, 'RuntimeError: .*Missing key.*"1.running_mean"'),
        ("optimizer", {"9.weight/exp_avg": torch.zeros(1)}, "KeyError: '9.weight'"),
        ("random", {"torch": torch.zeros(1, 16, dtype=torch.uint8)}, "RuntimeError: .* size 5056"),
        ("random", {"torch": None}, "KeyError: 'torch'"),
    ],
)
def test_whatever_fails_while_a_verified_checkpoint_is_restored_names_folder_and_cause(
    run_dir: Path, part: str, changes: dict[str, Any], cause: str
) -> None:
    folder = step_dir(run_dir, 2)
    changed = Checkpoint(folder).parts[part] | changes
    kept = {name: value for name, value in changed.items() if value is not None}
    rewrite(folder, **{part: safetensors.torch.save(kept)})
    with pytest.raises(UserError, match=f"(?s)^{folder}: cannot be restored by .*: {cause}"):
        Training(run_dir).restore()


def test_a_folder_under_the_name_of_another_step_is_damaged(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(step_dir(run_dir, 1), step_dir(run_dir, 10**30))
    assert not program.verify(run_dir)
    training = Training(run_dir)
    training.restore()
    assert training.step == 2
    assert f"step_{10**30} is damaged (state.json was saved at step 1)" in caplog.text
    assert names(run_dir)[2:] == [f"step_{10**30}.damaged"]


def test_a_run_with_damaged_checkpoints_only_never_starts_again(run_dir: Path) -> None:
    for step in (1, 2):
        flip(step_dir(run_dir, step) / "model.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match="no complete checkpoint is left") as error:
            Training(run_dir).checkpoints.latest_complete()
        assert "step_00000001: model.safetensors is not what was written" in str(error.value)
        assert "To start again, remove that folder" in str(error.value)
    for step in (1, 2):
        step_dir(run_dir, step).rename(f"{step_dir(run_dir, step)}.damaged")
    with pytest.raises(UserError, match="quarantined earlier"):
        Training(run_dir).checkpoints.latest_complete()


def test_only_a_renamed_checkpoint_counts_and_other_files_stay(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_dir / "checkpoints"
    for name in ("step_00000009.partial", "step_00000008.partial"):
        shutil.copytree(folder / "step_00000002", folder / name)
    truncate(folder / "step_00000009.partial" / "model.safetensors")
    shutil.copytree(folder / "step_00000001", folder / "step_00000001.old")  # was replaced
    (folder / "step_00000002").rename(folder / "step_00000002.old")  # being replaced
    (folder / "step_old").mkdir()
    (folder / "readme.txt").write_text("not ours")
    (folder / "step_00000001" / ".nfs0001").write_text("not ours")
    assert program.verify(run_dir)
    training = Training(run_dir)
    training.restore()
    assert training.step == 2
    assert names(run_dir) == ["readme.txt", "step_00000001", "step_00000002", "step_old"]
    for name in ("step_00000009.partial", "step_00000008.partial", "step_00000001.old"):
        assert f"{name} was being written or deleted" in caplog.text


# ---------------------------------------------------------------- what must not be restored or saved


def test_other_settings_are_refused_before_anything_is_changed(run_dir: Path) -> None:
    shutil.copytree(step_dir(run_dir, 1), step_dir(run_dir, 3))  # damaged
    before = content(run_dir)
    training = Training(run_dir)
    training.open(run_dir, lr=0.5)
    with pytest.raises(UserError, match=r"train_params\.lr: the run has 0\.01, this experiment 0\.5"):
        training.checkpoints.latest_complete()
    assert content(run_dir) == before


def test_other_data_are_refused_but_data_may_move(run_dir: Path) -> None:
    training = Training(run_dir)
    with pytest.raises(UserError) as error:
        training.restore(IDENTITY | {"path": "/moved.h5", "seeds": [0, 3], "fingerprint": "b2"})
    assert "data_params.datafile.fingerprint: was 'a1', is 'b2'" in str(error.value)
    assert "data_params.datafile.seeds: was [0, 2], is [0, 3]" in str(error.value)
    assert "another model_params.name" in str(error.value)
    assert "path" not in str(error.value)
    training.restore(IDENTITY | {"path": "/moved.h5", "bytes": 9, "seeds": (0, 2)})
    assert training.step == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(run_dir: Path, value: float) -> None:
    training = Training(run_dir)
    training.restore()
    before = content(run_dir)
    training.train()
    with torch.no_grad():
        training.network[0].weight[1, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"step 3 is not saved: 0\.weight not finite") as error:
        training.save()
    assert "step_00000002 is unchanged" in str(error.value)
    assert content(run_dir) == before


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


def test_what_the_result_depends_on_is_compared(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    Training(run_dir).restore()
    assert not caplog.text
    torch.set_num_threads(2)
    Training(run_dir).restore()
    (message,) = caplog.messages
    assert message.endswith("results may differ from here on: cpu_threads: was 1, is 2")
    caplog.clear()
    others = {"cpu_threads": 2, "cpu_capability": "OLD", "cpu": "Z80", "torch": "1.0", "code": "0"}
    rewrite_state(step_dir(run_dir, 2), lambda state: state["environment"].update(others))
    Training(run_dir).restore()
    (message,) = caplog.messages
    for part in ("cpu_capability: was 'OLD', is", "cpu: was 'Z80'", "torch: was '1.0'", "code: was '0', is"):
        assert part in message
    assert "threads" not in message
    caplog.clear()

    def by_an_older_version(state: dict[str, Any]) -> None:
        old = ("num_processes", "device", "python", "accelerate")
        state["environment"] = {key: state["environment"][key] for key in old}

    rewrite_state(step_dir(run_dir, 2), by_an_older_version)
    Training(run_dir).restore()
    assert not caplog.text


# ---------------------------------------------------------------- rotation and selection


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, keep=2)
    kept = []
    for loss in (0.9, 0.3, None, 0.5, None, 0.3, 0.2, 0.4):
        training.train()
        training.save(test_loss=loss)
        kept.append([int(name[-1]) for name in names(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7], [7, 8]]
    assert program.verify(tmp_path)


def test_a_checkpoint_is_selected_by_name(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [1, 2]
    assert [select(folder, name).step for name in ("best", "last", "1", "2")] == [1, 2, 1, 2]
    with pytest.raises(UserError, match=r"found no checkpoint '7', allowed: 1, 2, last, best"):
        select(folder, "7")
    with pytest.raises(UserError, match="found no checkpoint 'last', allowed: none"):
        select(run_dir, "last")
    flip(step_dir(run_dir, 1) / "state.json")
    for name in ("best", "1"):
        with pytest.raises(UserError, match=r"step_00000001: state\.json is not.* by its step"):
            select(folder, name)
    assert [select(folder, name).step for name in ("last", "2")] == [2, 2]


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
    with pytest.raises(UserError, match=r"cannot be read back: optimizer\.safetensors"):
        training.save()
    assert content(run_dir) == before


# ---------------------------------------------------------------- disks and permissions


def test_an_error_in_the_background_is_raised_by_every_method(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(run_dir)
    training.restore()
    assert training.checkpoints.minutes_since_save < 1
    training.train()

    def broken(*arguments: Any) -> None:
        raise OSError(122, "Disk quota exceeded", "/quota/model.safetensors")

    monkeypatch.setattr(storage, "write_checkpoint", broken)
    training.save(wait=False)
    for method in (training.checkpoints.close, training.checkpoints.wait, training.save):
        with pytest.raises(UserError, match=r"/quota/model\.safetensors: Disk quota exceeded") as error:
            method()
        assert "step_00000002 is unchanged" in str(error.value)
    assert training.checkpoints.minutes_since_save == float("inf")


def test_a_disk_that_fills_up_and_becomes_read_only(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(tmp_path)]
    if (mounted := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        training = Training(tmp_path / "run", keep=100)
        with pytest.raises(UserError, match="No space left on device"):  # noqa: PT012
            for _ in range(100):
                training.train()
                training.save()
        resumed = Training(tmp_path / "run", keep=1)
        resumed.restore()
        assert resumed.step == training.step - 1
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        resumed.train()
        with pytest.raises(UserError, match="Read-only file system"):
            resumed.save()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


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
    """Every call that changes the disk, in order; SIGKILL at the one of the given index, also in a write."""

    def __init__(self, fatal: int = -1) -> None:
        self.passed: list[tuple[str, str]] = []
        self.fatal = fatal
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.guard(name, getattr(os, name)))
        system.open = self.open  # type: ignore[attr-defined]

    def cross(self, kind: str, path: Any) -> None:
        if len(self.passed) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append((kind, Path(path).name))

    def guard(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            path = arguments[1] if kind == "rename" else arguments[0]
            self.cross(kind, os.readlink(f"/proc/self/fd/{path}") if kind == "fsync" else path)
            return function(*arguments, **keywords)

        return guarded

    @contextlib.contextmanager
    def open(self, path: Path, mode: str) -> Iterator[Any]:
        self.cross("open", path)
        with open(path, mode) as file:

            def in_two_parts(data: bytes) -> None:
                for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                    self.cross("write", path)
                    file.write(part)
                    file.flush()

            yield types.SimpleNamespace(write=in_two_parts, flush=file.flush, fileno=file.fileno)


def in_fork(work: Callable[[], None]) -> int:
    """Call `work` in a fork of this process; returns its exit code."""
    generator = random.getstate()
    if (child := os.fork()) == 0:
        status = 1
        try:
            random.setstate(generator)  # Python seeds it again after a fork
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_kill_at_every_write_boundary_leaves_a_complete_checkpoint(tmp_path: Path, again: bool) -> None:
    training, start = Training(tmp_path / "start", keep=1), tmp_path / "start"
    training.train(2)
    training.save()
    before = training.everything()
    training.train(0 if again else 1)
    after = training.everything()

    def save_until(fatal: int) -> None:
        training.open(run_dirs[fatal], keep=1)
        Boundaries(fatal)
        training.save()

    run_dirs: list[Path] = []
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        run_dirs.append(shutil.copytree(start, tmp_path / str(len(run_dirs))))
        status = in_fork(lambda: save_until(len(run_dirs) - 1))
    assert status == 0
    resumed_steps = []
    for run_dir in run_dirs:
        folders = run_dir.glob("checkpoints/step_*")
        complete = [folder for folder in folders if Checkpoint(folder).find_problem() is None]
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


def test_everything_is_durable_before_it_counts(run_dir: Path) -> None:
    """A power failure may lose what was not synced: each name must come after what it names."""
    training = Training(run_dir, keep=1)
    training.restore()
    training.train()

    def save() -> None:
        boundaries = Boundaries()
        training.save()
        (run_dir / "passed").write_text(json.dumps(boundaries.passed))

    assert in_fork(save) == 0
    passed = [tuple(entry) for entry in json.loads((run_dir / "passed").read_text())]
    order = [entry for entry in passed if entry[0] in ("fsync", "rename", "unlink")]
    assert {name for _, name in order[:5]} == set(FILES) - {"manifest.json"}
    assert order[5:10] == [
        ("fsync", "manifest.json"),
        ("fsync", "step_00000003.partial"),
        ("rename", "step_00000003"),
        ("fsync", "checkpoints"),
        ("rename", "step_00000002.partial"),
    ]
    assert {kind for kind, _ in order[10:]} == {"unlink"}


# ---------------------------------------------------------------- the program


def test_verify_lists_the_checkpoints_and_never_writes(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert not program.verify(tmp_path)
    assert f"0 complete, 0 unusable in {tmp_path}/checkpoints" in capsys.readouterr().out
    assert not program.verify(tmp_path / "absent")
    assert "no such folder" in capsys.readouterr().err
