"""A trained network as a folder that works anywhere: `model.safetensors`, `config.json` and a model card.

The weights keep the names they have in the bare network, everything else is JSON, and nothing is ever
unpickled. The folder has the form of a repository of the Hugging Face Hub.
"""

from __future__ import annotations

import system
from system import UserError

import hashlib
import json
import logging
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

import models
from models.calibration import Calibration
from models.model_card import model_card
from models.whitening import Whitening

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HASH = "weights_sha256"
ONNX_TOLERANCE = 1e-4


class TrainedNetwork(nn.Module, PyTorchModelHubMixin):
    """A trained network that takes slices as the data file holds them, and calibrated probabilities.

    `mean` and `std` standardize the slices ((0, 1) if the file is standardized). `power`, the isotropic power
    spectrum P(n) of the training slices at n = 0, ..., N/2 - 1, whitens them (`Whitening`). `calibration`
    holds `temperature` and `threshold` of slices and, under `cubes`, those of the mean logits of cubes.
    `training`, `selection` (what selected the network; empty if unknown) and `evaluation` are records that
    change no result.
    """

    def __init__(
        self,
        *,
        architecture: str,
        layer_param: int,
        dropout: float = 0.0,
        activation: str = "relu",
        padding: str = "zeros",
        channels: int = 1,
        size: int = 256,
        mean: float = 0.0,
        std: float = 1.0,
        power: list[float] | None = None,
        calibration: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        selection: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "architecture": architecture,
            "layer_param": layer_param,
            "dropout": dropout,
            "activation": activation,
            "padding": padding,
            "channels": channels,
            "size": size,
        }
        self.mean, self.std, self.power = float(mean), float(std), power
        self.calibration = Calibration.from_dict(calibration) if calibration else Calibration(1.0, 0.0)
        self.is_calibrated = calibration is not None
        self.training_record, self.evaluation_record = training or {}, evaluation or {}
        self.selection_record = selection or {}
        self.whitening = Whitening(power) if power is not None else nn.Identity()
        self.network = models.build_model(**self.settings)

    def forward(self, slices: Tensor) -> Tensor:
        """Slices (b, channels, N, N) in the units of the data file -> logits (b,); positive means GR."""
        return self.network(self.whitening((slices - self.mean) / self.std))

    def probability(self, slices: Tensor) -> Tensor:
        """Slices (b, channels, N, N) -> calibrated probabilities of General Relativity (b,).

        Without calibration (no validation seeds in training) the sigmoid of the logit.
        """
        return self.calibration.probability(self(slices))

    def _save_pretrained(self, save_directory: Path) -> None:
        save(
            save_directory,
            self.network.state_dict(),
            settings=self.settings,
            mean=self.mean,
            std=self.std,
            power=self.power,
            calibration=asdict(self.calibration) if self.is_calibrated else None,
            training=self.training_record,
            selection=self.selection_record,
        )
        if self.evaluation_record:
            record_evaluation(save_directory, self.evaluation_record)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        # always strict: a network with some random weights left in it is worse than an error
        model.network.load_state_dict(_read_weights(Path(model_file)), strict=True)
        return model.to(map_location).eval()

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        # the mixin would fall back on this for a repository without safetensors
        raise UserError(f"{model_file}: pickled weights are never read; {WEIGHTS} is needed")


