"""The experiment file: every parameter with its type, default and meaning, or one clear error."""

from __future__ import annotations

import system
from system import UserError

import difflib
import math
import re
from collections.abc import Collection, Sequence
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

from models import NetworkSettings
from training.distributed.launch import name_setting

# Upper bounds keep every product of two settings far inside 64-bit integers.
Count = Annotated[int, Field(ge=1, le=10**9)]
Seeds = Annotated[int, Field(ge=1, le=10**6)]
PathText = Annotated[
    str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$"), AfterValidator(system.expand_path)
]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]

MAX_ERROR_LINES = 20
MAX_VALUE_LENGTH = 80  # characters of a value that an error message shows


class Section(BaseModel):
    """One section of the experiment file: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelParams(Section):
    """The network."""

    architecture: Annotated[str, Field(max_length=64)]
    """RACOON (RACCOON is the same network), PENGUIN or LYNX, case-insensitive"""
    layer_param: Annotated[int, Field(ge=1, le=4096)]
    """width of the network"""
    dropout: Probability
    """dropout probability on the fully connected layers (LYNX: on the log powers)"""
    name: Annotated[str, Field(max_length=200)]
    """name of the run and of its folder under log_dir; letters, digits, `.`, `_`, `-`"""
    activation: str = "relu"
    """activation of the hidden layers: `relu`, `leaky_relu`, `elu`, `gelu`, `silu`; no effect on LYNX"""
    padding: Literal["zeros", "circular"] = "zeros"
    """padding of the convolutions; `circular` for the periodic box; no effect on RACOON"""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or set(name) == {"."}:
            raise ValueError("letters, digits, '.', '_' and '-', and no folder such as '..'")
        return name


class Synthetic(Section):
    """A synthetic universe, written to `datafile` once if that file is absent."""

    size: int = Field(64, ge=64, le=4096, multiple_of=64)
    """cells along each side of a cube"""
    physics: Literal["toy", "linear", "late"] = "toy"
    """how the twins differ. `linear`: as linear theory predicts without radiation treatment; `late`: as
    measured with it; `toy`: more, with the opposite sign"""
    strength: float = Field(1.0, ge=0)
    """factor on the difference of the twins; 1 is physical for `linear`"""
    grid: float = Field(0.0, ge=0, le=50)
    """lattice effect in units of that of gevolution twins with 64^3 cells"""
    resolution: float = Field(0.0, ge=0, le=50)
    """isotropic excess near the Nyquist wavenumber, in units of that of gevolution twins"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of the universe"""


class DataParams(Section):
    """The simulations."""

    datafile: PathText
    """HDF5 file of cubes"""
    local_copy: PathText | None = None
    """copy of `datafile` on a disk of the host; read if it exists"""
    train_seeds: Seeds
    """seeds 0 to `train_seeds` - 1 train"""
    test_seeds: Seeds
    """the next `test_seeds` seeds test"""
    validation_seeds: Annotated[int, Field(ge=0, le=10**6)] = 0
    """training seeds, the last ones, held out for every selection; test seeds are then evaluated once, at the
    end of the training"""
    newton_augmentation: Annotated[float, Field(gt=0, le=1e6)]
    """factor on the Newtonian slices after standardization; other than 1 only to test the pipeline"""
    standardize: Literal["none", "train"] = "none"
    """`none`: the file is standardized; `train`: by mean and standard deviation of the training cubes"""
    whiten: Literal["none", "isotropic"] = "none"
    """`isotropic`: divide slices by the square root of the training slices' power spectrum, and remove their
    mean and the modes from the Nyquist wavenumber on"""
    cache: Literal["auto", "disk", "memory", "device"] = "auto"
    """where cubes are held during training; the result is the same"""
    channels: Count = 1
    """adjacent slices stacked as channels, of each field of the file"""
    axes: list[Annotated[int, Field(ge=0, le=2)]] = Field([0, 1, 2], min_length=1)
    """axes of the cube that are sliced"""
    symmetries: bool = True
    """random flips and quarter-turns in training"""
    shifts: bool = False
    """random periodic shifts along both axes of a slice in training"""
    pairs: bool = False
    """both twins of a slice in the same batch, with the same symmetry and shift"""
    synthetic: Synthetic | None = None
    """`size`, `physics`, `strength`, `grid`, `resolution`, `seed` of a synthetic universe if `datafile` is
    absent"""

    @property
    def train_range(self) -> range:
        """Seeds that train."""
        return range(self.train_seeds - self.validation_seeds)

    @property
    def validation_range(self) -> range:
        """Seeds that select; may be empty."""
        return range(self.train_seeds - self.validation_seeds, self.train_seeds)

    @property
    def test_range(self) -> range:
        """Seeds that test."""
        return range(self.train_seeds, self.train_seeds + self.test_seeds)

    @field_validator("axes")
    @classmethod
    def _no_axis_twice(cls, axes: list[int]) -> list[int]:
        if len(set(axes)) != len(axes):
            raise ValueError("each axis at most once")
        return sorted(axes)

    @model_validator(mode="after")
    def _leaves_training_seeds(self) -> DataParams:
        if self.validation_seeds >= self.train_seeds:
            raise ValueError(
                f"validation_seeds {self.validation_seeds} leaves none of train_seeds {self.train_seeds}"
            )
        return self


