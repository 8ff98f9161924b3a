"""The checkpoints of a run: when they are written, which one is resumed, how many are kept.

    LOG_DIR/NAME/checkpoints/step_00001234/
        model.safetensors      weights and buffers
        optimizer.safetensors  Adam's moments and step counts
        random.safetensors     every random generator of every rank
        extra.safetensors      predictions of the running epoch
        state.json             counters, settings, data identity, gradient scaler, versions
        manifest.json          size and SHA-256 of each of these, written last

`python -m training.checkpoint verify LOG_DIR/NAME` lists them with their problems, and never writes.
"""

from __future__ import annotations

from system import UserError

import fcntl
import json
import logging
import math
import os
import platform
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn

from training import distributed
from training.checkpoint import storage, tensors
from training.checkpoint.storage import Checkpoint
from training.config import Config, check_same_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCK = ".lock"  # held while a program trains the run; it has no content
logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run. `latest_complete`, `restore` and `save` are collective."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        """Keep the newest checkpoints, `keep_checkpoints` of them, and the one with the lowest test loss."""
        self._config, self._accelerator = config, accelerator
        self._run_dir, self._folder = config.run_dir, config.run_dir / "checkpoints"
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at = time.monotonic()
        self._lock: TextIO | None = None
        self._created: list[Path] = []
        self.saved_step = -1
        """Step of the last checkpoint that this process has written to disk."""

    def acquire_lock(self) -> None:
        """Prevent other programs from training this run until `close`.

        The main process calls this before anything else of the run is read or written. It creates the folder
        of the run, which `close` removes if it is still empty. A file system without locks is only logged.
        Raises UserError if another program holds the lock.
        """
        run_dir = self._run_dir
        self._created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = self._holds_run_dir(lock)
        except BlockingIOError:
            locked = False
        except OSError:
            logger.info("%s cannot be locked: do not start a second program on this run", run_dir)
            locked = True
        if not locked:
            lock.close()
            raise UserError(
                f"{run_dir}: another program is training this run.\n"
                "Wait until it ends, or choose another model_params.name. If its host failed and the file "
                f"system still holds the lock, remove {run_dir / LOCK}."
            )
        self._lock = lock

    def require_run_dir(self) -> None:
        """Raise UserError if the folder of the run was renamed or removed since `acquire_lock`.

        To write on would create a second folder. Ranks without the lock know nothing.
        """
        if self._lock is not None and not self._holds_run_dir(self._lock):
            raise UserError(
                f"{self._run_dir}: this folder, or its {LOCK}, was renamed or removed during its training.\n"
                "Give it its name again, or set model_params.name to the new one. Then run the same command "
                "again: it resumes from the last checkpoint."
            )

    def _holds_run_dir(self, lock: TextIO) -> bool:
        """Whether `lock` is the open lock file in the folder of this name."""
        try:
            return os.path.samestat(os.fstat(lock.fileno()), (self._run_dir / LOCK).stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # the storage fails; who reads or writes there reports it

    def _release_lock(self) -> None:
        """Release the lock; remove the folders that `acquire_lock` created if they are empty."""
        if self._lock is None:
            return
        if self._holds_run_dir(self._lock) and os.listdir(self._run_dir) == [LOCK]:
            (self._run_dir / LOCK).unlink()
            with suppress(OSError):  # another program wrote there
                for folder in self._created:
                    folder.rmdir()
        self._lock.close()
        self._lock = None

    def latest_complete(self) -> Checkpoint | None:
        """The newest complete checkpoint; None for a new run. Collective.

        Removes what a killed run left incomplete and quarantines damaged checkpoints, with a warning each.
        Raises UserError, with nothing changed, if the run was started with other settings, and if only
        damaged checkpoints are left or a newer version of the program saved the newest one.
        """

        def check_settings(checkpoint: Checkpoint) -> None:
            check_same_settings(self._run_dir, checkpoint.state["config"], self._config.to_dict())

        latest = None
        with distributed.raise_on_all_ranks():
            if self._accelerator.is_main_process:
                latest = storage.latest_complete(self._folder, check_settings)
        steps = torch.tensor([latest.step if latest else -1], device=self._accelerator.device)
        step = int(self._accelerator.gather(steps)[0])
        return latest or (Checkpoint(storage.step_dir(self._folder, step)) if step >= 0 else None)

    def restore(
        self,
        checkpoint: Checkpoint,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        data_identity: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Set network, optimizer, gradient scaler and random generators. Collective.

        Returns the tensors that were passed to `save`. Raises UserError if the checkpoint was damaged
        meanwhile, holds another network or was made from other data.
        """
        accelerator, seed = self._accelerator, self._config.train_params.seed
        with distributed.raise_on_all_ranks(), checkpoint.explain():
            saved, parts = checkpoint.state, checkpoint.parts
            if lines := _differences(saved["data_identity"], data_identity, "data_params.datafile."):
                raise UserError(
                    "\n  ".join([f"{checkpoint.folder}: saved from other data:", *lines])
                    + "\nUse the data of the run, or choose another model_params.name."
                )
            tensors.restore(parts, accelerator, network, optimizer, seed=seed, step=checkpoint.step)
            if accelerator.scaler is not None and saved["scaler"]:
                accelerator.scaler.load_state_dict(saved["scaler"])
            changed = _differences(saved["environment"], self._environment())
        if accelerator.is_main_process and changed:
            logger.warning("%s: results may differ from here on: %s", checkpoint.folder, "; ".join(changed))
        return parts["extra"]

    def save(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        train_state: dict[str, Any],
        predictions: dict[str, Tensor],
        data_identity: dict[str, Any],
    ) -> None:
        """Copy the state to host memory and write it in a thread, while training continues. Collective.

        `train_state` holds the counters of run.TrainState. `predictions` holds those of the running epoch as
        `ids` (n,) int64 and `logits` (n,) float32, or nothing between epochs; those of the main process are
        written. Raises UserError if weights or moments are not finite, and the error of the last write if
        that failed.
        """
        self._saved_at = time.monotonic()
        parts = tensors.capture(self._accelerator, network, optimizer) | {"extra": predictions}
        with distributed.raise_on_all_ranks():
            self.wait()
            if names := tensors.not_finite({**parts["model"], **parts["optimizer"]}):
                raise UserError(
                    f"step {train_state['step']} is not saved: {', '.join(names[:4])} not finite. "
                    f"{self._describe_last()} The training diverged: train again with a lower "
                    "train_params.lr, under another model_params.name."
                )
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        state = {
            "format": storage.FORMAT,
            "train_state": train_state,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data_identity": data_identity,
            "config": self._config.to_dict(),
            "environment": self._environment(),
        }
        # Copies of both: the next step changes the originals while the thread writes.
        work = (train_state["step"], tensors.copy(parts), json.dumps(state, indent=1))
        self._writer = threading.Thread(target=self._write, args=work)
        self._writer.start()

    def _write(self, step: int, parts: tensors.Parts, state: str) -> None:
        """Write and verify, then delete old ones. An error is kept for the next call of a method."""
        target = storage.step_dir(self._folder, step)
        try:
            self.require_run_dir()
            storage.write_checkpoint(target, parts, state.encode())
            self.saved_step = step
            storage.rotate(self._folder, self._config.train_params.keep_checkpoints)
        except Exception as error:
            self._error = error
            if isinstance(error, OSError):
                self._error = UserError(
                    f"{error.filename or target}: {error.strerror}. {self._describe_last()} "
                    "Free space or correct the permissions, then run the same command again."
                )
            try:
                self.require_run_dir()  # in a renamed folder anything can fail
            except UserError as renamed:
                self._error = renamed

    def _describe_last(self) -> str:
        last = storage.list_checkpoints(self._folder)
        return f"{last[-1].folder} is unchanged." if last else "Nothing was saved before."

    def _environment(self) -> dict[str, Any]:
        """What the last bits of a training depend on besides its settings and data."""
        device = self._accelerator.device
        module = torch.get_device_module(device)
        record = {
            "num_processes": self._accelerator.num_processes,
            "device": module.get_device_name() if hasattr(module, "get_device_name") else device.type,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": version("accelerate"),
            "code": distributed.code_hash(),
        }
        if device.type == "cpu":
            record["cpu"] = distributed.cpu_name()
            record["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
            record["cpu_threads"] = torch.get_num_threads()
        return record

    @property
    def minutes_since_save(self) -> float:
        """Minutes since the last save; infinite after a failed write, whose error the next save raises."""
        return math.inf if self._error is not None else (time.monotonic() - self._saved_at) / 60

    def wait(self) -> None:
        """Wait for the write in the background and raise its error. Not collective: only this rank raises."""
        if self._writer is not None:
            self._writer.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for the write in the background, release the lock, and raise the error of the write if any."""
        try:
            self.wait()
        finally:
            self._release_lock()


def _differences(saved: dict[str, Any], current: dict[str, Any], section: str = "") -> list[str]:
    """One line per value that differs. The place of a data file, and what only one has, is not compared."""
    return [
        f"{section}{key}: was {saved[key]!r}, is {current[key]!r}"
        for key in saved
        if key in current
        and key not in ("path", "bytes")
        and json.dumps(saved[key]) != json.dumps(current[key])
    ]
