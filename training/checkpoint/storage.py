"""One checkpoint as a folder: written completely or not at all, and trusted only if its manifest matches.

Every file is safetensors or JSON; nothing is ever unpickled. `manifest.json`, written last, holds the size
and the SHA-256 of every other file. A complete checkpoint is named `step_00001234`; it counts from the moment
it gets that name. Beside it there may be `step_N.partial` (being written), `step_N.old` (being replaced or
deleted) and `step_N.damaged` (quarantined).
"""

from __future__ import annotations

import system

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from training.checkpoint import tensors as state_tensors
from training.checkpoint.schema import PARTS, CheckpointError, NewerFormatError, parse_manifest, parse_state

MANIFEST, STATE = "manifest.json", "state.json"
CONTENT = {STATE, *(f"{part}.safetensors" for part in PARTS)}
PARTIAL, OLD, DAMAGED = ".partial", ".old", ".damaged"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One folder that holds the state of a run."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was saved, from state.json."""
        return self.train_state["step"]

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """`bytes` and `sha256` of each file. Raises CheckpointError if the manifest was changed."""
        content = self._content(MANIFEST)
        try:
            entries = parse_manifest(content)
        except ValueError:
            entries = {}
        if entries.keys() != CONTENT or content != _manifest(entries):
            raise CheckpointError(f"{self.folder}: {MANIFEST} is not what was written")
        return entries

    def read(self, name: str) -> bytes:
        """The content of one file. Raises CheckpointError if any byte was changed."""
        expected = self.files[name]
        content = self._content(name, expected["bytes"])
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{self.folder}: {name} is not what was written: its SHA-256 differs")
        return content

    def _content(self, name: str, size: int | None = None) -> bytes:
        path = self.folder / name
        try:
            found = path.stat().st_size
            if not path.is_file():  # opening a pipe would block
                raise CheckpointError(f"{self.folder}: {name} is not a regular file")
            if size is not None and found != size:
                raise CheckpointError(f"{self.folder}: {name} has {found} of {size} bytes")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            # Any other error (permissions, a storage that fails) does not make the checkpoint a damaged one.
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error.strerror}") from None

    def find_problem(self) -> str | None:
        """Read and check everything on disk now; returns what is wrong, None for a complete checkpoint.

        Raises NewerFormatError for the checkpoint of a newer version, OSError if the storage fails.
        """
        fresh = Checkpoint(self.folder)
        try:
            if self.folder.name.split(".")[0] != step_dir(self.folder.parent, fresh.step).name:
                return f"{STATE} was saved at step {fresh.step}"
            parts = {part: fresh.tensors(part) for part in PARTS}
        except NewerFormatError:
            raise
        except CheckpointError as error:
            return str(error).removeprefix(f"{self.folder}: ")
        return state_tensors.find_problem(parts, fresh.state)

    def foreign_files(self) -> list[str]:
        """Names in the folder that are no part of the checkpoint: never read, deleted with the folder."""
        return sorted({path.name for path in self.folder.iterdir()} - {MANIFEST, *self.files})

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part (`model`, `optimizer`, `random` or `extra`) in host memory."""
        name = f"{part}.safetensors"
        content = self.read(name)
        try:
            return safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder}: {name} is not a safetensors file: {error}") from None

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of state.json in the current format, whatever format it was written in.

        Raises CheckpointError if it is not the state of a run, NewerFormatError if a newer version wrote it.
        """
        content = self.read(STATE)
        try:
            return parse_state(content)
        except NewerFormatError as error:
            raise NewerFormatError(f"{self.folder}: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {STATE} is not the state of a run: {error}") from None

    @property
    def train_state(self) -> dict[str, Any]:
        """The counters of the run, as the trainer passed them to `save`."""
        return self.state["train_state"]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved experiment with which it was saved."""
        return self.state["config"]


def step_dir(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The folders that are named as complete checkpoints, oldest first; nothing is verified."""
    paths = [path for path in folder.glob("step_*") if re.fullmatch(r"step_[0-9]{8,}", path.name)]
    return [Checkpoint(path) for path in sorted(paths, key=lambda path: (len(path.name), path.name))]


def best_by_test_loss(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest test loss, the oldest of equals; None if none was evaluated."""
    evaluated = [one for one in checkpoints if one.state["test_loss"] is not None]
    return min(evaluated, key=lambda one: (one.state["test_loss"], one.step), default=None)


def latest_complete(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`; None if there never was one.

    Removes what a killed run left incomplete and quarantines damaged checkpoints, with a warning for each.

    Raises:
        NewerFormatError: a newer version saved one of them; nothing was changed.
        CheckpointError: only damaged ones are left: a run never silently starts again.
        OSError: a folder cannot be read or renamed.
    """
    if not folder.is_dir():
        return None
    _require_known_formats(folder)
    _clean_up(folder)
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = checkpoint.find_problem()
        if problem is None:
            for path, reason in damaged:
                _quarantine(path, reason)
            if foreign := checkpoint.foreign_files():
                logger.warning("%s: ignored other files: %s", checkpoint.folder, ", ".join(foreign))
            return checkpoint
        damaged.append((checkpoint.folder, problem))
    damaged += [(path, "quarantined earlier") for path in sorted(folder.glob(f"step_*{DAMAGED}*"))]
    if damaged:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in damaged)
        raise CheckpointError(
            f"{folder}: no complete checkpoint is left:\n{lines}\n"
            "To resume, copy a complete checkpoint there. To start again, remove that folder or choose "
            "another model_params.name."
        )
    return None


