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
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import models
from models.calibration import Calibration
from models.layers import NetworkSettings
from models.whitening import Whitening

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
HASH = "weights_sha256"
ONNX_TOLERANCE = 1e-4


class TrainedNetwork(nn.Module):
    """A trained network that takes slices as the data file holds them, and calibrated probabilities.

    Its arguments are the entries of `config.json`: those of `NetworkSettings`, and

    - `fields`, the names of the fields in the order of their channels, each with as many adjacent slices;
    - `mean` and `std`, which standardize the slices, a number or one for each field; 0 and 1 if the file is
      standardized;
    - `power`, the isotropic power spectra that whiten the slices (`Whitening`): [axis][n], P(n) of the
      training slices perpendicular to array axes 0, 1 and 2 at n = 0, ..., N/2 - 1, None for an axis that was
      not sliced; [axis][field][n] with several fields; earlier versions wrote one spectrum [n] for all axes;
      None without whitening;
    - `calibration`, a `Calibration` as a dictionary; None without validation seeds;
    - `training`, `selection` (what selected the network) and `evaluation`, records that change no result.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.settings = NetworkSettings(
            **{"octaves": 1} | {f.name: config[f.name] for f in fields(NetworkSettings) if f.name in config}
        )
        self.mean, self.std = config.get("mean", 0.0), config.get("std", 1.0)
        calibration = Calibration.from_dict(config.get("calibration"))
        self.num_fields = len(config.get("fields", [""]))  # older files have one field without a name
        self.is_calibrated = calibration is not None
        self.calibration = calibration or Calibration()
        self.whitening = Whitening(config["power"]) if config.get("power") else None
        self.needs_axes = self.whitening is not None and self.whitening.by_axis
        self.network = models.build(self.settings)

    def forward(self, slices: Tensor, axes: Tensor | int | None = None) -> Tensor:
        """Slices (b, C, N, N) in the units of the data file -> logits (b,); positive means GR.

        `axes`, (b,) or one for all, are the array axes perpendicular to the slices. A network that whitens
        the slices of each axis by their spectrum needs them. Raises UserError without them, and for slices of
        another shape or type.
        """
        image = (self.settings.channels, self.settings.size, self.settings.size)
        if not isinstance(slices, Tensor) or not slices.is_floating_point() or slices.shape[1:] != image:
            kind, shape = getattr(slices, "dtype", type(slices)), tuple(getattr(slices, "shape", ()))
            names = "; ".join(self.config.get("fields", []))
            raise UserError(
                f"slices: found {kind} of the shape {shape}, but the network takes floating-point tensors of "
                f"(b, {', '.join(map(str, image))})"
                + (f", channels {names}" if names else "")
                + ". Slices of a cube are torch.from_numpy(cube).movedim(axis, 0)[:, None]."
            )
        if axes is None and self.needs_axes:
            raise UserError(
                "axes: missing, allowed: the array axis perpendicular to the slices (0, 1 or 2), or a "
                "tensor of them. The network whitens the slices of each axis by their spectrum."
            )
        standardized = (slices - per_channel(self.mean, slices)) / per_channel(self.std, slices)
        if self.whitening is not None:
            standardized = self.whitening(standardized, 0 if axes is None else axes)
        return self.network(standardized)

    def probability(self, slices: Tensor, axes: Tensor | int | None = None) -> Tensor:
        """Slices (b, C, N, N) -> calibrated probabilities of General Relativity (b,); `axes` as above.

        Above 1/2 the slice is classified as General Relativity. Without calibration (no validation seeds in
        training) the sigmoid of the logit.
        """
        return self.calibration.probability(self(slices, axes), axes)

    @classmethod
    def from_pretrained(cls, repository: str, **options: Any) -> TrainedNetwork:
        """The network in a repository of the Hugging Face Hub; `options` are those of snapshot_download."""
        from huggingface_hub import snapshot_download

        return load(snapshot_download(repository, **options))


def per_channel(values: float | list[float], slices: Tensor) -> float | Tensor:
    """A number for each field, as a tensor that fits slices (b, C, N, N); a single number as it is."""
    if not isinstance(values, list):
        return values
    return slices.new_tensor(values).repeat_interleave(slices.shape[1] // len(values))[:, None, None]


def save(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a network to `folder`; each file appears complete or not at all.

    `weights` is the state of the bare network, `config` the arguments of `TrainedNetwork`. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    data = safetensors.torch.save(tensors, {"format": "pt"})
    system.write_atomically(folder / WEIGHTS, data)
    _write_description(folder, {**config, HASH: hashlib.sha256(data).hexdigest()})


def load(folder: str | Path) -> TrainedNetwork:
    """The network in `folder`, in eval mode on the CPU. Raises UserError if it is missing or damaged."""
    folder = Path(folder)
    try:
        config, data = _read_config(folder), (folder / WEIGHTS).read_bytes()
        if config.get(HASH) not in (None, hashlib.sha256(data).hexdigest()):
            raise UserError(f"{folder / WEIGHTS}: damaged, its SHA-256 differs. Copy or train it again.")
        trained = TrainedNetwork(**config)
        trained.network.load_state_dict(safetensors.torch.load(data))
        return trained.eval()
    except UserError:
        raise
    except Exception as error:  # config.json may contain anything
        raise UserError(
            f"{folder}: {CONFIG} and {WEIGHTS} do not make a network: {type(error).__name__}: "
            f"{str(error)[:500]}. Give LOG_DIR/NAME/model of a finished run; if it is damaged, copy it again."
        ) from error


def record_evaluation(folder: Path, results: dict[str, Any]) -> None:
    """Add the results of an evaluation to `config.json` and the model card.

    `results`: `data` (name of the data), `seeds` [first, last + 1], `slices` (their number), `estimates`
    {key: [value, low, high]} with keys of `model_card.TITLES`, and any other JSON-able record.
    """
    _write_description(folder, {**_read_config(folder), "evaluation": results})


def _read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def _write_description(folder: Path, config: dict[str, Any]) -> None:
    from models.model_card import model_card  # imports huggingface_hub, which takes half a second

    system.write_atomically(folder / CARD, str(model_card(config)))
    system.write_atomically(folder / CONFIG, json.dumps(config, indent=2, allow_nan=False) + "\n")


def require_onnx() -> None:
    """Raise UserError if the packages that write and verify ONNX are not installed."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UserError(f'ONNX export needs {", ".join(missing)}: pip install -e ".[onnx]"')


