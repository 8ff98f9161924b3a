"""One checkpoint as a folder: written whole or not at all, and believed only if its manifest verifies.

Everything in it is safetensors or JSON; nothing is ever unpickled. `manifest.json`, written last, holds the
size and the SHA-256 of every other file. A complete checkpoint is called `step_00001234`, and the moment it
gets that name is the moment it counts. Beside it there may be `step_N.partial`, being written, `step_N.old`,
being replaced or deleted, and `step_N.damaged`, set aside.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

import files

MANIFEST, STATE = "manifest.json", "state.json"
PARTIAL, OLD, DAMAGED = ".partial", ".old", ".damaged"
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A state that cannot be saved or restored; the message says where, why, and what to do."""


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
        text = self._content(MANIFEST)
        try:
            entries: dict[str, dict[str, Any]] = json.loads(text)["files"]
            if text == _manifest(entries):
                return entries
        except (ValueError, KeyError, TypeError):
            pass
        raise CheckpointError(f"{self.folder}: {MANIFEST} is not what was written")

    def read(self, name: str) -> bytes:
        """The content of one file; CheckpointError if it is not, byte for byte, what was written."""
        content, expected = self._content(name), self.files[name]
        if len(content) != expected["bytes"]:
            raise CheckpointError(f"{self.folder}: {name} has {len(content)} of {expected['bytes']} bytes")
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{self.folder}: {name} is not what was written, its SHA-256 differs")
        return content

    def _content(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error.strerror}") from None

    def find_problem(self) -> str | None:
        """What is wrong with it, read from disk now; None if it is complete."""
        try:
            fresh = Checkpoint(self.folder)
            for name in fresh.files:
                fresh.read(name)
        except CheckpointError as error:
            return str(error).removeprefix(f"{self.folder}: ")
        return None

    def foreign_files(self) -> list[str]:
        """What lies in the folder and is no part of it: never read, and deleted when the folder is."""
        return sorted({path.name for path in self.folder.iterdir()} - {MANIFEST, *self.files})

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part ("model", ...) in host memory."""
        return safetensors.torch.load(self.read(f"{part}.safetensors"))

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of state.json."""
        return json.loads(self.read(STATE))

    @property
    def train_state(self) -> dict[str, Any]:
        """Where the run stood, as the trainer gave it."""
        return self.state["train_state"]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration under which it was saved."""
        return self.state["config"]


def step_dir(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """What goes by the name of a complete checkpoint in `folder`, oldest first; nothing is verified."""
    named = [Checkpoint(path) for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(named, key=lambda checkpoint: checkpoint.step)


def latest_complete(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`; None if there never was one.

    What a killed run left half done is tidied up and damaged ones are set aside; a warning names them.
    CheckpointError if only damaged ones are left: a run never silently begins anew. OSError as usual.
    """
    if not folder.is_dir():
        return None
    _tidy(folder)
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = checkpoint.find_problem()
        if problem is None:
            for path, reason in damaged:
                _quarantine(path, reason)
            if foreign := checkpoint.foreign_files():
                logger.warning("%s: ignored, as not part of it: %s", checkpoint.folder, ", ".join(foreign))
            return checkpoint
        damaged.append((checkpoint.folder, problem))
    damaged += [(path, "set aside earlier") for path in sorted(folder.glob(f"step_*{DAMAGED}*"))]
    if damaged:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in damaged)
        raise CheckpointError(
            f"{folder}: no complete checkpoint is left:\n{lines}\n"
            "Put a copy of a complete one there to go on from it; to begin anew, remove that folder or "
            "choose another model_params.name."
        )
    return None


def _tidy(folder: Path) -> None:
    for path in folder.glob(f"step_*{PARTIAL}"):
        logger.warning("%s was being written when the run ended: removed", path)
        shutil.rmtree(path)
    for path in folder.glob(f"step_*{OLD}"):
        final = path.with_name(path.name.removesuffix(OLD))
        if not final.exists() and Checkpoint(path).find_problem() is None:
            path.rename(final)  # killed before another took its place
            files.sync_directory(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _quarantine(path: Path, problem: str) -> None:
    aside = path.with_name(path.name + DAMAGED)
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-again")
    path.rename(aside)
    logger.warning("%s is damaged (%s): set aside as %s", path, problem, aside.name)


def write_checkpoint(folder: Path, parts: dict[str, dict[str, Tensor]], state: bytes) -> None:
    """Write a checkpoint under its temporary name, verify it from disk, then give it its own name.

    OSError and CheckpointError leave nothing half done behind; a checkpoint of the same name stays until the
    new one has been verified.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        first = not folder.parent.exists()
        partial.mkdir(parents=True)
        if first:
            files.sync_directory(folder.parent.parent)
        # Serialised in memory: save_file gives its files the owner's permissions only, whatever the umask.
        entries = {}
        for part, tensors in parts.items():
            name = f"{part}.safetensors"
            entries[name] = _write_file(partial / name, safetensors.torch.save(tensors))
        entries[STATE] = _write_file(partial / STATE, state)
        _write_file(partial / MANIFEST, _manifest(entries))
        files.sync_directory(partial)
        if problem := Checkpoint(partial).find_problem():
            raise CheckpointError(f"{partial}: cannot be read back as it was written: {problem}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back
        raise
    old = _move_aside(folder) if folder.exists() else None
    partial.rename(folder)
    files.sync_directory(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints and the one with the lowest test loss."""
    kept = list_checkpoints(folder)
    losses = {}
    for checkpoint in kept:
        try:
            losses[checkpoint.step] = checkpoint.state["test_loss"]
        except CheckpointError as error:
            logger.warning("%s", error)
    tested = {step: loss for step, loss in losses.items() if loss is not None}
    best = min(tested, key=lambda step: (tested[step], step), default=None)
    for checkpoint in kept[:-keep]:
        if checkpoint.step != best:
            _delete(checkpoint.folder)


def _delete(folder: Path) -> None:
    """Delete a checkpoint such that a kill in between leaves nothing damaged under its name."""
    # What cannot be deleted now (a file that is open over NFS) goes at the next start.
    shutil.rmtree(_move_aside(folder), ignore_errors=True)


def _move_aside(folder: Path) -> Path:
    old = folder.with_name(folder.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    return old


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    files.write_new(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(files: dict[str, dict[str, Any]]) -> bytes:
    """The manifest's bytes. It vouches for itself too: only exactly these are accepted when it is read."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=1).encode()


def select(folder: Path, name: str) -> Checkpoint:
    """The `best` (by test loss), the `last`, or the checkpoint of step `name` among the complete ones.

    CheckpointError, naming what is there, if there is none of that name, or if it may be a damaged one.
    """
    complete = {}
    for one in list_checkpoints(folder):
        problem = one.find_problem()
        if problem is None:
            complete[str(one.step)] = one
        elif name in ("best", "last", str(one.step)):
            raise CheckpointError(f"{one.folder}: {problem}; allowed: the step of another one")
    losses = {step: one.state["test_loss"] for step, one in complete.items()}
    tested = {step: loss for step, loss in losses.items() if loss is not None}
    choices = dict(complete)
    if complete:
        choices["last"] = max(complete.values(), key=lambda one: one.step)
    if tested:
        choices["best"] = complete[min(tested, key=lambda step: (tested[step], int(step)))]
    if name not in choices:
        raise CheckpointError(
            f"{folder}: found no '{name}', allowed: {', '.join(choices) or 'none is there'}"
        )
    return choices[name]
