"""The state of a run on disk: exact, complete or not there, and well chosen whatever happened."""

from __future__ import annotations

import contextlib
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
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import state.folder
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import checkpoint as program
from checkpoint import Checkpoint, CheckpointError, CheckpointManager

ROOT = Path(program.__file__).parent
FILES = ["extra.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors"]
FILES += ["random.safetensors", "state.json"]
# Children are forked from a server that has imported torch: each costs milliseconds instead of seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "accelerate", "safetensors.torch", "pytest"])


IDENTITY = {"architecture": "SMALL", "data": {"path": "/data/cubes.h5", "seeds": [0, 1], "hash": "a1"}}


class Training:
    """A small training that uses everything a checkpoint must hold."""

    def __init__(self, run: Path, *, keep: int = 2, width: int = 4, **adam: Any) -> None:
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
        process = self.accelerator.process_index
        torch.manual_seed(10 + process)
        np.random.seed(20 + process)
        random.seed(30 + process)
        self.draw()  # after an even number of steps, normal numbers lie in store
        self.step = 0
        self.checkpoints = CheckpointManager(run, self.accelerator, keep=keep)

    def draw(self) -> list[float]:
        return [torch.rand(1).item(), np.random.standard_normal(), random.gauss(0, 1), random.random()]

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            images = torch.randn(3, 2, 8, 8) + sum(self.draw())
            self.optimizer.zero_grad()
            self.accelerator.backward(self.network(images).square().mean())
            self.optimizer.step()
            self.step += 1

    def save(self, *, test_loss: float | None = None, wait: bool = True, **changes: Any) -> None:
        given = {
            "progress": {"step": self.step, "epoch": 3, "best_loss": 0.1},
            "tensors": {"logits": torch.arange(self.step, dtype=torch.float32)},
            "config": {"train_params": {"lr": 0.01}},
            "identity": IDENTITY,
        }
        self.checkpoints.save(self.network, self.optimizer, test_loss=test_loss, **(given | changes))
        if wait:
            self.checkpoints.close()

    def restore(self, **changes: Any) -> dict[str, torch.Tensor]:
        latest = self.checkpoints.latest()
        assert latest is not None
        given = {"identity": IDENTITY, "seed": 5} | changes
        tensors = self.checkpoints.restore(latest, self.network, self.optimizer, **given)
        self.step = latest.progress["step"]
        assert latest.progress == {"step": self.step, "epoch": 3, "best_loss": 0.1}
        return tensors

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


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_children(target: Callable[..., None], *arguments: Any, number: int = 1) -> list[int | None]:
    """Run `target(process, number, port, *arguments)` in new processes; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [PROCESSES.Process(target=target, args=(i, number, port, *arguments)) for i in range(number)]
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


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"amsgrad": True}], ids=["plain", "fused", "amsgrad"])
def test_a_restored_training_goes_on_bit_for_bit(tmp_path: Path, adam: dict[str, Any], steps: int) -> None:
    whole = Training(tmp_path, **adam)
    whole.train(steps)
    whole.save()
    saved = whole.everything()
    whole.train(4)
    resumed = Training(tmp_path, **adam)
    resumed.train(1)  # whatever it did before is forgotten
    tensors = resumed.restore()
    assert_same(resumed.everything(), saved)
    assert_same(tensors, {"logits": torch.arange(steps, dtype=torch.float32)})
    resumed.train(4)
    assert_same(resumed.everything(), whole.everything())


def test_a_checkpoint_before_the_first_step_restores(tmp_path: Path) -> None:
    Training(tmp_path).save()
    resumed = Training(tmp_path)
    resumed.restore()
    assert resumed.optimizer.state_dict()["state"] == {}
    resumed.train()


def test_a_run_is_claimed_by_one_program_and_leaves_no_empty_folder(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    first, second = Training(run).checkpoints, Training(run).checkpoints
    first.acquire_lock()
    with pytest.raises(CheckpointError, match="another program is training this run"):
        second.acquire_lock()
    second.close()
    assert run.is_dir()
    first.close()
    assert not run.parent.exists()
    second.acquire_lock()
    (run / "config.yaml").touch()
    second.close()
    first.acquire_lock()
    first.close()
    assert (run / "config.yaml").exists()


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert Training(tmp_path / "new").checkpoints.latest() is None


def test_the_optimizer_keeps_its_own_settings(tmp_path: Path) -> None:
    first = Training(tmp_path)
    first.train()
    first.save()
    second = Training(tmp_path)
    second.optimizer.param_groups[0]["lr"] = 0.123
    second.restore()
    assert second.optimizer.param_groups[0]["lr"] == 0.123


def test_training_goes_on_while_the_exact_state_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path)
    training.train(2)
    may_write, original = threading.Event(), state.folder.write

    def late(*arguments: Any) -> None:
        may_write.wait()
        original(*arguments)

    monkeypatch.setattr(state, "write", late)
    progress = {"step": 2, "epoch": 3, "best_loss": 0.1}
    logits = torch.arange(2.0)
    training.save(wait=False, progress=progress, tensors={"logits": logits})
    saved = training.everything()
    training.train(3)
    logits.zero_()
    progress["epoch"] = 99
    may_write.set()
    training.checkpoints.close()
    resumed = Training(tmp_path)
    assert_same(resumed.restore(), {"logits": torch.arange(2.0)})
    assert_same(resumed.everything(), saved)


def test_compiled_and_plain_networks_share_their_checkpoints(tmp_path: Path) -> None:
    plain = Training(tmp_path)
    plain.train(2)
    plain.save()
    compiled = Training(tmp_path)
    compiled.network = torch.compile(compiled.network)
    compiled.restore()
    compiled.save()
    names = Checkpoint(tmp_path / "checkpoints" / "step_00000002").tensors("model")
    assert names.keys() == plain.network.state_dict().keys()


def test_a_checkpoint_is_a_folder_of_safetensors_and_json(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train()
    training.save(test_loss=0.5)
    folder = tmp_path / "checkpoints" / "step_00000001"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    saved = json.loads((folder / "state.json").read_text())
    assert saved["circumstances"].keys() == {"processes", "device", "python", "torch", "accelerate"}
    assert saved["circumstances"]["torch"] == torch.__version__
    assert saved["test_loss"] == 0.5
    assert saved["identity"] == IDENTITY
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
    latest = training.checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.config) == (1, {"train_params": {"lr": 0.01}})
    assert latest.progress["epoch"] == 3


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


# ---------------------------------------------------------------- damage


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with checkpoints of step 1 and 2, and the state at step 1."""
    run = tmp_path_factory.mktemp("run")
    training = Training(run)
    training.train()
    training.save(test_loss=0.7)
    saved = training.everything()
    training.train()
    training.save()
    return run, saved