def export_onnx(network: TrainedNetwork, path: Path) -> float:
    """Write `network` as ONNX with a free batch size; returns the largest difference from torch's logits.

    Inputs are `slices` (b, C, N, N) and, if the network needs them, `axes` (b,) int64; see
    `TrainedNetwork.forward`. Raises UserError if the difference exceeds 1e-4 (relative to logits above 1).
    """
    import onnxruntime

    settings, network = network.settings, network.cpu().eval()
    shape = (5, settings.channels, settings.size, settings.size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    slices = noise * per_channel(network.std, noise) + per_channel(network.mean, noise)
    # The exporter lists the operators of torchvision that it lacks.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    inputs = {"slices": slices}
    if network.needs_axes:
        inputs["axes"] = torch.arange(len(slices)) % 3
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        network,
        tuple(value[:3] for value in inputs.values()),
        dynamo=True,
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes={name: {0: batch} for name in inputs},
        verbose=False,
    )
    assert program is not None
    serialized = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = network(**inputs)
    logits = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
    difference = float(((logits - expected).abs() / expected.abs().clamp(min=1)).max())
    if not difference <= ONNX_TOLERANCE:
        raise UserError(f"{path}: ONNX logits differ from torch's by {difference:.1e}; nothing was written")
    system.write_atomically(path, serialized)
    return difference
