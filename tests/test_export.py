"""Trained networks as folders: the same logits anywhere, from safetensors and JSON alone."""

from system import UserError

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import models
from models import export

ESTIMATES = {"accuracy": [0.75, 0.7, 0.8], "auc": [0.8, None, None], "pair_accuracy": [1.0, 0.63, 1.0]}
EVALUATION = {"data": "z1.h5", "seeds": [24, 32], "slices": 3072, "estimates": ESTIMATES}


def save_network(architecture: str, folder: Path, **config: Any) -> torch.nn.Module:
    """Save a network with mean 3 and standard deviation 2; returns the bare network."""
    torch.manual_seed(1)
    settings = models.NetworkSettings(
        architecture=architecture, layer_param=2, dropout=0.5, activation="leaky_relu", channels=2, size=64
    )
    settings = replace(settings, padding=config.get("padding", "zeros"))
    network = models.build(settings).to(memory_format=torch.channels_last)
    network(torch.randn(8, 2, 64, 64))  # running statistics other than the first
    network.eval()
    entries = asdict(settings) | {"mean": 3.0, "std": 2.0, "training": {"run": "name"}} | config
    export.save(folder, network.state_dict(), entries)
    return network


@pytest.fixture(params=list(models.REGISTRY))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """The folder of a saved network, and the bare network."""
    folder = tmp_path / "run" / "model"
    # LYNX with circular padding: ONNX then needs its Fourier transforms.
    padding = {"padding": "circular"} if request.param == "LYNX" else {}
    return folder, save_network(request.param, folder, **padding)


def test_a_loaded_network_standardizes_and_gives_the_same_logits(
    saved: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, network = saved
    monkeypatch.setattr("pickle.Unpickler", None)  # nothing is unpickled
    # A repository of the Hugging Face Hub is such a folder.
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, revision: f"{name}/{revision}")
    loaded = models.TrainedNetwork.from_pretrained(str(folder.parent), revision=folder.name)
    slices = torch.randn(4, 2, 64, 64)
    assert not loaded.training
    torch.testing.assert_close(loaded(3 + 2 * slices), network(slices), rtol=0, atol=1e-5)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}


@pytest.mark.parametrize("saved", ["RACOON"], indirect=True)
def test_the_card_has_hugging_faces_format_and_the_results(saved: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = saved
    assert "Not evaluated yet" in ModelCard.load(folder / "README.md").text
    export.record_evaluation(folder, EVALUATION)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license) == ("gravity-cnn", "mit")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        "accuracy of slices": 0.75,
        "area under the ROC curve, slices": 0.8,
        "twins ranked correctly, by their mean logit": 1.0,
    }
    assert "| accuracy of slices | 0.7500 [0.7000, 0.8000] |" in card.text
    assert "| area under the ROC curve, slices | 0.8000 |" in card.text
    assert "Seeds 24 to 31 of z1.h5, 3072 slices" in card.text
    assert "multiplied" not in card.text
    export.record_evaluation(folder, EVALUATION | {"data": "<script>|`x`|", "newton_augmentation": 0.9})
    text = ModelCard.load(folder / "README.md").text
    assert "**Newtonian slices were multiplied by 0.9: a test of the pipeline, not of gravity.**" in text
    assert "<script>" not in text
    assert "&#60;script&#62;&#124;&#96;x&#96;&#124;" in text
    models.load(folder)


def test_networks_load_outside_the_checkout_with_few_packages(tmp_path: Path) -> None:
    """The model card's instructions: the checkout on the path, and torch, safetensors, numpy, psutil."""
    slices = torch.ones(1, 2, 64, 64)
    expected = [
        torch.sigmoid(save_network(name, tmp_path / name)((slices - 3) / 2)).item()
        for name in models.REGISTRY
    ]
    program = f"""
import sys
packages = "accelerate h5py numba pydantic sklearn tensorboard matplotlib scipy huggingface_hub yaml"
for name in packages.split():
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, {str(Path(models.__file__).parents[1])!r})
import models, torch
for name in sys.argv[1:]:
    print(models.load(name).probability(torch.ones(1, 2, 64, 64)).item())
"""
    command = [sys.executable, "-c", program, *models.REGISTRY]
    done = subprocess.run(command, cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cubes", [None, {"temperature": 0.1, "threshold": 0.5}])
def test_whitening_and_calibration_are_part_of_the_network(
    tmp_path: Path, cubes: dict[str, Any] | None
) -> None:
    power = [[start + n for n in range(32)] for start in (1.0, 2.0, 9.0)]
    calibration = {"temperature": 0.5, "threshold": 0.25, "cubes": cubes}
    network = save_network("LYNX", tmp_path, power=power, calibration=calibration)
    loaded, slices = models.load(tmp_path), torch.randn(4, 2, 64, 64)
    logits = network(models.Whitening(power[2])(slices))
    torch.testing.assert_close(loaded(3 + 2 * slices, 2), logits, rtol=1e-4, atol=1e-4)
    probability = torch.sigmoid((logits - 0.25) / 0.5)
    torch.testing.assert_close(loaded.probability(3 + 2 * slices, 2), probability, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"axes: missing, allowed: .* \(0, 1 or 2\)"):
        loaded.probability(slices)
    assert ("network.calibration.cubes" in (tmp_path / "README.md").read_text()) == (cubes is not None)
    assert loaded.calibration.cubes == (models.Calibration(0.1, 0.5) if cubes else None)


@pytest.mark.parametrize(
    "slices",
    [
        torch.ones(2, 1, 64, 64),
        torch.ones(2, 2, 64, 64, dtype=torch.int64),
        np.ones((2, 2, 64, 64), np.float32),
    ],
    ids=lambda slices: str(getattr(slices, "shape", None)),
)
def test_wrong_shapes_and_types_are_named(tmp_path: Path, slices: Any) -> None:
    save_network("RACOON", tmp_path)
    with pytest.raises(UserError, match=r"slices: found .* takes floating-point tensors of \(b, 2, 64, 64\)"):
        models.load(tmp_path).probability(slices)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGES: dict[str, tuple[Any, str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "No such file.*finished run"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "SHA-256"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "do not make a network: JSON"),
    "another width": (lambda folder: change(folder, layer_param=4), "do not make a network.*size mismatch"),
    "no such network": (lambda folder: change(folder, architecture="CAT"), "allowed: RACOON"),
}


@pytest.mark.parametrize("saved", ["RACOON"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(saved: tuple[Path, torch.nn.Module], damage: str) -> None:
    folder, _ = saved
    harm, text = DAMAGES[damage]
    harm(folder)
    with pytest.raises(UserError, match=f"(?s){text}"):
        models.load(folder)


def test_onnx_agrees_with_torch(
    saved: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    folder, _ = saved
    change(folder, power=[[start + n for n in range(32)] for start in (1.0, 2.0, 9.0)])  # takes axes
    network = models.load(folder)
    assert export.export_onnx(network, tmp_path / "model.onnx") <= 1e-4
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (1, 7):
        slices, axes = 3 + 2 * torch.randn(batch, 2, 64, 64), torch.arange(batch) % 3
        (logits,) = session.run(None, {"slices": slices.numpy(), "axes": axes.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), network(slices, axes), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(export, "ONNX_TOLERANCE", -1.0)
    with pytest.raises(UserError, match="nothing was written"):
        export.export_onnx(network, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()
