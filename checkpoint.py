"""The whole state of a run on disk: written whole or not at all, verified, chosen, restored bit for bit.

A checkpoint is a folder of safetensors and JSON; nothing in it is ever unpickled.

    checkpoints/step_00001234/
        model.safetensors      weights and buffers by name
        optimizer.safetensors  Adam's moments and step counts as PARAMETER/exp_avg, ...
        random.safetensors     the state of every random generator, one row per process
        extra.safetensors      whatever tensors the trainer adds
        state.json             progress, settings, identity of network and data, versions
        manifest.json          size and SHA-256 of each of these, written last

Beside the complete ones, `step_N.partial` is being written, `step_N.old` is being deleted and `step_N.damaged`
was set aside. `python checkpoint.py verify RUN` lists them all and never writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import random
import re
import shutil
import sys
import threading
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
PARTIAL, OLD, DAMAGED = ".partial", ".old", ".damaged"
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A state that cannot be saved or restored; the message says where, why, and what to do."""


def _seal(files: dict[str, dict[str, Any]]) -> bytes:
    """The manifest of `files`. It vouches for itself: only these exact bytes are accepted when it is read."""
    text = json.dumps(files, sort_keys=True)
    return json.dumps({"files": files, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1).encode()


@dataclass(frozen=True)
class Checkpoint:
    """One folder that holds the state of a run."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was saved."""
        return int(self.folder.name.split("_")[1].split(".")[0])

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of each file; CheckpointError if the manifest is not the one that was written."""
        try:
            text = (self.folder / MANIFEST).read_bytes()
            files = json.loads(text)["files"]
            if text == _seal(files):
                return files
        except FileNotFoundError:
            raise CheckpointError(f"{MANIFEST} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise CheckpointError(f"{MANIFEST} is not what was written")

    def read(self, name: str) -> bytes:
        """The verified content of one file; CheckpointError says what is wrong with it."""
        expected = self.files[name]
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
        if len(content) != expected["bytes"]:
            raise CheckpointError(f"{name} has {len(content)} bytes of {expected['bytes']}")
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{name} is not what was written (its SHA-256 differs)")
        return content

    def problem(self) -> str | None:
        """What is wrong with it, read from disk; None if it is complete."""
        try:
            for name in Checkpoint(self.folder).files:
                self.read(name)
        except CheckpointError as error:
            return str(error)
        return None

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of state.json."""
        return json.loads(self.read(STATE))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration under which it was saved."""
        return self.state["config"]


def complete_or_not(folder: Path) -> list[Checkpoint]:
    """The checkpoints in `folder` that go by their final name, oldest first; nothing is verified."""
    named = [Checkpoint(path) for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(named, key=lambda checkpoint: checkpoint.step)


class Checkpoints:
    """The checkpoints of one run. Everything but `check` is called by all processes together."""

    def __init__(self, run: Path, accelerator: Accelerator, *, keep: int) -> None:
        """Keep the `keep` newest checkpoints under `run`, and the one with the lowest test loss."""
        self._run, self._folder = run, run / "checkpoints"
        self._accelerator, self._keep = accelerator, keep
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, None for a new run; CheckpointError if there are only damaged ones."""
        step, error = -1, None
        if self._accelerator.is_main_process:
            try:
                step = self._choose()
            except (OSError, CheckpointError) as problem:
                error = problem
        self._agree(error)
        chosen = int(self._accelerator.gather(torch.tensor([step], device=self._accelerator.device))[0])
        return Checkpoint(self._folder / f"step_{chosen:08d}") if chosen >= 0 else None

    def _agree(self, error: Exception | None) -> None:
        """Raise on every process if one has an error, so that none waits for it for ever."""
        failed = torch.tensor([error is not None], dtype=torch.int32, device=self._accelerator.device)
        where = self._accelerator.gather(failed).nonzero().flatten().tolist()
        if error is not None:
            raise error
        if where:
            raise CheckpointError(f"process {where[0]} could not go on; its message says why")

    def _choose(self) -> int:
        """Tidy up what a killed run left behind; return the step of the newest complete checkpoint or -1."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob(f"step_*{PARTIAL}")):
            final = path.with_name(path.name.removesuffix(PARTIAL))
            if final.exists() or (problem := Checkpoint(path).problem()):
                logger.warning("%s was being written when the run ended: removed", path)
                shutil.rmtree(path)
            else:
                path.rename(final)
        for path in self._folder.glob(f"step_*{OLD}"):
            shutil.rmtree(path, ignore_errors=True)
        damaged = []
        for checkpoint in reversed(complete_or_not(self._folder)):
            if (problem := checkpoint.problem()) is None:
                self._set_aside(damaged)
                return checkpoint.step
            damaged.append((checkpoint, problem))
        found = [f"{checkpoint.folder}: {problem}" for checkpoint, problem in damaged]
        found += [f"{path}: set aside earlier" for path in sorted(self._folder.glob(f"step_*{DAMAGED}*"))]
        if found:
            raise CheckpointError("\n  ".join([
                f"{self._folder} holds no complete checkpoint:", *found,
                "Put a copy of a complete one there to go on from it; to begin anew, remove this folder or "
                "choose another model_params.name."]))
        return -1

    def _set_aside(self, damaged: list[tuple[Checkpoint, str]]) -> None:
        for checkpoint, problem in damaged:
            aside = checkpoint.folder.with_name(checkpoint.folder.name + DAMAGED)
            while aside.exists():
                aside = aside.with_name(aside.name + "-again")
            checkpoint.folder.rename(aside)
            logger.warning("%s is damaged (%s): set aside as %s", checkpoint.folder, problem, aside.name)

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: dict[str, Any],
        tensors: dict[str, Tensor], config: dict[str, Any], identity: dict[str, Any], test_loss: float | None,
    ) -> None:
        """Snapshot the state to host memory and write it in a thread; the caller may change it at once.

        `progress` is JSON and has `step` and `epoch`; of `tensors`, the main process's are kept.
        """
        self.wait()
        accelerator = self._accelerator
        states = {name: state[None].to(accelerator.device) for name, state in _random_states(accelerator.device).items()}
        content = {
            "model": {_clean(name): tensor for name, tensor in accelerator.get_state_dict(model).items()},
            "optimizer": _moments(accelerator.unwrap_model(model), optimizer),
            "random": accelerator.gather(states),
            "extra": tensors,
        }
        broken = [name for part in ("model", "optimizer") for name, tensor in content[part].items()
                  if not torch.isfinite(tensor).all()]
        self._agree(self._error or (CheckpointError(
            f"step {progress['step']} is not saved, its state is not finite: {', '.join(broken[:5])}. "
            f"The training diverged (a lower learning rate may help); {self._last()}") if broken else None))
        if not accelerator.is_main_process:
            return
        snapshot = {f"{part}.safetensors": {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in named.items()} for part, named in content.items()}
        state = {
            "format": FORMAT,
            "progress": progress,
            "test_loss": test_loss if test_loss is not None and math.isfinite(test_loss) else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "identity": identity,
            "config": config,
            "processes": accelerator.num_processes,
            "versions": _versions(),
        }
        # Serialised now, so that the caller may change its dictionaries too.
        text = json.dumps(state, indent=1).encode()
        self._writer = threading.Thread(target=self._write, args=(progress["step"], snapshot, text))
        self._writer.start()

    def _last(self) -> str:
        existing = complete_or_not(self._folder)
        return f"the last checkpoint, {existing[-1].folder}, is untouched" if existing else "none was saved so far"

    def _write(self, step: int, snapshot: dict[str, dict[str, Tensor]], state: bytes) -> None:
        """Write, verify from disk, rename; only then delete old ones. An error is kept for `check`."""
        final = self._folder / f"step_{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        try:
            _write_folder(partial, snapshot, state)
            if final.exists():
                _retire(final)
            os.rename(partial, final)
            _sync(self._folder)
            self._rotate()
        except OSError as error:
            self._error = CheckpointError(
                f"{error.filename or partial} cannot be written: {error.strerror}. Free some space or mend the "
                f"folder, then start the same command again; {self._last()}")
        except Exception as error:
            self._error = error

    def _rotate(self) -> None:
        existing = complete_or_not(self._folder)
        losses = {}
        for checkpoint in existing:
            try:
                losses[checkpoint.step] = checkpoint.state["test_loss"]
            except CheckpointError:
                losses[checkpoint.step] = None
        tested = [step for step, loss in losses.items() if loss is not None]
        best = min(tested, key=lambda step: (losses[step], -step), default=None)
        for checkpoint in existing[: -self._keep]:
            if checkpoint.step != best:
                _retire(checkpoint.folder)

    def wait(self) -> None:
        """Wait for the write in progress."""
        if self._writer is not None:
            self._writer.join()

    def check(self) -> None:
        """Raise the error of the background write, if it had one."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait for the write in progress; its error is raised on all processes."""
        self.wait()
        self._agree(self._error)

    def restore(
        self, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, *,
        identity: dict[str, Any], seed: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Set model, optimizer, gradient scaler and random states; return progress and the extra tensors.

        CheckpointError, with nothing changed, if it was saved by another network or with other data.
        """
        accelerator = self._accelerator
        module = accelerator.unwrap_model(model, keep_torch_compile=False)
        own, error = {_clean(name): tensor for name, tensor in module.state_dict().items()}, None
        try:
            state = checkpoint.state
            differing = _differences(state["identity"], json.loads(json.dumps(identity)))
            parts = {name: safetensors.torch.load(checkpoint.read(f"{name}.safetensors"))
                     for name in ("model", "optimizer", "random", "extra")}
            differing += _differences(_shapes(parts["model"]), _shapes(own))
            if differing:
                raise CheckpointError("\n  ".join([
                    f"{checkpoint.folder} was saved by another network or with other data:", *differing,
                    "Choose another model_params.name for the new one, or go back to the old settings."]))
        except CheckpointError as problem:
            error = problem
        self._agree(error)
        for name, tensor in own.items():
            tensor.copy_(parts["model"][name])
        _set_moments(module, optimizer, parts["optimizer"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        _set_random_states(parts["random"], accelerator.device, accelerator.process_index, (seed, checkpoint.step))
        return state["progress"], parts["extra"]


def _clean(name: str) -> str:
    """The name without the prefix that torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


def _moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{_clean(name)}/{key}": value for name, parameter in module.named_parameters()
            for key, value in optimizer.state[parameter].items()}


def _set_moments(module: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Give each parameter its moments, in its own memory layout; learning rates and the like stay as they are."""
    parameters = {_clean(name): parameter for name, parameter in module.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        moment = value.shape == parameters[name].shape
        states.setdefault(name, {})[key] = torch.empty_like(parameters[name]).copy_(value) if moment else value
    names = {id(parameter): name for name, parameter in parameters.items()}
    current = optimizer.state_dict()["param_groups"]
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {index: states[name] for index, name in enumerate(order) if name in states}
    optimizer.load_state_dict({"state": numbered, "param_groups": current})


def _bytes(values: list[float]) -> Tensor:
    """Numbers (float64 holds every 32-bit word exactly) as the bytes that any backend can gather."""
    return torch.tensor(values, dtype=torch.float64).view(torch.uint8)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """The state of every random generator of this process as uint8 vectors."""
    _, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": _bytes([*keys, *rest]),
        "python": _bytes([*words, math.nan if gauss is None else gauss]),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _set_random_states(saved: dict[str, Tensor], device: torch.device, process: int, seeds: tuple[int, int]) -> None:
    """Set this process's generators; those that were not saved follow from (seed, step, process)."""
    derived = np.random.SeedSequence([*seeds, process]).generate_state(3).tolist()
    torch.manual_seed(derived[0])  # the device's generator too
    np.random.seed(derived[1])
    random.seed(derived[2])
    states = {name: rows[process] for name, rows in saved.items() if process < len(rows)}
    if not states:
        logger.info("process %d is new: its random generators follow from the seed and the step", process)
        return
    torch.set_rng_state(states["torch"])
    *words, position, has_gauss, cached = states["numpy"].view(torch.float64).tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), int(position), int(has_gauss), cached))
    *words, gauss = states["python"].view(torch.float64).tolist()
    random.setstate((3, tuple(int(word) for word in words), None if math.isnan(gauss) else gauss))
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "accelerate": version("accelerate")}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def _differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """One line per value that differs, named by its path. A file's own path is no part of what it is."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = [key for key in [*saved, *(set(current) - set(saved))] if key != "path"]
        return [line for key in keys
                for line in _differences(saved.get(key), current.get(key), f"{name}.{key}" if name else key)]
    return [] if saved == current else [f"{name}: saved with {saved!r}, now {current!r}"]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_folder(folder: Path, parts: dict[str, dict[str, Tensor]], state: bytes) -> None:
    """Write a checkpoint under a temporary name and verify it; what cannot be finished is removed."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # Serialised here and not with save_file, which gives files the owner's permissions only.
        files = {name: _write_file(folder / name, safetensors.torch.save(named)) for name, named in parts.items()}
        files[STATE] = _write_file(folder / STATE, state)
        _write_file(folder / MANIFEST, _seal(files))
        _sync(folder)
        if problem := Checkpoint(folder).problem():
            raise CheckpointError(f"{folder} cannot be read back as it was written: {problem}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _retire(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves nothing that looks like one."""
    old = folder.with_name(folder.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def verify(run: Path) -> bool:
    """Print every checkpoint of `run` with what is wrong with it; True if one is complete and none damaged."""
    folders = sorted((run / "checkpoints").glob("step_*"))
    print(f"{'checkpoint':<24}{'epoch':>6}{'size/MiB':>10}{'test loss':>11}  state")
    complete = damaged = 0
    for checkpoint in map(Checkpoint, folders):
        problem, final = checkpoint.problem(), "." not in checkpoint.folder.name
        epoch = loss = size = "-"
        if problem is None:
            complete += final
            epoch, tested = checkpoint.state["progress"]["epoch"], checkpoint.state["test_loss"]
            loss = "-" if tested is None else f"{tested:.6f}"
            size = f"{sum(file['bytes'] for file in checkpoint.files.values()) / 2**20:.1f}"
        elif final:
            damaged += 1
        print(f"{checkpoint.folder.name:<24}{epoch:>6}{size:>10}{loss:>11}  {problem or 'complete'}")
    if not folders:
        print(f"no checkpoints in {run}")
    return complete > 0 and damaged == 0


def main() -> int:
    """`python checkpoint.py verify RUN`: exit status 0 if a run can go on from a complete checkpoint, else 2."""
    parser = argparse.ArgumentParser(description="List the checkpoints of a run and what is wrong with them.")
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("run", type=Path, help="folder of the run, LOG_DIR/NAME")
    return 0 if verify(parser.parse_args().run) else 2


if __name__ == "__main__":
    sys.exit(main())