def save(
    folder: str | Path,
    state_dict: dict[str, Tensor],
    *,
    settings: dict[str, Any],
    mean: float,
    std: float,
    power: list[float] | None = None,
    calibration: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    selection: dict[str, Any] | None = None,
) -> None:
    """Write a network to `folder`; each file appears complete or not at all.

    `settings` are the arguments of `build_model`; `training` and `selection` are JSON-able records of how it
    was trained and what selected it.
    The other arguments are those of `TrainedNetwork`. Raises OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    weights = safetensors.torch.save(tensors, {"format": "pt"})
    config: dict[str, Any] = {**settings, "mean": mean, "std": std, "training": training or {}}
    if selection:
        config["selection"] = selection
    if power is not None:
        config["power"] = power
    if calibration is not None:
        config["calibration"] = calibration
    config[HASH] = hashlib.sha256(weights).hexdigest()
    system.write_atomically(folder / WEIGHTS, weights)
    _write_description(folder, config)


def load(folder: str | Path) -> TrainedNetwork:
    """The network in `folder`, in eval mode on the CPU. Raises UserError if it is missing or damaged."""
    folder = Path(folder)
    config = read_config(folder)
    parameters = set(TrainedNetwork._hub_mixin_init_parameters) - {"self"}
    try:
        network = TrainedNetwork(**{key: config[key] for key in parameters & set(config)})
        return TrainedNetwork._load_as_safetensor(network, str(folder / WEIGHTS), "cpu", strict=True)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: weights and {CONFIG} do not belong together: {error}") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of `config.json`. Raises UserError if it is missing or not what `save` writes."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(config, allow_nan=False)  # Python reads NaN and infinity, which are not JSON
    except OSError as error:
        raise UserError(
            f"{path}: no trained network is here ({error.strerror}). Give LOG_DIR/NAME/model of a "
            "finished run."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not valid JSON: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config or "layer_param" not in config:
        raise UserError(f"{path}: does not describe a network of gravity-cnn")
    return config


def record_evaluation(folder: str | Path, results: dict[str, Any]) -> None:
    """Add the results of an evaluation to `config.json` and the model card.

    `results`: `data` (name of the data), `seeds` [first, last + 1], `slices` (their number), `estimates`
    {key: [value, low, high]} with keys of `model_card.TITLES`, and any other JSON-able record.
    Raises UserError if `config.json` is missing or damaged.
    """
    folder = Path(folder)
    config = {**read_config(folder), "evaluation": results}
    try:
        _write_description(folder, config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder / CONFIG}: damaged ({type(error).__name__}: {str(error)[:200]}). Train the run again."
        ) from error


def weights_hash(folder: str | Path) -> str:
    """SHA-256 of the weights in `folder`, as recorded in `config.json`."""
    return str(read_config(folder).get(HASH))


def require_onnx() -> None:
    """Raise UserError if the packages that write and verify ONNX are not installed."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UserError(f'ONNX export needs {", ".join(missing)}: pip install -e ".[onnx]"')


def export_onnx(network: TrainedNetwork, path: str | Path) -> float:
    """Write `network` as ONNX with a free batch size; returns the largest difference from torch's logits.

    Raises UserError if packages are missing or the difference exceeds 1e-4 (relative to logits above 1).
    """
    require_onnx()
    import onnxruntime

    path = Path(path)
    settings, network = network.settings, network.cpu().eval()
    shape = (int(settings["channels"]), int(settings["size"]), int(settings["size"]))
    generator = torch.Generator().manual_seed(0)
    slices = torch.randn((5, *shape), generator=generator) * network.std + network.mean
    # the exporter lists the operators of torchvision that it lacks
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    program = torch.onnx.export(
        network,
        (slices[:3],),
        dynamo=True,
        input_names=["slices"],
        output_names=["logits"],
        dynamic_shapes={"slices": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    serialized = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = network(slices)
    found = torch.from_numpy(session.run(None, {"slices": slices.numpy()})[0])
    difference = float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
    if not difference <= ONNX_TOLERANCE:
        raise UserError(f"{path}: ONNX logits differ from torch's by {difference:.1e}; nothing was written")
    system.write_atomically(path, serialized)
    return difference


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in `path`, whose hash must be the one recorded in `config.json` beside it."""
    try:
        data = path.read_bytes()
        recorded = read_config(path.parent).get(HASH)
        if recorded and recorded != hashlib.sha256(data).hexdigest():
            raise UserError(
                f"{path}: damaged, its SHA-256 differs from the one in {CONFIG}. Copy or train it again."
            )
        return safetensors.torch.load(data)
    except OSError as error:
        raise UserError(f"{path}: the weights cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, not a safetensors file: {error}") from error


def _write_description(folder: Path, config: dict[str, Any]) -> None:
    system.write_atomically(folder / CARD, str(model_card(config)))
    system.write_atomically(folder / CONFIG, json.dumps(config, indent=2, allow_nan=False) + "\n")
