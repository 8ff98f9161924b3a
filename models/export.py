"""A trained network as a folder that works anywhere: `model.safetensors`, `config.json` and a model card.

The weights keep the names they have in the bare network, the numbers live in JSON, and nothing is ever
unpickled. The folder has the form of a repository of the Hugging Face Hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

import models
from models.model_card import model_card

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HASH = "weights_sha256"
ONNX_TOLERANCE = 1e-4


class TrainedNetwork(nn.Module, PyTorchModelHubMixin):
    """A trained network with the standardisation it needs: slices as the data file holds them -> logits.

    `mean` and `std` are those of the values it was trained on, (0, 1) where the file is standardised already.
    `training` and `evaluation` describe where it comes from and how it did; they change nothing it computes.
    """

    def __init__(
        self,
        *,
        architecture: str,
        layer_param: int,
        dropout: float = 0.0,
        activation: str = "relu",
        channels: int = 1,
        size: int = 256,
        mean: float = 0.0,
        std: float = 1.0,
        training: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "architecture": architecture,
            "layer_param": layer_param,
            "dropout": dropout,
            "activation": activation,
            "channels": channels,
            "size": size,
        }
        self.mean, self.std = float(mean), float(std)
        self.training_record, self.evaluation_record = training or {}, evaluation or {}
        self.network = models.build_model(
            architecture=architecture,
            layer_param=layer_param,
            dropout=dropout,
            activation=activation,
            channels=channels,
            size=size,
        )

    def forward(self, slices: Tensor) -> Tensor:
        """Slices (b, channels, N, N) in the data file's units -> logits (b,); positive means GR."""
        return self.network((slices - self.mean) / self.std)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(
            save_directory,
            self.network.state_dict(),
            settings=self.settings,
            mean=self.mean,
            std=self.std,
            training=self.training_record,
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
        raise models.ModelError(f"{model_file}: pickled weights are never read; {WEIGHTS} is needed")


def save(
    folder: str | Path,
    state_dict: dict[str, Tensor],
    *,
    settings: dict[str, Any],
    mean: float,
    std: float,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a network to `folder`; each file appears whole or not at all.

    `settings` are the arguments of `build_model`, `training` whatever else (JSON-able) says how it was trained.
    Raises OSError where the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    weights = safetensors.torch.save(tensors, {"format": "pt"})
    config = {**settings, "mean": mean, "std": std, "training": training or {}}
    config[HASH] = hashlib.sha256(weights).hexdigest()
    _write(folder / WEIGHTS, weights)
    _write_description(folder, config)


def load(folder: str | Path) -> TrainedNetwork:
    """The network in `folder`, in eval mode on the CPU. Raises ModelError if it is missing or damaged."""
    folder = Path(folder)
    config = read_config(folder)
    parameters = set(TrainedNetwork._hub_mixin_init_parameters) - {"self"}
    try:
        network = TrainedNetwork(**{key: config[key] for key in parameters & set(config)})
        return TrainedNetwork._load_as_safetensor(network, str(folder / WEIGHTS), "cpu", strict=True)
    except (TypeError, RuntimeError, KeyError) as error:  # keys that are missing, weights of another network
        raise models.ModelError(f"{folder}: weights and {CONFIG} do not belong together: {error}") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """What `config.json` says. Raises ModelError if it is not there or not what `save` writes."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise models.ModelError(f"{path}: no trained network is here: {error.strerror}") from error
    except ValueError as error:
        raise models.ModelError(f"{path}: damaged, not valid JSON: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config or "layer_param" not in config:
        raise models.ModelError(f"{path}: does not describe a network of this program")
    return config


def record_evaluation(folder: str | Path, numbers: dict[str, Any]) -> None:
    """Put the numbers of an evaluation into `config.json` and the model card.

    `numbers`: `data` (a name of the data), `seeds` [first, last + 1], `slices` (how many), `estimates`
    {key: [value, low, high]} with keys of `card.TITLES`, and anything else worth keeping.
    """
    _write_description(Path(folder), {**read_config(folder), "evaluation": numbers})


def weights_hash(folder: str | Path) -> str:
    """SHA-256 of the weights in `folder`, as `config.json` states it."""
    return str(read_config(folder).get(HASH))


def require_onnx() -> None:
    """Raises ModelError if the packages that write and check ONNX are not installed."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise models.ModelError(f'ONNX export needs {", ".join(missing)}: pip install -e ".[onnx]"')


def export_onnx(network: TrainedNetwork, path: str | Path) -> float:
    """Write `network` as ONNX with a free batch size; return how far its logits are from torch's at most.

    Raises ModelError if packages are missing or the difference is above 1e-4 (relative to logits above 1).
    """
    require_onnx()
    import onnxruntime

    path = Path(path)
    settings, network = network.settings, network.cpu().eval()
    shape = (int(settings["channels"]), int(settings["size"]), int(settings["size"]))
    generator = torch.Generator().manual_seed(0)
    slices = torch.randn((5, *shape), generator=generator) * network.std + network.mean
    # the exporter lists the operators of torchvision that it does without
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
    serialised = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(serialised, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = network(slices)
    found = torch.from_numpy(session.run(None, {"slices": slices.numpy()})[0])
    difference = float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
    if not difference <= ONNX_TOLERANCE:
        raise models.ModelError(
            f"{path}: ONNX logits differ from torch's by {difference:.1e}; nothing was written"
        )
    _write(path, serialised)
    return difference


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in `path`, whose hash must be the one that `config.json` beside it states."""
    try:
        data = path.read_bytes()
        stated = read_config(path.parent).get(HASH)
        if stated and stated != hashlib.sha256(data).hexdigest():
            raise models.ModelError(
                f"{path}: damaged, its SHA-256 is not the one in {CONFIG}; train or copy it again"
            )
        return safetensors.torch.load(data)
    except OSError as error:
        raise models.ModelError(f"{path}: the weights cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise models.ModelError(f"{path}: damaged, no safetensors: {error}") from error


def _write_description(folder: Path, config: dict[str, Any]) -> None:
    _write(folder / CARD, str(model_card(config)).encode())
    _write(folder / CONFIG, (json.dumps(config, indent=2, allow_nan=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash it holds the old bytes or the new ones."""
    temporary = path.with_name(f"{path.name}.part")  # the next writer takes it up
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
