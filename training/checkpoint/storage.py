"""One checkpoint as a folder: written completely or not at all, and trusted only if its manifest matches.

Every file is safetensors or JSON; nothing is ever unpickled. `manifest.json`, written last, holds the size
and the SHA-256 of every other file. A complete checkpoint is named `step_00001234`; it counts from the moment
it gets that name. Beside it there may be `step_N.partial` (being written or deleted), `step_N.old` (being
replaced) and `step_N.damaged` (quarantined).
"""

from __future__ import annotations

import system
from system import UserError

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch

from training.checkpoint.tensors import Parts

FORMAT = 2
"""Format of state.json that this version writes. Format 1, which has no `format` key, is still read."""

RENAMED_SINCE_FORMAT_1 = {
    "progress": "train_state",
    "identity": "data_identity",
    "circumstances": "environment",
    "awaiting_test": "evaluation_pending",
    "tests_without_better": "evaluations_without_improvement",
    "ended_early": "stopped_early",
    "processes": "num_processes",
}
PARTS = ("model", "optimizer", "random", "extra")
"""The tensor files of a checkpoint, each PART.safetensors."""

MANIFEST, STATE = "manifest.json", "state.json"
NOT_RESTORED = "cannot be restored by this version of the program; use the one that saved it"
PARTIAL, OLD, DAMAGED = ".partial", ".old", ".damaged"
logger = logging.getLogger(__name__)


class DamagedError(UserError):
    """A checkpoint that is not what was written; the message names its folder and file."""