def _require_known_formats(folder: Path) -> None:
    """Raise NewerFormatError if a newer version saved any checkpoint, also one that is being replaced."""
    for path in sorted(folder.glob("step_*")):
        try:
            _ = Checkpoint(path).state
        except NewerFormatError:
            raise
        except CheckpointError:
            continue  # damaged


def _clean_up(folder: Path) -> None:
    for path in folder.glob(f"step_*{PARTIAL}"):
        logger.warning("%s was being written when the run ended: removed", path)
        shutil.rmtree(path)
    for path in folder.glob(f"step_*{OLD}"):
        final = path.with_name(path.name.removesuffix(OLD))
        if not final.exists() and Checkpoint(path).find_problem() is None:
            path.rename(final)  # killed before the new one got the name
            system.sync_directory(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _quarantine(path: Path, problem: str) -> None:
    target = path.with_name(path.name + DAMAGED)
    while target.exists():
        target = target.with_name(f"{target.name}-again")
    path.rename(target)
    logger.warning("%s is damaged (%s): renamed to %s", path, problem, target.name)


def write_checkpoint(folder: Path, parts: state_tensors.Parts, state: bytes) -> None:
    """Write a checkpoint under a temporary name, verify it from disk, then rename it to `folder`.

    A checkpoint of the same name stays until the new one is verified. Raises OSError or CheckpointError, with
    nothing incomplete left.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.parent.exists():
            folder.parent.mkdir()  # not its parents: a run that was renamed gets no second folder
            system.sync_directory(folder.parent.parent)
        partial.mkdir()
        # Serialized in memory: save_file creates files that only the owner may read, whatever the umask.
        entries = {}
        for part, tensors in parts.items():
            name = f"{part}.safetensors"
            entries[name] = _write_file(partial / name, safetensors.torch.save(tensors))
        entries[STATE] = _write_file(partial / STATE, state)
        _write_file(partial / MANIFEST, _manifest(entries))
        system.sync_directory(partial)
        if problem := Checkpoint(partial).find_problem():
            raise CheckpointError(f"{partial}: what was written cannot be read back: {problem}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees the space on a full disk
        raise
    old = _move_aside(folder) if folder.exists() else None
    partial.rename(folder)
    system.sync_directory(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints and the one with the lowest test loss."""
    checkpoints, readable = list_checkpoints(folder), []
    for checkpoint in checkpoints:
        try:
            _ = checkpoint.state
            readable.append(checkpoint)
        except CheckpointError as error:
            logger.warning("%s", error)
    best = best_by_test_loss(readable)
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best:
            _delete(checkpoint.folder)


def _delete(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves nothing damaged under its name."""
    # What cannot be deleted now (a file that is open over NFS) is deleted when the run is resumed.
    shutil.rmtree(_move_aside(folder), ignore_errors=True)


def _move_aside(folder: Path) -> Path:
    old = folder.with_name(folder.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    return old


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    system.write_new(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(entries: dict[str, dict[str, Any]]) -> bytes:
    """The bytes of the manifest. It holds a hash of itself: only exactly these bytes are accepted."""
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": digest}, indent=1).encode()


def select(folder: Path, name: str) -> Checkpoint:
    """The `best` (by test loss), the `last`, or the checkpoint of step `name` among the complete ones.

    Raises CheckpointError if there is none, naming those that exist, or if a damaged one could be meant.
    """
    complete = []
    for checkpoint in list_checkpoints(folder):
        problem = checkpoint.find_problem()
        if problem is None:
            complete.append(checkpoint)
        elif name in ("best", "last") or checkpoint.folder.name == f"step_{name.zfill(8)}":
            raise CheckpointError(
                f"{checkpoint.folder} is damaged: {problem}. Select another checkpoint by its step."
            )
    choices = {str(checkpoint.step): checkpoint for checkpoint in complete}
    if complete:
        choices["last"] = complete[-1]
    if (best := best_by_test_loss(complete)) is not None:
        choices["best"] = best
    if name not in choices:
        raise CheckpointError(
            f"{folder}: found no checkpoint '{name}', allowed: {', '.join(choices) or 'none, there are none'}"
        )
    return choices[name]