@pytest.fixture
def run(two_checkpoints: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_checkpoints[0], tmp_path / "run"))


@pytest.mark.parametrize("damage", [flip, truncate, empty, os.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_taken(
    run: Path,
    two_checkpoints: tuple[Path, dict[str, Any]],
    name: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(run / "checkpoints" / "step_00000002" / name)
    assert not program.verify(run)
    training = Training(run)
    training.restore()
    assert training.step == 1
    assert_same(training.everything(), two_checkpoints[1])
    assert steps(run) == ["step_00000001", "step_00000002.damaged"]
    assert "step_00000002" in caplog.text
    assert name in caplog.text
    training.train()
    training.save()  # the same step again, under its own name
    assert steps(run) == ["step_00000001", "step_00000002", "step_00000002.damaged"]
    assert program.verify(run)
    damage(run / "checkpoints" / "step_00000002" / name)
    Training(run).restore()
    assert steps(run)[1:] == ["step_00000002.damaged", "step_00000002.damaged-again"]


def test_any_flipped_bit_of_the_manifest_is_seen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / "checkpoints" / "step_00000002"
    manifest = (folder / "manifest.json").read_bytes()
    assert Checkpoint(folder).files
    for position in range(len(manifest)):
        for bit in range(8):
            damaged = bytearray(manifest)
            damaged[position] ^= 1 << bit
            # On disk this takes a minute where others write too.
            monkeypatch.setattr(Checkpoint, "_content", lambda self, name, content=damaged: bytes(content))
            with pytest.raises(CheckpointError, match=r"manifest\.json is not what was written"):
                assert Checkpoint(folder).files


def test_a_foreign_file_is_ignored_and_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / "step_00000002" / ".nfs0001").write_text("not ours")
    (run / "checkpoints" / "step_00000002" / "notes").mkdir()
    (run / "checkpoints" / "step_old").mkdir()
    (run / "checkpoints" / "readme.txt").write_text("not ours either")
    assert program.verify(run)
    training = Training(run, keep=1)
    training.restore()
    assert training.step == 2
    assert ".nfs0001, notes" in caplog.text
    training.train()
    training.save()
    assert steps(run) == ["readme.txt", "step_00000001", "step_00000003", "step_old"]


def test_with_damaged_checkpoints_only_a_run_never_begins_anew(run: Path) -> None:
    for step in (1, 2):
        flip(run / "checkpoints" / f"step_0000000{step}" / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no complete checkpoint is left") as error:
            Training(run).checkpoints.latest()
        assert "step_00000001: model.safetensors is not what was written" in str(error.value)
        assert "to begin anew, remove that folder" in str(error.value)
    for step in (1, 2):
        folder = run / "checkpoints" / f"step_0000000{step}"
        folder.rename(folder.with_name(folder.name + ".damaged"))
    with pytest.raises(CheckpointError, match="set aside earlier"):
        Training(run).checkpoints.latest()


def test_damage_after_the_choice_is_an_error_too(run: Path) -> None:
    training = Training(run)
    latest = training.checkpoints.latest()
    assert latest is not None
    before = training.everything()
    flip(latest.folder / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is not what was written"):
        training.checkpoints.restore(latest, training.network, training.optimizer, identity=IDENTITY, seed=0)
    assert_same(training.everything(), before)


def test_only_what_got_its_name_counts(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / "step_00000009.partial")
    truncate(folder / "step_00000009.partial" / "model.safetensors")
    shutil.copytree(folder / "step_00000002", folder / "step_00000008.partial")  # whole, and yet not named
    shutil.copytree(folder / "step_00000001", folder / "step_00000001.old")  # being deleted
    (folder / "step_00000002").rename(folder / "step_00000002.old")  # being replaced
    assert program.verify(run)
    training = Training(run)
    training.restore()
    assert training.step == 2
    assert steps(run) == ["step_00000001", "step_00000002"]
    assert "step_00000009.partial was being written when the run ended" in caplog.text
    assert "step_00000008.partial was being written when the run ended" in caplog.text


# ---------------------------------------------------------------- what must not be restored


def test_another_network_or_other_data_is_refused_and_nothing_is_changed(run: Path) -> None:
    training = Training(run, width=8)
    before = training.everything()
    with pytest.raises(CheckpointError) as error:
        training.restore(
            identity={"architecture": "WIDE", "data": {"path": "/moved.h5", "seeds": [0, 1, 2], "hash": "a1"}}
        )
    assert "architecture: was 'SMALL', is 'WIDE'" in str(error.value)
    assert "data.seeds: was [0, 1], is [0, 1, 2]" in str(error.value)
    assert "0.weight: saved as [4, 2, 3, 3] torch.float32, now [8, 2, 3, 3] torch.float32" in str(error.value)
    assert "another model_params.name" in str(error.value)
    assert "hash" not in str(error.value)
    assert_same(training.everything(), before)


def test_data_may_move_and_tuples_are_lists(run: Path) -> None:
    training = Training(run)
    training.restore(
        identity={"architecture": "SMALL", "data": {"path": "/moved.h5", "seeds": (0, 1), "hash": "a1"}}
    )
    assert training.step == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(run: Path, value: float) -> None:
    training = Training(run)
    training.restore()
    before = content(run)
    training.train()
    with torch.no_grad():
        training.network[0].weight[1, 0, 0, 0] = value
    with pytest.raises(
        CheckpointError, match=r"step 3 is not saved, these are not finite: 0\.weight"
    ) as error:
        training.save()
    assert "step_00000002 is untouched" in str(error.value)
    assert content(run) == before


def test_a_state_split_over_processes_is_refused(tmp_path: Path) -> None:
    class Sharded:
        distributed_type = type("Kind", (), {"value": "FSDP"})

    with pytest.raises(CheckpointError, match="distributed_type FSDP"):
        CheckpointManager(tmp_path, Sharded(), keep=1)


def test_the_gradient_scaler_goes_on(tmp_path: Path) -> None:
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


def test_other_circumstances_are_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run / "checkpoints" / "step_00000002"
    saved = json.loads((folder / "state.json").read_text())
    saved["circumstances"]["torch"] = "1.0"
    parts = {part: Checkpoint(folder).tensors(part) for part in ("model", "optimizer", "random", "extra")}
    state.write(folder, parts, json.dumps(saved).encode())
    Training(run).restore()
    assert f"torch: was '1.0', is '{torch.__version__}'" in caplog.text


# ---------------------------------------------------------------- rotation


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, keep=2)
    kept = []
    for loss in (0.9, 0.3, float("nan"), 0.5, None, 0.3, 0.2, 0.4):
        training.train()
        training.save(test_loss=loss)
        kept.append([int(name[-1]) for name in steps(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7][1:], [7, 8]]
    assert program.verify(tmp_path)


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train()
    training.save()
    training.save(test_loss=0.5)
    assert steps(tmp_path) == ["step_00000001"]
    assert Checkpoint(tmp_path / "checkpoints" / "step_00000001").state["test_loss"] == 0.5


def test_old_ones_stay_if_the_new_one_cannot_be_read_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(run, keep=1)
    training.restore()
    before = content(run)
    training.train()
    write = state.folder._write_file

    def bad_disk(path: Path, data: bytes) -> dict[str, Any]:
        result = write(path, data)
        if path.name == "optimizer.safetensors":
            flip(path)
        return result

    monkeypatch.setattr(state.folder, "_write_file", bad_disk)
    with pytest.raises(
        CheckpointError, match=r"cannot be read back as it was written: optimizer\.safetensors"
    ):
        training.save()
    assert content(run) == before


# ---------------------------------------------------------------- disks and permissions


def test_an_error_in_the_background_surfaces_everywhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(run)
    training.restore()
    training.checkpoints.check()
    assert training.checkpoints.minutes < 1
    training.train()

    def broken(*arguments: Any) -> None:
        raise OSError(122, "Disk quota exceeded", "/quota/model.safetensors")

    monkeypatch.setattr(state, "write", broken)
    training.save(wait=False)
    for surface in (training.checkpoints.close, training.checkpoints.check, training.save):
        with pytest.raises(CheckpointError, match=r"/quota/model\.safetensors: Disk quota exceeded") as error:
            surface()
        assert "step_00000002 is untouched" in str(error.value)
    assert training.checkpoints.minutes == float("inf")


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(run: Path) -> None:
    training = Training(run)
    training.restore()
    before = content(run)
    training.train()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the weights, not for the moments.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"partial/optimizer\.safetensors: File too large") as error:
            training.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_00000002 is untouched" in str(error.value)
    assert content(run) == before
    assert steps(run) == ["step_00000001", "step_00000002"]
    resumed = Training(run)
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


def test_a_disk_that_fills_up_over_a_run(small_disk: Path) -> None:
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


def save_as_nobody(process: int, number: int, port: int, run: str) -> None:
    training = Training(Path(run))
    training.train()
    os.setuid(65534)
    try:
        training.save()
    except CheckpointError as error:
        os._exit(7 if "Permission denied" in str(error) and "none" not in str(error) else 1)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without permissions")
def test_a_folder_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        assert in_children(save_as_nobody, folder) == [7]


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_files_get_the_permissions_of_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        training = Training(tmp_path / "run")
        training.checkpoints.latest()
        training.save()
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


# ---------------------------------------------------------------- kills


class Boundaries:
    """Every call that changes the disk; SIGKILL at the one of the given number, also inside a write."""

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


def save_and_die(process: int, number: int, port: int, run: str, fatal: int, again: bool) -> None:
    torch.set_num_threads(1)
    training = Training(Path(run), keep=1)
    training.restore()
    training.train(0 if again else 1)
    boundaries = Boundaries(fatal)
    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, boundaries.guard(getattr(os, name)))
    state.folder.open = boundaries.open
    training.save()
    os._exit(0)


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_kill_at_every_write_boundary_leaves_a_complete_checkpoint(tmp_path: Path, again: bool) -> None:
    start = tmp_path / "start"
    training = Training(start, keep=1)
    training.train(2)
    training.save()
    before = training.everything()
    training.train(0 if again else 1)
    after = training.everything()
    outcomes = []
    for fatal in range(1000):
        run = Path(shutil.copytree(start, tmp_path / str(fatal)))
        [code] = in_children(save_and_die, str(run), fatal, again)
        complete = [
            path for path in run.glob("checkpoints/step_*") if Checkpoint(path).find_problem() is None
        ]
        assert complete, f"no complete checkpoint after a kill at boundary {fatal}"
        resumed = Training(run, keep=1)
        resumed.restore()
        assert_same(resumed.everything(), before if resumed.step == 2 else after)
        assert all(name.removeprefix("step_").isdigit() for name in steps(run)), steps(run)
        resumed.train()
        resumed.save()
        assert program.verify(run)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        outcomes.append(resumed.step - 1)
    # Files: opened, two writes, synced. Then the folder, its name, and the old one's end.
    assert len(outcomes) > 4 * len(FILES) + 8
    if not again:
        assert outcomes == sorted(outcomes)
        assert set(outcomes) == {2, 3}


def test_everything_is_durable_before_it_counts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may lose what was not synced: each name must come after what it names."""
    training = Training(run, keep=1)
    training.restore()
    training.train()
    events: list[tuple[str, str]] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def note_sync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_rename(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    def note_unlink(path: Any, **keywords: Any) -> None:
        events.append(("unlink", Path(path).name))
        unlink(path, **keywords)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(os, "unlink", note_unlink)
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


# ---------------------------------------------------------------- several processes


def join_world(process: int, number: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    logging.basicConfig(level=logging.WARNING)


def save_in_world(process: int, number: int, port: int, run: str, out: str) -> None:
    join_world(process, number, port)
    training = Training(Path(run))
    assert training.accelerator.num_processes == number
    assert training.checkpoints.latest() is None
    training.train(2)
    training.save()
    training.train(2)
    np.save(f"{out}/whole-{process}.npy", np.array(training.draw()))
    weights = training.accelerator.unwrap_model(training.network).state_dict()
    np.save(f"{out}/whole-weight-{process}.npy", weights["0.weight"].numpy())


def restore_in_world(process: int, number: int, port: int, run: str, out: str) -> None:
    join_world(process, number, port)
    training = Training(Path(run))
    training.restore()
    network = training.accelerator.unwrap_model(training.network)
    np.save(f"{out}/restored-{number}-{process}.npy", network.state_dict()["0.weight"].numpy())
    state = torch.get_rng_state()
    np.save(f"{out}/drawn-{number}-{process}.npy", np.array(training.draw()))
    if number == 2:
        training.restore()
        assert torch.equal(torch.get_rng_state(), state)
        training.train(2)
        np.save(f"{out}/resumed-{process}.npy", np.array(training.draw()))
        np.save(f"{out}/resumed-weight-{process}.npy", network.state_dict()["0.weight"].numpy())


def test_two_processes_save_and_one_two_or_three_go_on(tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path)
    assert in_children(save_in_world, run, out, number=2) == [0, 0]
    rows = Checkpoint(tmp_path / "run" / "checkpoints" / "step_00000002").tensors("random")
    assert {name: len(row) for name, row in rows.items()} == {"torch": 2, "numpy": 2, "python": 2}
    assert all(not torch.equal(row[0], row[1]) for row in rows.values())
    weights = Checkpoint(tmp_path / "run" / "checkpoints" / "step_00000002").tensors("model")["0.weight"]
    for number in (1, 2, 3):
        for attempt in range(2):  # derived states are the same each time
            assert in_children(restore_in_world, run, out, number=number) == [0] * number
            drawn = [np.load(f"{out}/drawn-{number}-{process}.npy") for process in range(number)]
            if attempt == 0:
                first = drawn
        assert np.array_equal(first, drawn)
        assert len({values.tobytes() for values in drawn}) == number
        for process in range(number):
            assert np.array_equal(np.load(f"{out}/restored-{number}-{process}.npy"), weights.numpy())
    assert np.array_equal(np.load(f"{out}/drawn-1-0.npy"), np.load(f"{out}/drawn-3-0.npy"))
    assert np.array_equal(np.load(f"{out}/drawn-2-1.npy"), np.load(f"{out}/drawn-3-1.npy"))
    for process in range(2):
        for what in ("", "-weight"):
            whole, resumed = (np.load(f"{out}/{name}{what}-{process}.npy") for name in ("whole", "resumed"))
            assert np.array_equal(whole, resumed)


def fail_in_world(process: int, number: int, port: int, run: str) -> None:
    join_world(process, number, port)
    training = Training(Path(run))
    training.restore()
    training.train()

    def broken(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "/full")

    state.write = broken  # called on the main process alone
    training.save(wait=False)
    training.checkpoints.check()  # several processes stop together, at the next save
    try:
        training.save()
    except CheckpointError as error:
        os._exit(10 + ("No space left on device" in str(error)))


def choose_in_world(process: int, number: int, port: int, run: str) -> None:
    join_world(process, number, port)
    try:
        Training(Path(run)).checkpoints.latest()
    except CheckpointError as error:
        os._exit(10 + ("no complete checkpoint" in str(error)))


def test_an_error_of_the_main_process_stops_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = Training(run)
    training.train()
    training.save()
    assert in_children(fail_in_world, str(run), number=2) == [11, 10]
    flip(run / "checkpoints" / "step_00000001" / "model.safetensors")
    assert in_children(choose_in_world, str(run), number=2) == [11, 10]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generator_of_the_device_goes_on() -> None:
    device = torch.device("cuda")
    saved = state.tensors._generators(device)
    assert saved["cuda"].dtype == torch.uint8
    drawn = torch.rand(5, device=device)
    torch.rand(5, device=device)
    state.tensors._set_generators(saved, device)
    assert torch.equal(torch.rand(5, device=device), drawn)


# ---------------------------------------------------------------- the program


def test_verify_lists_the_checkpoints_and_never_writes(run: Path) -> None:
    folder = run / "checkpoints"
    command = [sys.executable, str(ROOT / "checkpoint.py"), "verify", str(run)]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    good = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert good.returncode == 0, good.stderr
    lines = good.stdout.splitlines()
    assert lines[1].split()[0:2] == ["step_00000001", "3"]
    assert lines[1].split()[3:] == ["0.700000", "complete"]
    assert lines[2].split()[3:] == ["-", "complete"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    truncate(folder / "step_00000002" / "random.safetensors")
    bad = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert bad.returncode == 2
    assert "random.safetensors has" in bad.stdout


def test_verify_needs_a_complete_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not program.verify(tmp_path)
    assert f"0 complete, 0 damaged in {tmp_path}/checkpoints" in capsys.readouterr().out
