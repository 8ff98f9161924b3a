"""The experiment file: every parameter with its type, default and meaning, or one clear error."""

from __future__ import annotations

import difflib
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

import files

Count = Annotated[int, Field(ge=1)]
Seeds = Annotated[int, Field(ge=1, le=10**6)]
Place = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$"), AfterValidator(os.path.expanduser)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """An experiment file that cannot be used: which key, what was found and what is allowed."""


class Section(BaseModel):
    """One section of the experiment file: strict types, no unknown keys, unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelParams(Section):
    """The network."""

    architecture: str
    """RACOON (RACCOON is the same network), PENGUIN or another registered network, in any case."""
    layer_param: Annotated[int, Field(ge=1, le=4096)]
    """Width L of the network."""
    dropout: Fraction
    """Probability of dropout on the fully connected layers."""
    name: str
    """Name of the run, and of its folder under log_dir."""
    activation: str = "relu"
    """Activation after every hidden layer."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or set(name) == {"."}:
            raise ValueError("letters, digits, '.', '_' and '-', and no folder such as '..'")
        return name


class Synthetic(Section):
    """A synthetic universe, written to `datafile` once if that file is absent."""

    size: int = Field(64, ge=64, multiple_of=64)
    """Cells along each side of a cube."""
    strength: float = Field(1.0, ge=0)
    """Factor on the relativistic term by which the twins differ; 1 is physical."""
    seed: int = Field(0, ge=0)
    """The universe's own seed."""


class DataParams(Section):
    """The simulations."""

    datafile: Place
    """HDF5 file of cubes."""
    local_copy: Place | None = None
    """A copy of `datafile` on the host's own disk, which is read as long as it is there."""
    train_seeds: Seeds
    """Seeds [0, train_seeds) train."""
    test_seeds: Seeds
    """Seeds [train_seeds, train_seeds + test_seeds) test."""
    newton_augmentation: Annotated[float, Field(gt=0, le=1e6)]
    """Factor on the Newtonian slices after standardisation; other than 1 only to test the pipeline."""
    standardize: Literal["none", "train"] = "none"
    """`none`: the file is standardised. `train`: by mean and variance of the training cubes."""
    cache: Literal["auto", "disk", "memory", "device"] = "auto"
    """Where cubes live while training; the result is the same."""
    channels: Count = 1
    """Adjacent slices stacked as channels."""
    axes: list[Annotated[int, Field(ge=0, le=2)]] = Field([0, 1, 2], min_length=1)
    """Which of the cube's axes are cut."""
    symmetries: bool = True
    """Random flips and quarter-turns while training."""
    synthetic: Synthetic | None = None
    """If given and `datafile` is absent, a synthetic universe is written there once."""

    @property
    def slicing(self) -> dict[str, Any]:
        """How slices are cut from cubes, and from where."""
        return self.model_dump(include={"axes", "channels", "newton_augmentation", "symmetries", "cache"})

    @field_validator("axes")
    @classmethod
    def _each_axis_once(cls, axes: list[int]) -> list[int]:
        if len(set(axes)) != len(axes):
            raise ValueError("each axis at most once")
        return sorted(axes)


class TrainParams(Section):
    """The training."""

    epochs: Count
    """Epochs to train now; a finished run trains this many more, an interrupted one only what is left."""
    lr: Positive
    """Learning rate of Adam."""
    log_dir: Place
    """Folder of runs; TensorBoard reads it."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Slices per optimizer step, over all processes together."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
    """Adam's decay rates."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-11
    """Adam's weight decay."""
    schedule: Literal["none", "cosine"] = "none"
    """Learning rate over the epochs asked for: constant, or half a cosine down to zero."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs over which the learning rate first rises linearly from zero."""
    gradient_clipping: Positive | None = None
    """Largest norm of the gradient."""
    gradient_accumulation_steps: Count | None = None
    """Parts in which a batch is computed, to save memory; unset: as the accelerate configuration says."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast; unset: as the accelerate configuration says."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Labels become label * (1 - s) + s / 2."""
    test_every: Count = 2
    """Epochs between tests; the last epoch is always tested."""
    early_stopping: Count | None = None
    """Tests without a better test loss after which training ends."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Every random choice follows from it."""
    save_every_steps: Count | None = None
    """Steps between checkpoints, beside those at every epoch and test."""
    save_every_minutes: Positive = 10.0
    """Minutes after which a checkpoint is due at the latest."""
    keep_checkpoints: Count = 3
    """Newest checkpoints to keep, beside the best by test loss."""
    max_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Minutes after which the run saves and ends, to be continued."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile; auto: on a GPU, where batch normalisation is not synchronised."""
    sync_batch_norm: Literal["auto"] | bool = "auto"
    """Batch normalisation over all processes; auto: with more than one."""
    deterministic: bool = False
    """Only deterministic GPU kernels, so that a restart there is exact too; slower."""

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, betas: object) -> object:
        return tuple(betas) if isinstance(betas, list) else betas

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _unquoted_no(cls, precision: object) -> object:
        return "no" if precision is False else precision  # YAML reads an unquoted no as false

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainParams:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is longer than epochs {self.epochs}")
        return self


