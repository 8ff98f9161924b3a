"""The checkpoints of a run: saved while it goes on, chosen when it starts again, kept and deleted.

    LOG_DIR/NAME/checkpoints/step_00001234/
        model.safetensors      weights and buffers
        optimizer.safetensors  Adam's moments and step counts
        random.safetensors     every random generator of every process
        extra.safetensors      the tensors that the trainer adds
        state.json             progress, settings, identity, gradient scaler, versions
        manifest.json          size and SHA-256 of each of these, written last

`python checkpoint.py verify LOG_DIR/NAME` lists them with what is wrong, and never writes.
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

from checkpoint import storage
from checkpoint import tensors as state_tensors
from checkpoint.storage import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCK = ".lock"  # held while a program trains the run; its content is of no interest
logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run. `latest`, `restore` and `save` are called by all processes together."""

    def __init__(self, run: Path, accelerator: Accelerator, *, keep: int) -> None:
        """Keep the `keep` newest checkpoints of the folder `run`, and the one with the lowest test loss."""
        self._folder, self._accelerator, self._keep = run / "checkpoints", accelerator, keep
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at = time.monotonic()
        self._lock: TextIO | None = None
        self._made: list[Path] = []
        kind = accelerator.distributed_type.value
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise CheckpointError(
                f"distributed_type {kind}: the optimizer is spread over the processes and cannot be "
                "restored exactly; allowed: one whole network per process, as in accelerate_configs/"
            )

    def acquire_lock(self) -> None:
        """Keep other programs off this run until it is closed; CheckpointError if one trains it already.

        Called by the main process, before anything else of the run is read or written. Makes the run's
        folder, which `close` removes if nothing was put there. File systems without locks are trusted.
        """
        run = self._folder.parent
        self._made = [folder for folder in (run, *run.parents) if not folder.exists()]
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / LOCK).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.path.samestat(os.fstat(lock.fileno()), (run / LOCK).stat())
        except (BlockingIOError, FileNotFoundError):
            taken = True
        except OSError:
            logger.info("%s cannot be locked: start one program at a time", run)
            taken = False
        if taken:
            lock.close()
            raise CheckpointError(
                f"{run}: another program is training this run\n"
                "allowed: one at a time, or another model_params.name\n"
                f"(of a program whose host is lost the file system may remember it: then remove {run / LOCK})"
            )
        self._lock = lock

    def _release(self) -> None:
        """Let others train this run, and leave no empty folders behind where it never began."""
        if self._lock is None:
            return
        run = self._folder.parent
        if [path.name for path in run.iterdir()] == [LOCK]:
            (run / LOCK).unlink()
            with suppress(OSError):  # somebody else put something there
                for folder in self._made:
                    folder.rmdir()
        self._lock.close()
        self._lock = None

    def latest_complete(self) -> Checkpoint | None:
        """The newest complete checkpoint, None for a new run; CheckpointError if all there are are damaged.

        What a killed run left half done is tidied up, damaged ones are set aside; a warning names them.
        """
        step, error = -1, None
        if self._accelerator.is_main_process:
            try:
                chosen = storage.latest_complete(self._folder)
                step = chosen.step if chosen is not None else -1
            except OSError as problem:
                error = CheckpointError(f"{problem.filename or self._folder}: {problem.strerror}")
            except CheckpointError as problem:
                error = problem
        self._agree(error)
        step = int(self._accelerator.gather(torch.tensor([step], device=self._accelerator.device))[0])
        return Checkpoint(storage.step_dir(self._folder, step)) if step >= 0 else None

    def restore(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        data_identity: dict[str, Any],
        seed: int,
    ) -> dict[str, Tensor]:
        """Set model, optimizer, gradient scaler and random generators; returns the extra tensors.

        CheckpointError, with nothing changed, if it holds another network or was made from other data.
        """
        accelerator, error = self._accelerator, None
        try:
            saved = checkpoint.state
            parts = {part: checkpoint.tensors(part) for part in ("model", "optimizer", "random", "extra")}
            lines = _differences(saved["data_identity"], data_identity, "data_params.datafile")
            lines += state_tensors.differences(parts, accelerator, model)
            if lines:
                raise CheckpointError(
                    "\n  ".join([f"{checkpoint.folder}: saved from another network or other data:", *lines])
                    + "\nallowed: the same as before, or another model_params.name"
                )
        except CheckpointError as problem:
            error = problem
        self._agree(error)
        state_tensors.restore(parts, accelerator, model, optimizer, seed=seed, step=checkpoint.step)
        if accelerator.scaler is not None and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        changed = _differences(saved["environment"], self._environment())
        if accelerator.is_main_process and changed:
            # A process that is new has random states that follow from the seed, the step and its number.
            what = "; ".join(changed)
            logger.warning("%s: the bits may differ from here on, as %s", checkpoint.folder, what)
        return parts["extra"]

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        train_state: dict[str, Any],
        tensors: dict[str, Tensor],
        config: dict[str, Any],
        data_identity: dict[str, Any],
        test_loss: float | None,
    ) -> None:
        """Copy the state to host memory and write it in a thread, so that the training can go on at once.

        `train_state` is JSON with at least `step` and `epoch`. Of `tensors`, those of the main process are kept.
        CheckpointError if weights or moments are not finite, or if the write before this one had failed.
        """
        self._saved_at = time.monotonic()
        self._wait()
        parts = {**state_tensors.capture(self._accelerator, model, optimizer), "extra": tensors}
        error = self._error
        if error is None and (broken := state_tensors.not_finite(parts)):
            error = CheckpointError(
                f"step {train_state['step']} is not saved, these are not finite: {', '.join(broken[:4])}. "
                f"The training diverged; allowed: a smaller train_params.lr. {self._last()}"
            )
        self._agree(error)
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        content = {
            "train_state": train_state,
            "test_loss": test_loss if test_loss is not None and math.isfinite(test_loss) else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data_identity": data_identity,
            "config": config,
            "environment": self._environment(),
        }
        # Copies of both: the next step changes the originals while the thread writes.
        work = (
            storage.step_dir(self._folder, train_state["step"]),
            state_tensors.copy(parts),
            json.dumps(content, indent=1),
        )
        self._writer = threading.Thread(target=self._write, args=work)
        self._writer.start()

    def _write(self, target: Path, parts: state_tensors.Parts, content: str) -> None:
        """Write and verify; only then delete old ones. An error waits for `raise_write_error` and `save`."""
        try:
            storage.write_checkpoint(target, parts, content.encode())
            storage.rotate(target.parent, self._keep)
        except OSError as error:
            self._error = CheckpointError(
                f"{error.filename or target}: {error.strerror}. {self._last()} "
                "Make room or mend the folder, then give the same command again."
            )
        except Exception as error:
            self._error = error

    def _last(self) -> str:
        last = storage.list_checkpoints(self._folder)
        return f"{last[-1].folder} is untouched." if last else "Nothing was saved before."

    def _environment(self) -> dict[str, Any]:
        """What the bits of a training depend on beside its settings."""
        device = self._accelerator.device.type
        module = torch.get_device_module(device)
        return {
            "processes": self._accelerator.num_processes,
            "device": module.get_device_name() if hasattr(module, "get_device_name") else device,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": version("accelerate"),
        }

    @property
    def minutes_since_save(self) -> float:
        """Minutes since the last save; infinite after a write that failed, which the next save will raise."""
        return math.inf if self._error is not None else (time.monotonic() - self._saved_at) / 60

    def raise_write_error(self) -> None:
        """Raise the error of the write in the background. Several processes raise it together, in `save`."""
        if self._error is not None and self._accelerator.num_processes == 1:
            raise self._error

    def close(self) -> None:
        """Wait for the write in the background and raise its error, on this process alone."""
        self._wait()
        self._release()
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()

    def _agree(self, error: Exception | None) -> None:
        """Raise on every process if one has an error: none is left waiting in a collective."""
        failed = torch.tensor([error is not None], dtype=torch.int32, device=self._accelerator.device)
        where = self._accelerator.gather(failed).nonzero().flatten().tolist()
        if error is not None:
            raise error
        if where:
            raise CheckpointError(f"process {where[0]} cannot go on; its message says why")


def _differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """One line per value that differs, named by its path. Where a data file lies is no part of what it is."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = [key for key in {**saved, **current} if key not in ("path", "bytes")]
        below = [_differences(saved.get(key), current.get(key), f"{name}.{key}".strip(".")) for key in keys]
        return [line for lines in below for line in lines]
    return [] if json.dumps(saved) == json.dumps(current) else [f"{name}: was {saved!r}, is {current!r}"]
