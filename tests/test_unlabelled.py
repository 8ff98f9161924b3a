"""Predictions for cubes without labels."""

from system import UserError

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from analysis import unlabelled
from models.calibration import Calibration

SIZE = 8
UNITS = {"mean": 1.0, "std": 2.0, "path": "train.h5"}
CALIBRATION = Calibration(threshold=0.5, temperature=2.0)


def cubes(
    path: Path, *, shape: tuple[int, ...] = (SIZE,) * 3, scale: float = 1.0, **attributes: float
) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        file["a"] = rng.normal(size=shape).astype(np.float32) * scale
        file["deep/b"] = rng.normal(size=shape) * scale
        file["table"] = np.arange(3)
    return path


def snapshot(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = 1e-5 * np.random.default_rng(0).normal(size=(SIZE,) * 3)


class Network(torch.nn.Module):
    """The corner of the first channel of each slice, plus twice that of the last."""

    settings = SimpleNamespace(size=SIZE, channels=2)

    def __init__(self, cubes: Calibration | None, num_fields: int) -> None:
        super().__init__()
        self.num_fields = num_fields
        self.calibration = Calibration(temperature=1.0, threshold=0.0, cubes=cubes)

    def forward(self, slices: torch.Tensor, axes: object = None) -> torch.Tensor:
        """Slices (b, 2, N, N) -> logits (b,)."""
        return slices[:, 0, 0, 1] + 2 * slices[:, -1, 0, 1]


def predict(path: Path, calibration: Calibration | None = CALIBRATION, fields: int = 1) -> str:
    network: Any = Network(calibration, fields)
    output, device, std = path.with_name("out.h5"), torch.device("cpu"), [1.0] * fields
    return unlabelled.predict(network, path, output, axes=[0, 2], device=device, std=std, units=UNITS)


def test_logits_of_slices_and_probabilities_of_cubes(tmp_path: Path) -> None:
    table = predict(cubes(tmp_path / "in.h5", mean=1.0, std=2.0))
    with h5py.File(tmp_path / "in.h5") as given, h5py.File(tmp_path / "out.h5") as found:
        assert found["cubes/name"][:].tolist() == [b"a", b"deep/b"]
        for place, name in enumerate(("a", "deep/b")):
            cube = given[name][:].astype(np.float32)
            first, third = cube[:, 0, 1], cube[0, 1, :]
            expected = np.stack([line + 2 * np.roll(line, -1) for line in (first, third)])
            np.testing.assert_allclose(found[f"logits/{name}"][:], expected, rtol=1e-5)
            mean = found["cubes/mean_logit"][place]
            assert mean == pytest.approx(expected.mean(), rel=1e-5)
            assert found["cubes/probability"][place] == pytest.approx(1 / (1 + np.exp(-(mean - 0.5) / 2)))
        assert found.attrs["axes"].tolist() == [0, 2]
        assert found.attrs["calibrated"]
    assert [line.split()[0] for line in table.splitlines()] == ["/a", "/deep/b"]


def test_cubes_of_several_fields_are_predicted(tmp_path: Path) -> None:
    path = cubes(tmp_path / "in.h5", shape=(2, *(SIZE,) * 3))
    predict(path, fields=2)
    with h5py.File(path) as given, h5py.File(tmp_path / "out.h5") as predicted:
        first, second = given["a"][:].astype(np.float32)
        expected = [first[:, 0, 1] + 2 * second[:, 0, 1], first[0, 1, :] + 2 * second[0, 1, :]]
        np.testing.assert_allclose(predicted["logits/a"][:], expected, rtol=1e-5)
    with pytest.raises(UserError, match=r"shape \(2, .* but the network was trained on .* with 1 field\."):
        predict(path)


def test_a_probability_without_calibration_of_cubes_is_marked(tmp_path: Path) -> None:
    assert "not calibrated" in predict(cubes(tmp_path / "in.h5"), None)
    with h5py.File(tmp_path / "out.h5") as found:
        means = found["cubes/mean_logit"][:]
        np.testing.assert_allclose(found["cubes/probability"][:], 1 / (1 + np.exp(-means)))
        assert not found.attrs["calibrated"]


BAD = {
    "another size": (lambda path: cubes(path, shape=(4, 4, 4)), "8^3"),
    "another standardization": (lambda path: cubes(path, std=3.0), "standardized by std 3"),
    "raw values": (lambda path: cubes(path, scale=1e-5), "repack .*in.h5 OUT.h5 --like train.h5"),
    "raw snapshot": (lambda path: snapshot(path), r"pack \S+ OUT.h5 --snapshot 0 --like train.h5"),
    "no cubes": (lambda path: cubes(path, shape=(3,)), "no 3-D data sets"),
    "not finite": (lambda path: cubes(path, scale=float("nan")), "not finite"),
    "no HDF5": (lambda path: path.write_text("text") and path, "cannot be read as HDF5"),
    "no file": (lambda path: path, "cannot be read as HDF5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_rejected_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    make, message = BAD[kind]
    make(tmp_path / "in.h5")
    with pytest.raises(UserError, match=message.replace("^", r"\^")):
        predict(tmp_path / "in.h5")
    assert not (tmp_path / "out.h5").exists()