class Config(Section):
    """One experiment."""

    model_params: ModelParams
    data_params: DataParams
    train_params: TrainParams

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.train_params.log_dir) / self.model_params.name

    def model_arguments(self, size: int) -> dict[str, Any]:
        """What defines the network for cubes of `size` cells a side: the data knows the shape of a slice.

        Raises ConfigError if there are more channels than slices along an axis.
        """
        if self.data_params.channels > size:
            found = self.data_params.channels
            raise ConfigError(
                f"data_params.channels: found {found}, allowed: at most {size}, the cube's side"
            )
        shape = {"channels": self.data_params.channels, "size": size}
        return self.model_params.model_dump(exclude={"name"}) | shape

    def to_dict(self) -> dict[str, Any]:
        """Every key with its resolved value, as YAML and JSON hold it."""
        return self.model_dump(mode="json")

    def with_launch_settings(
        self, processes: int, mixed_precision: str, accumulation: int, device: str = "cpu"
    ) -> Config:
        """This experiment with what the accelerate configuration decides filled in.

        Raises ConfigError where a batch cannot be shared out in equal parts of at least two slices, or the
        device has no such precision.
        """
        if device == "cpu" and mixed_precision == "fp16":
            raise ConfigError("train_params.mixed_precision: found fp16, allowed on a CPU: no, bf16")
        batch, parts = self.train_params.batch_size, processes * accumulation
        if batch % parts or batch // parts < 2:
            raise ConfigError(
                f"train_params.batch_size: found {batch}, allowed: a multiple of {parts} and at least "
                f"{2 * parts} ({processes} processes, gradient_accumulation_steps {accumulation})"
            )
        decided = {"mixed_precision": mixed_precision, "gradient_accumulation_steps": accumulation}
        return self.model_copy(update={"train_params": self.train_params.model_copy(update=decided)})

    def save(self) -> None:
        """Write `config.yaml` into the run's folder. Raises OSError where that cannot be written."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(self.to_dict(), sort_keys=False))


# What may differ between a run and its continuation without changing what it computes.
MAY_CHANGE = {
    "data_params.datafile",  # the data's own identity is compared instead: a file may move
    "data_params.local_copy",
    "data_params.cache",
    "data_params.synthetic",
    "train_params.epochs",
    "train_params.log_dir",
    "train_params.test_every",
    "train_params.early_stopping",
    "train_params.save_every_steps",
    "train_params.save_every_minutes",
    "train_params.keep_checkpoints",
    "train_params.max_minutes",
    "train_params.compile",
}


# PyYAML lets some malformed dates, numbers, keys and nestings through to Python.
YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, 010 is ten, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice, of which YAML would silently take the last."""
        self.flatten_mapping(node)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value).replace("_", "")))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The experiment in the YAML file `path`, with `section.key=value` overrides applied.

    Raises ConfigError for a file that cannot be read and for any key or value that is not allowed.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the experiment file cannot be read: {error}") from error
    except YAML_ERRORS as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    sections = ", ".join(Config.model_fields)
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{path}: found {found}, allowed: a mapping of the sections {sections}")
    for override in overrides or []:
        _apply(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(one, raw) for one in error.errors()]
        raise ConfigError(f"{path}:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(lines))) from None


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set the key that `override` names in `raw`."""
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not sections or not all([*sections, last]):
        raise ConfigError(f"override: found '{override}', allowed: section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except YAML_ERRORS as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML: {error}") from error
    place = raw
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ConfigError(f"override '{override}': '{section}' is not a section")
    place[last] = value


def _explain(error: Any, raw: dict[str, Any]) -> str:
    """One line for one of pydantic's errors: the key, what was found, what is allowed."""
    location = [str(part) for part in error["loc"]]
    # pydantic adds the member of a union that it tried; keys of ours are all that a user typed or may type
    known = [part for part in location if part.isidentifier() and part not in {"bool", "float", "int", "str"}]
    key = ".".join(part for part in known if not part.startswith(("literal", "constrained", "function")))
    found = error["input"]
    if error["type"] == "string_type" and isinstance(found, bool | int | float):
        return f"{key}: found {found!r} ({type(found).__name__}), allowed: text; put it in quotes"
    if key == "train_params.compile" or key == "train_params.sync_batch_norm":
        return f"{key}: found {found!r}, allowed: 'auto', true or false"
    if key == "train_params.betas":
        return f"{key}: allowed: two numbers from 0 to below 1"
    if error["type"] == "extra_forbidden":
        allowed = _keys(location[:-1])
        near = difflib.get_close_matches(location[-1], allowed, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(allowed)}"
        return f"{key}: unknown {'key' if len(location) > 1 else 'section'}{hint}"
    if error["type"] == "missing":
        return f"{key}: missing; it is required"
    if isinstance(found, float) and not math.isfinite(found):
        return f"{key}: found {found}, allowed: a finite number"
    allowed_text = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "model_type" or error["type"] == "model_attributes_type":
        allowed_text = "a mapping of keys to values"
    shown = "an empty value" if found is None else f"{found!r} ({type(found).__name__})"
    if isinstance(found, dict):
        shown = "these values together"
    return f"{key}: found {shown}, allowed: {allowed_text}"


def _keys(section: list[str]) -> list[str]:
    """The keys that may stand in `section` (a path of names; empty: the top level)."""
    model: type[BaseModel] = Config
    for name in section:
        model = {**_SECTIONS}.get(name, model)
    return list(model.model_fields)


_SECTIONS: dict[str, type[BaseModel]] = {
    "model_params": ModelParams,
    "data_params": DataParams,
    "train_params": TrainParams,
    "synthetic": Synthetic,
}


def check_same_settings(run: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ConfigError with each setting that shapes the result and differs between `old` and `new`."""
    lines = []
    for section in Config.model_fields:
        for key in sorted({*old.get(section, {}), *new.get(section, {})}):
            before, now = old.get(section, {}).get(key), new.get(section, {}).get(key)
            if f"{section}.{key}" not in MAY_CHANGE and before != now:
                lines.append(f"{section}.{key}: the run has {before!r}, this experiment {now!r}")
    if lines:
        raise ConfigError(
            f"{run}: this run was started with other settings:\n  "
            + "\n  ".join(lines)
            + "\nallowed: the same settings, or another model_params.name"
        )
