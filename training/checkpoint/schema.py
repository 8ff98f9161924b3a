"""The content of state.json and manifest.json as typed schemas, and the older formats of state.json."""

from __future__ import annotations

from system import UserError

import reprlib
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT = 2
"""Format of state.json that this version writes. Format 1, which has no `format` key, is still read."""

PARTS = ("model", "optimizer", "random", "extra")
"""The tensor files of a checkpoint, each PART.safetensors."""


class CheckpointError(UserError):
    """A state that cannot be saved or restored; the message names the folder, the problem and the fix."""


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer version of this program wrote. It is not damaged."""


class Section(BaseModel):
    """Strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]


class Calibration(Section):
    """What models.calibration fitted on the validation seeds."""

    temperature: Positive
    threshold: float
    cubes: Calibration | None = None
    axes: list[Calibration | None] = []


class SavedTrainState(Section):
    """The counters of a run: the fields of run.TrainState, which documents them.

    A field that was added later has a default, which older checkpoints get.
    """

    mean: float
    std: Positive
    power: list[float] | list[list[float] | None] | None = None
    calibration: Calibration | None = None
    epoch: Count
    step: Count
    step_in_epoch: Count
    seconds: float
    waiting_seconds: float = 0.0
    running_sums: Annotated[list[float], Field(min_length=3, max_length=3)] = [0.0, 0.0, 0.0]
    evaluation_pending: bool
    first_epoch: Count
    target_epoch: Count
    test_loss: float | None
    best_loss: float | None
    evaluations_without_improvement: Count
    stopped_early: bool
    tracker_runs: dict[str, str] = {}

    @model_validator(mode="after")
    def _steps_add_up(self) -> SavedTrainState:
        """Every epoch of a run has the same number of steps."""
        steps, rest = divmod(self.step - self.step_in_epoch, max(self.epoch, 1))
        if rest or (self.epoch and self.step_in_epoch >= steps) or (not self.epoch and steps):
            raise ValueError(f"step {self.step} is not step {self.step_in_epoch} after {self.epoch} epochs")
        return self


class GradScalerState(Section):
    """What torch.amp.GradScaler.state_dict returns."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Positive
    growth_interval: Count
    growth_tracker: Count = Field(alias="_growth_tracker")


class DataIdentity(Section):
    """What identifies the cubes: CubeFile.identity. It may hold further keys, which are compared too."""

    model_config = ConfigDict(extra="allow")

    path: str
    bytes: Count
    shape: Annotated[list[Count], Field(min_length=3, max_length=3)]
    seeds: Annotated[list[Count], Field(min_length=2, max_length=2)]
    fingerprint: str


class Environment(Section):
    """What the last bits of a training depend on besides its settings."""

    num_processes: Annotated[Count, Field(ge=1)]
    device: str
    python: str
    torch: str
    accelerate: str


class State(Section):
    """state.json."""

    format: Literal[2]
    train_state: SavedTrainState
    test_loss: float | None
    """Test loss of exactly these weights; None if they were not evaluated."""
    scaler: GradScalerState | None
    data_identity: DataIdentity
    config: dict[str, dict[str, Any]]
    """The resolved experiment."""
    environment: Environment


class FileEntry(Section):
    """Size and hash of one file."""

    bytes: Count
    sha256: str


class Manifest(Section):
    """manifest.json."""

    files: dict[str, FileEntry]
    sha256: str
    """Hash of `files`."""


RENAMED_SINCE_FORMAT_1 = {
    "progress": "train_state",
    "identity": "data_identity",
    "circumstances": "environment",
    "awaiting_test": "evaluation_pending",
    "tests_without_better": "evaluations_without_improvement",
    "ended_early": "stopped_early",
    "processes": "num_processes",
}


def parse_state(content: bytes) -> dict[str, Any]:
    """The content of a state.json of any known format, as the current format.

    Raises NewerFormatError for a format of a newer version, and ValueError for anything else that is not the
    state of a run.
    """
    raw = pydantic_core.from_json(content, allow_inf_nan=False)  # limits the depth, unlike json.loads
    if not isinstance(raw, dict):
        raise ValueError(f"found {type(raw).__name__}, allowed: an object")
    number = raw.get("format")
    if type(number) is int and FORMAT < number < 2**31:
        raise NewerFormatError(
            f"state.json has format {number}, which a newer version of this program wrote. Update the "
            f"program: this version reads formats up to {FORMAT}."
        )
    if "format" not in raw:
        raw = _renamed(raw) | {"format": FORMAT}
    try:
        return State.model_validate(raw).model_dump(by_alias=True)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None


def parse_manifest(content: bytes) -> dict[str, dict[str, Any]]:
    """The `files` of a manifest.json; ValueError if it is not one."""
    return Manifest.model_validate(pydantic_core.from_json(content)).model_dump()["files"]


def _renamed(raw: dict[str, Any]) -> dict[str, Any]:
    """A state of format 1 with the keys of format 2."""
    state = {RENAMED_SINCE_FORMAT_1.get(key, key): value for key, value in raw.items()}
    for section in ("train_state", "environment"):
        if isinstance(values := state.get(section), dict):
            state[section] = {RENAMED_SINCE_FORMAT_1.get(key, key): value for key, value in values.items()}
    return state


def _first_problem(error: ValidationError) -> str:
    first, short = error.errors(include_url=False)[0], reprlib.Repr()
    short.maxstring = short.maxother = 60
    key = ".".join(str(part) for part in first["loc"])
    found = "" if first["type"] == "missing" else f", found {short.repr(first['input'])}"
    return f"{short.repr(key)}: {first['msg']}{found}"
