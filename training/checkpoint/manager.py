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
from training.checkpoint import storage
from training.checkpoint import tensors as state_tensors
from training.checkpoint.schema import FORMAT, PARTS, CheckpointError, NewerFormatError
from training.checkpoint.storage import Checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCK = ".lock"  # held while a program trains the run; it has no content
logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run. `latest_complete`, `restore` and `save` are collective."""

    def __init__(self, run_dir: Path, accelerator: Accelerator, *, keep: int) -> None:
        """Keep the `keep` newest checkpoints in the folder `run_dir`, and the one with the lowest test loss.

        Raises CheckpointError for a distributed type that shards the state over the ranks.
        """
        self._folder, self._accelerator, self._keep = run_dir / "checkpoints", accelerator, keep
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at = time.monotonic()
        self._lock: TextIO | None = None
        self._created: list[Path] = []
        self.saved_step = -1
        """Step of the last checkpoint that this process has written to disk."""
        kind = accelerator.distributed_type.value
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise CheckpointError(
                f"distributed_type {kind} shards the optimizer over the ranks, and its state cannot be "
                "restored exactly. Use a configuration from accelerate_configs/."
            )

    def acquire_lock(self) -> None:
        """Prevent other programs from training this run until `close`.

        The main process calls this before anything else of the run is read or written. It creates the folder
        of the run, which `close` removes if it is still empty. A file system without locks is only logged.
        Raises CheckpointError if another program holds the lock.
        """
        run_dir = self._folder.parent
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
            raise CheckpointError(
                f"{run_dir}: another program is training this run.\n"
                "Wait until it ends, or choose another model_params.name. If its host failed and the file "
                f"system still holds the lock, remove {run_dir / LOCK}."
            )
        self._lock = lock

    def require_run_dir(self) -> None:
        """Raise CheckpointError if the folder of the run was renamed or removed since `acquire_lock`.

        To write on would create a second folder. Ranks without the lock know nothing.
        """
        if (error := self._run_dir_error()) is not None:
            raise error

    def _run_dir_error(self) -> CheckpointError | None:
        if self._lock is None or self._holds_run_dir(self._lock):
            return None
        return CheckpointError(
            f"{self._folder.parent}: this folder, or its {LOCK}, was renamed or removed while its run "
            "trained.\n"
            "Give it its name again, or set model_params.name to the new one. Then run the same command "
            "again: it resumes from the last checkpoint."
        )

    def _holds_run_dir(self, lock: TextIO) -> bool:
        """Whether `lock` is the open lock file in the folder of this name."""
        try:
            return os.path.samestat(os.fstat(lock.fileno()), (self._folder.parent / LOCK).stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # the storage fails; who reads or writes there reports it

    def _release_lock(self) -> None:
        """Release the lock; remove the folders that `acquire_lock` created if they are empty."""
        if self._lock is None:
            return
        run_dir = self._folder.parent
        if self._holds_run_dir(self._lock) and [path.name for path in run_dir.iterdir()] == [LOCK]:
            (run_dir / LOCK).unlink()
            with suppress(OSError):  # another program wrote there
                for folder in self._created:
                    folder.rmdir()
        self._lock.close()
        self._lock = None

    def saved_config(self) -> dict[str, Any] | None:
        """The resolved experiment of the newest checkpoint whose state can be read; changes nothing."""
        for checkpoint in reversed(storage.list_checkpoints(self._folder)):
            try:
                return checkpoint.config
            except NewerFormatError:
                return None  # latest_complete rejects it
            except CheckpointError:
                continue
        return None

    def latest_complete(self) -> Checkpoint | None:
        """The newest complete checkpoint; None for a new run. Collective.

        Removes what a killed run left incomplete and quarantines damaged checkpoints, with a warning each.
        Raises CheckpointError if only damaged ones are left, and if a newer version of the program saved one.
        """
        step = -1
        with distributed.raise_on_all_ranks():
            if self._accelerator.is_main_process:
                try:
                    latest = storage.latest_complete(self._folder)
                except OSError as error:
                    raise CheckpointError(f"{error.filename or self._folder}: {error.strerror}") from None
                step = latest.step if latest is not None else -1
        step = int(self._accelerator.gather(torch.tensor([step], device=self._accelerator.device))[0])
        return Checkpoint(storage.step_dir(self._folder, step)) if step >= 0 else None

    def restore(
        self,
        checkpoint: Checkpoint,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        data_identity: dict[str, Any],
        seed: int,
    ) -> dict[str, Tensor]:
        """Set network, optimizer, gradient scaler and random generators. Collective.

        Returns the tensors that were passed to `save`. Raises CheckpointError, with nothing changed, if the
        checkpoint was damaged meanwhile, holds another network or was made from other data.
        """
        accelerator = self._accelerator
        with distributed.raise_on_all_ranks():
            saved = checkpoint.state
            parts = {part: checkpoint.tensors(part) for part in PARTS}
            lines = _differences(saved["data_identity"], data_identity, "data_params.datafile")
            lines += state_tensors.differences(parts, accelerator, network)
            if lines:
                raise CheckpointError(
                    "\n  ".join([f"{checkpoint.folder}: saved from another network or other data:", *lines])
                    + "\nUse the network and data of the run, or choose another model_params.name."
                )
        state_tensors.restore(parts, accelerator, network, optimizer, seed=seed, step=checkpoint.step)
        if accelerator.scaler is not None and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        changed = _differences(saved["environment"], self._environment())
        if accelerator.is_main_process and changed:
            logger.warning(
                "%s: results may differ in the last bits from here on: %s",
                checkpoint.folder,
                "; ".join(changed),
            )
        return parts["extra"]

    def save(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        train_state: dict[str, Any],
        tensors: dict[str, Tensor],
        config: dict[str, Any],
        data_identity: dict[str, Any],
        test_loss: float | None,
    ) -> None:
        """Copy the state to host memory and write it in a thread, while training continues. Collective.

        `train_state` holds the counters of run.TrainState. `tensors` holds the predictions of the running
        epoch as `ids` (n,) int64 and `logits` (n,) float32, or nothing between epochs; those of the main
        process are written. Raises CheckpointError if weights or moments are not finite, and the error of the
        last write if that failed.
        """
        self._saved_at = time.monotonic()
        self._wait()
        parts = {**state_tensors.capture(self._accelerator, network, optimizer), "extra": tensors}
        with distributed.raise_on_all_ranks():
            if self._error is not None:
                raise self._error
            if names := state_tensors.not_finite({**parts["model"], **parts["optimizer"]}):
                raise CheckpointError(
                    f"step {train_state['step']} is not saved: {', '.join(names[:4])} not finite. "
                    f"{self._describe_last()} The training diverged: reduce train_params.lr, or set "
                    "train_params.gradient_clipping."
                )
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        state = {
            "format": FORMAT,
            "train_state": train_state,
            "test_loss": test_loss if test_loss is not None and math.isfinite(test_loss) else None,
            "scaler": (scaler.state_dict() or None) if scaler is not None else None,
            "data_identity": data_identity,
            "config": config,
            "environment": self._environment(),
        }
        # Copies of both: the next step changes the originals while the thread writes.
        work = (train_state["step"], state_tensors.copy(parts), json.dumps(state, indent=1))
        self._writer = threading.Thread(target=self._write, args=work)
        self._writer.start()

    def _write(self, step: int, parts: state_tensors.Parts, state: str) -> None:
        """Write and verify, then delete old ones. An error is kept for the next call of a method."""
        target = storage.step_dir(self._folder, step)
        try:
            self.require_run_dir()
            storage.write_checkpoint(target, parts, state.encode())
            self.saved_step = step
            storage.rotate(target.parent, self._keep)
        except Exception as error:
            if isinstance(error, OSError):
                error = CheckpointError(
                    f"{error.filename or target}: {error.strerror}. {self._describe_last()} "
                    "Free space or correct the permissions, then run the same command again."
                )
            # In a renamed folder any of these can fail; the name is what the user has to correct.
            self._error = self._run_dir_error() or error

    def _describe_last(self) -> str:
        last = storage.list_checkpoints(self._folder)
        return f"{last[-1].folder} is unchanged." if last else "Nothing was saved before."

    def _environment(self) -> dict[str, Any]:
        """What the last bits of a training depend on besides its settings."""
        device = self._accelerator.device.type
        module = torch.get_device_module(device)
        return {
            "num_processes": self._accelerator.num_processes,
            "device": module.get_device_name() if hasattr(module, "get_device_name") else device,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": version("accelerate"),
        }

    @property
    def minutes_since_save(self) -> float:
        """Minutes since the last save; infinite after a failed write, whose error the next save raises."""
        return math.inf if self._error is not None else (time.monotonic() - self._saved_at) / 60

    def raise_write_error(self) -> None:
        """Raise the error of the write in the background; of several ranks, `save` raises it on all."""
        if self._error is not None and self._accelerator.num_processes == 1:
            raise self._error

    def wait(self) -> None:
        """Wait for the write in the background and raise its error. Not collective."""
        self._wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for the write in the background, release the lock, and raise the error of the write if any.

        Not collective: only this rank raises it.
        """
        self._wait()
        self._release_lock()
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()


def _differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """One line per value that differs, named by its path. The place of a data file is not compared."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = [key for key in {**saved, **current} if key not in ("path", "bytes")]
        nested = [_differences(saved.get(key), current.get(key), f"{name}.{key}".strip(".")) for key in keys]
        return [line for lines in nested for line in lines]
    return [] if json.dumps(saved) == json.dumps(current) else [f"{name}: was {saved!r}, is {current!r}"]