class TrainParams(Section):
    """The training."""

    epochs: Count
    """epochs to train; an interrupted run trains the remaining ones, a finished run as many again, with its
    schedule from the start"""
    lr: Positive
    """learning rate of Adam"""
    log_dir: PathText
    """folder of runs; TensorBoard reads it"""
    batch_size: Annotated[int, Field(ge=2, le=10**6)] = 64
    """slices per optimizer step, over all processes"""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.5,
        0.999,
    ]
    """decay rates of Adam"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-11
    """weight decay of Adam"""
    schedule: Literal["none", "cosine"] = "none"
    """learning-rate schedule: `none` (constant) or `cosine` (half a cosine down to zero)"""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """epochs of linear warm-up"""
    gradient_clipping: Positive | None = None
    """maximum norm of the gradient"""
    gradient_accumulation_steps: Count | None = None
    """micro-batches per batch, to save memory; batch normalization sees each alone; unset: Accelerate's"""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """`no`, `fp16` or `bf16`; unset: Accelerate's"""
    label_smoothing: BelowOne = 0.0
    """labels become label * (1 - s) + s / 2"""
    test_every: Count = 2
    """epochs between evaluations; the last epoch is always evaluated"""
    early_stopping: Count | None = None
    """evaluations without a lower loss after which training stops"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """determines every random choice"""
    trackers: list[Annotated[str, Field(min_length=1, max_length=64)]] = []
    """Accelerate trackers beside TensorBoard: `wandb`, `mlflow`, `trackio`"""
    log_every_steps: Count | None = None
    """steps between log lines and scalars within an epoch; unset: a line every 30 s, 200 points per epoch"""
    save_every_steps: Count | None = None
    """steps between checkpoints, beside those after every epoch"""
    save_every_minutes: Positive = 10.0
    """maximum minutes between checkpoints"""
    keep_checkpoints: Count = 3
    """newest checkpoints to keep, beside the best one"""
    max_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """minutes after which the run saves and stops, to be resumed; longer than an evaluation takes"""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile: `auto` (on a GPU, if it works there), true, false"""
    sync_batch_norm: Literal["auto", True, False] = "auto"
    """batch normalization over all processes: `auto` (more than one), true, false"""
    deterministic: bool = False
    """deterministic GPU kernels only, for an exact resume there; slower"""

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

    def network_settings(self, shape: Sequence[int], octaves: int = 0) -> NetworkSettings:
        """The settings of the network for cubes of this shape, (N, N, N) or (C, N, N, N).

        `octaves` are those of a run that exists, see `NetworkSettings`. Raises UserError if
        there are more channels than slices along an axis.
        """
        channels, size = self.data_params.channels, shape[-1]
        if channels > size:
            raise UserError(
                f"data_params.channels: found {channels}, allowed: at most {size}, the cube's side"
            )
        settings = self.model_params.model_dump(exclude={"name"})
        channels *= math.prod(shape[:-3])
        return NetworkSettings(**settings, channels=channels, size=size, octaves=octaves)

    def to_dict(self) -> dict[str, Any]:
        """Every key with its resolved value, as YAML and JSON hold it."""
        return self.model_dump(mode="json")

    def with_launch_settings(
        self, processes: int, mixed_precision: str, accumulation: int, device: str = "cpu"
    ) -> Config:
        """This experiment with the settings of the accelerate configuration filled in.

        Raises UserError if a batch cannot be split into equal parts of at least two slices (two pairs, with
        data_params.pairs), or if the device lacks the precision.
        """
        if device == "cpu" and mixed_precision == "fp16":
            source = "train_params.mixed_precision"
            if self.train_params.mixed_precision is None:
                source = name_setting("mixed_precision")
            raise UserError(f"{source}: found fp16, allowed on a CPU: no, bf16")
        batch, parts = self.train_params.batch_size, processes * accumulation
        multiple = parts * (2 if self.data_params.pairs else 1)
        if batch % multiple or batch // parts < 2:
            steps = "gradient_accumulation_steps"
            if accumulation > 1 and self.train_params.gradient_accumulation_steps is None:
                steps = name_setting(steps)
            raise UserError(
                f"train_params.batch_size: found {batch}, allowed: a multiple of {multiple}, at least "
                f"{2 * parts} ({processes} processes, {steps} {accumulation}"
                f"{', pairs' if self.data_params.pairs else ''})"
            )
        resolved = {"mixed_precision": mixed_precision, "gradient_accumulation_steps": accumulation}
        return self.model_copy(update={"train_params": self.train_params.model_copy(update=resolved)})

    def save(self) -> None:
        """Write `config.yaml` into the run's folder. Raises OSError."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        system.write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(self.to_dict(), sort_keys=False))


# Keys that may change when a run resumes, since they do not change what it computes.
MAY_CHANGE = {
    "model_params.name",
    "data_params.datafile",  # a file may move: the fingerprint of its cubes is compared instead
    "data_params.local_copy",
    "data_params.cache",
    "data_params.synthetic",
    "train_params.epochs",
    "train_params.log_dir",
    "train_params.test_every",
    "train_params.early_stopping",
    "train_params.trackers",
    "train_params.log_every_steps",
    "train_params.save_every_steps",
    "train_params.save_every_minutes",
    "train_params.keep_checkpoints",
    "train_params.max_minutes",
    "train_params.compile",
}
# The same for the programs that start many runs: these two change which runs there are.
MAY_CHANGE_IN_SERIES = MAY_CHANGE - {"train_params.epochs", "data_params.datafile"}


# PyYAML passes the errors of Python for some malformed dates, numbers, keys, tags and nestings.
YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, RecursionError, KeyError, AttributeError)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, 010 is ten, and a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Reject duplicate keys, of which YAML would silently take the last."""
        self.flatten_mapping(node)
        seen: set[Any] = set()
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key '{key}'", key_node.start_mark
                )
            seen.add(key)
            _require_quotes(value_node, f"{key}: ")
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Reject values that only look like text."""
        _require_quotes(node)
        return super().construct_object(node, deep)


def _require_quotes(node: yaml.Node, key: str = "") -> None:
    """Raise an error for 2025-01-30, 1:30 and 0xFF, of which YAML makes a date, 90 and 255."""
    kind = node.tag.rpartition(":")[2]
    number = isinstance(node, yaml.ScalarNode) and re.fullmatch(r"[^:xXbB]*", node.value)
    if kind == "timestamp" or (kind in ("int", "float") and not number):
        kind = "a date" if kind == "timestamp" else "a number that is not decimal"
        message = f"{key}found {node.value}, which YAML reads as {kind}; put it in quotes"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value).replace("_", "")))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The experiment in the YAML file `path`, with `section.key=value` overrides applied.

    Raises UserError for a file that cannot be read and for any invalid key or value.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        others = sorted(str(other) for other in Path(path).parent.glob("*.yaml"))
        raise UserError(
            f"{_shorten(path)}: the experiment file cannot be read: {_shorten(error)}"
            + (f"\nExperiments there: {', '.join(others[:10])}" if others else "")
        ) from error
    except YAML_ERRORS as error:
        raise UserError(f"{path}: not valid YAML: {_explain_yaml(error)}") from error
    sections = ", ".join(Config.model_fields)
    if not isinstance(raw, dict):
        content = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"{path}: found {content}, allowed: a mapping of the sections {sections}")
    for override in overrides or []:
        _apply(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(problem) for problem in error.errors()))
        if len(lines) > MAX_ERROR_LINES:
            lines[MAX_ERROR_LINES - 1 :] = [f"... and {len(lines) - MAX_ERROR_LINES + 1} more errors"]
        raise UserError(f"{path}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set the key that `override` names in `raw`."""
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not sections or not all([*sections, last]):
        raise UserError(f"override: found '{_shorten(override)}', allowed: section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except YAML_ERRORS as error:
        raise UserError(
            f"override '{_shorten(override)}': the value is not valid YAML: {_explain_yaml(error)}"
        ) from error
    mapping = raw
    for section in sections:
        if mapping.get(section) is None:
            mapping[section] = {}
        mapping = mapping[section]
        if not isinstance(mapping, dict):
            raise UserError(f"override '{_shorten(override)}': '{_shorten(section)}' is not a section")
    mapping[last] = value


def _explain_yaml(error: Exception) -> str:
    """The problem that PyYAML encountered, with its line and column."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return _shorten(error)
    places = [(error.context, error.context_mark), (error.problem, error.problem_mark)]
    lines = [
        f"line {mark.line + 1}, column {mark.column + 1}: {text}" for text, mark in places if mark and text
    ]
    hint = ". Indent with spaces, not tabs" if "'\\t'" in error.problem else ""
    if "quoted scalar" in str(error.context) or "found '<scalar>'" in error.problem:
        hint = ". A quote there or before is not closed"
    return "; ".join(lines) + hint


def _shorten(value: object) -> str:
    """A value as text of at most MAX_VALUE_LENGTH characters."""
    try:
        text = str(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"an integer of {int(math.log10(abs(value)))} digits" if isinstance(value, int) else "a value"
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 3]}..."


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors: the key, what was found, what is allowed."""
    location = [str(part) for part in error["loc"]]
    key = _shorten(".".join(part for part in location if part.isidentifier()))
    value = error["input"]
    shown = _shorten(repr(value) if not isinstance(value, int) else value)
    if error["type"] == "string_type" and isinstance(value, bool | int | float):
        return f"{key}: found {shown} ({type(value).__name__}), allowed: text; put it in quotes"
    if error["type"] == "extra_forbidden":
        keys = _keys(location[:-1])
        near = difflib.get_close_matches(location[-1][:MAX_VALUE_LENGTH], keys, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(keys)}"
        return f"{key or _shorten(location[-1])}: unknown {'key' if len(location) > 1 else 'section'}{hint}"
    if error["type"] == "missing":
        return f"{key}: missing; it is required"
    allowed = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] in ("model_type", "model_attributes_type"):
        allowed = "a mapping of keys to values"
    described = f"{shown} ({type(value).__name__})"
    if value is None or isinstance(value, dict):
        described = "an empty value" if value is None else "this combination"
    return f"{key}: found {described}, allowed: {allowed}"