@dataclass(frozen=True)
class Checkpoint:
    """One folder that holds the state of a run. Each file is read and verified once, and then kept."""

    folder: Path

    @contextmanager
    def explain(self, problem: str = NOT_RESTORED, kind: type[UserError] = UserError) -> Iterator[None]:
        """Report whatever fails as a `kind` of UserError that names this folder, the problem and its cause.

        Errors that users can fix and those of the storage are raised as they are.
        """
        try:
            yield
        except (UserError, OSError):
            raise
        except Exception as error:
            raise kind(f"{self.folder}: {problem}: {type(error).__name__}: {error}") from error

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """`bytes` and `sha256` of each file."""
        files: dict[str, dict[str, Any]] = json.loads(self._content(MANIFEST))["files"]
        return files

    def read(self, name: str) -> bytes:
        """The content of one file. Raises DamagedError if any byte was changed."""
        with self.explain(f"{MANIFEST} is not what was written", DamagedError):
            size, digest = self.files[name]["bytes"], self.files[name]["sha256"]
        content = self._content(name)
        if len(content) != size:
            raise DamagedError(f"{self.folder}: {name} has {len(content)} of {size} bytes")
        if hashlib.sha256(content).hexdigest() != digest:
            raise DamagedError(f"{self.folder}: {name} is not what was written: its SHA-256 differs")
        return content

    def _content(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            # Any other error (permissions, a storage that fails) does not make the checkpoint a damaged one.
            raise DamagedError(f"{self.folder}: {name} cannot be read: {error.strerror}") from None

    @property
    def ends_a_training(self) -> bool:
        """Whether a training ended here; it may have been extended since."""
        state = self.train_state
        between_epochs = not (state["step_in_epoch"] or state["evaluation_pending"])
        return between_epochs and (state["epoch"] >= state["target_epoch"] or state["stopped_early"])

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of state.json in the current format, whatever format it was written in.

        Raises DamagedError if it was changed, UserError if a newer version of this program wrote it.
        """
        content = self.read(STATE)
        with self.explain(f"{STATE} cannot be read", DamagedError):
            state: dict[str, Any] = json.loads(content)
            if (number := state.get("format", 1)) > FORMAT:
                raise UserError(
                    f"{self.folder}: {STATE} has format {number}, which a newer version of this program "
                    f"wrote. Update the program: this version reads formats up to {FORMAT}."
                )
            return _renamed(state) if number == 1 else state

    @cached_property
    def parts(self) -> Parts:
        """The tensors of each part in host memory. Raises DamagedError if any was changed."""
        parts = {}
        for part in PARTS:
            content = self.read(f"{part}.safetensors")
            with self.explain(f"{part}.safetensors cannot be read", DamagedError):
                parts[part] = safetensors.torch.load(content)
        return parts

    def verify(self) -> None:
        """Read and verify every file. Raises DamagedError if any was changed."""
        with self.explain(f"{STATE} cannot be read", DamagedError):
            if self.folder.name.split(".")[0] != step_dir(self.folder.parent, self.step).name:
                raise DamagedError(f"{self.folder}: {STATE} was saved at step {self.step}")
        _ = self.parts

    def find_problem(self) -> str | None:
        """What is wrong with any file; None for a complete checkpoint.

        Raises UserError for the checkpoint of a newer version, OSError if the storage fails.
        """
        try:
            self.verify()
        except DamagedError as error:
            return str(error).removeprefix(f"{self.folder}: ")
        return None

    @property
    def train_state(self) -> dict[str, Any]:
        """The counters of the run, as the trainer passed them to `save`."""
        return self.state["train_state"]

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was saved."""
        return self.train_state["step"]

    @property
    def test_loss(self) -> float | None:
        """Loss of exactly these weights; None if they were not evaluated."""
        return None if self.train_state["step_in_epoch"] else self.train_state["test_loss"]


def _renamed(node: Any) -> Any:
    """A state of format 1 with the keys of format 2."""
    if not isinstance(node, dict):
        return node
    return {RENAMED_SINCE_FORMAT_1.get(key, key): _renamed(value) for key, value in node.items()}


def step_dir(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The folders that are named as complete checkpoints, oldest first; nothing is verified."""
    paths = [path for path in folder.glob("step_*") if re.fullmatch(r"step_[0-9]{8,}", path.name)]
    return [Checkpoint(path) for path in sorted(paths, key=lambda path: (len(path.name), path.name))]


def best_by_test_loss(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest test loss, the oldest of equals; None if none was evaluated."""
    evaluated = [checkpoint for checkpoint in checkpoints if checkpoint.test_loss is not None]
    return min(evaluated, key=lambda checkpoint: (checkpoint.test_loss, checkpoint.step), default=None)


def latest_complete(folder: Path, accept: Callable[[Checkpoint], None]) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`; None if there never was one.

    If `accept` does not raise, removes what a killed run left incomplete and quarantines damaged checkpoints,
    with a warning for each.

    Raises:
        UserError: a newer version saved the checkpoint, or only damaged ones are left: a run never silently
            starts again.
        OSError: a folder cannot be read or renamed.
    """
    for path in folder.glob(f"step_*{OLD}"):
        if not (final := path.with_suffix("")).exists():
            path.rename(final)  # killed before the new one got the name
            system.sync_directory(folder)
    damaged: list[tuple[Path, str]] = []
    latest = None
    for checkpoint in reversed(list_checkpoints(folder)):
        if (problem := checkpoint.find_problem()) is None:
            latest = checkpoint
            accept(latest)
            break
        damaged.append((checkpoint.folder, problem))
    else:
        quarantined = sorted(folder.glob(f"step_*{DAMAGED}*"))
        if damaged or quarantined:
            lines = [f"{path}: {problem}" for path, problem in damaged]
            lines += [f"{path}: quarantined earlier" for path in quarantined]
            raise UserError(
                "\n  ".join([f"{folder}: no complete checkpoint is left:", *lines])
                + "\nTo resume, copy a complete checkpoint there. To start again, remove that folder or "
                "choose another model_params.name."
            )
    for path in (*folder.glob(f"step_*{PARTIAL}"), *folder.glob(f"step_*{OLD}")):
        logger.warning("%s was being written or deleted when the run ended: removed", path)
        shutil.rmtree(path, ignore_errors=True)
    for path, problem in damaged:
        target = path.with_name(path.name + DAMAGED)
        while target.exists():
            target = target.with_name(f"{target.name}-again")
        path.rename(target)
        logger.warning("%s is damaged (%s): renamed to %s", path, problem, target.name)
    return latest


def write_checkpoint(folder: Path, parts: Parts, state: bytes) -> None:
    """Write a checkpoint under a temporary name, verify it from disk, then rename it to `folder`.

    A checkpoint of the same name stays until the new one is verified. Raises OSError or DamagedError, with
    nothing incomplete left.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.parent.exists():
            folder.parent.mkdir()  # not its parents: a run that was renamed gets no second folder
            system.sync_directory(folder.parent.parent)
        partial.mkdir()
        files = {}
        for part in PARTS:
            # Serialized in memory: save_file creates files that only the owner may read, whatever the umask.
            content = safetensors.torch.save(parts[part])
            files[f"{part}.safetensors"] = _write_file(partial / f"{part}.safetensors", content)
        files[STATE] = _write_file(partial / STATE, state)
        _write_file(partial / MANIFEST, json.dumps({"files": files}, indent=1).encode())
        system.sync_directory(partial)
        if problem := Checkpoint(partial).find_problem():
            raise DamagedError(f"{partial}: what was written cannot be read back: {problem}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees the space on a full disk
        raise
    old = _move_aside(folder, OLD) if folder.exists() else None
    partial.rename(folder)
    system.sync_directory(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    system.write_new(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, the best, and those at the end of a training."""
    checkpoints, readable = list_checkpoints(folder), []
    for checkpoint in checkpoints:
        with suppress(UserError):
            _ = checkpoint.state
            readable.append(checkpoint)
    best = best_by_test_loss(readable)
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best and not (checkpoint in readable and checkpoint.ends_a_training):
            # A kill in between leaves nothing damaged under its name. What cannot be deleted now (a file that
            # is open over NFS) is deleted when the run is resumed.
            shutil.rmtree(_move_aside(checkpoint.folder, PARTIAL), ignore_errors=True)


def _move_aside(folder: Path, suffix: str) -> Path:
    aside = folder.with_name(folder.name + suffix)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def select(folder: Path, name: str) -> Checkpoint:
    """The `best` checkpoint (by test loss), the `last`, or that of step `name`, verified.

    Raises UserError if there is none, naming those that exist, or if it is damaged.
    """
    checkpoints = list_checkpoints(folder)
    choices = {
        str(int(checkpoint.folder.name.removeprefix("step_"))): checkpoint for checkpoint in checkpoints
    }
    if checkpoints:
        choices["last"] = checkpoints[-1]
    try:
        if name not in choices and (best := best_by_test_loss(checkpoints)) is not None:
            choices["best"] = best
        if name in choices:
            choices[name].verify()
            return choices[name]
    except DamagedError as error:
        raise UserError(f"{error}. Select another checkpoint by its step.") from None
    allowed = ", ".join(choices) or "none, there are none"
    raise UserError(f"{folder}: found no checkpoint '{name}', allowed: {allowed}")