def _keys(section: list[str]) -> list[str]:
    """The keys of `section` (a path of names; empty: the top level)."""
    model: type[BaseModel] = Config
    for name in section:
        model = SECTIONS.get(name, model)
    return list(model.model_fields)


SECTIONS: dict[str, type[BaseModel]] = {
    "model_params": ModelParams,
    "data_params": DataParams,
    "train_params": TrainParams,
    "synthetic": Synthetic,
}


def check_same_settings(
    path: Path,
    saved: dict[str, Any],
    current: dict[str, Any],
    may_change: Collection[str] = MAY_CHANGE,
) -> None:
    """Raise UserError that lists each setting by which `current` would change the result of a saved run.

    `path` is the run, or the file of the saved experiment. Keys in `may_change` are not compared. A key that
    did not exist when the run was saved had its default.
    """
    lines = []
    for section in Config.model_fields:
        fields = SECTIONS[section].model_fields
        for key in sorted({*saved.get(section, {}), *current.get(section, {})}):
            default = fields[key].get_default(call_default_factory=True) if key in fields else None
            before, now = saved.get(section, {}).get(key, default), current.get(section, {}).get(key, default)
            if f"{section}.{key}" not in may_change and before != now:
                lines.append(f"{section}.{key}: the run has {before!r}, this experiment {now!r}")
    if lines:
        raise UserError(
            f"{path}: this run was started with other settings:\n  "
            + "\n  ".join(lines)
            + "\nUse the same settings, or another model_params.name."
        )
