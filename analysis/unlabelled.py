"""Predictions for cubes without labels, in any HDF5 file of 3-D data sets."""

from __future__ import annotations

from system import UserError

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from analysis.report import write_hdf5
from analysis.saliency import Network
from datasets.normalization import require_same_filter
from models.export import TrainedNetwork
from training.metrics import Floats

ROWS = 64
SPREAD = (0.5, 2.0)  # standard deviations, relative to the training's, of values in the same units


def is_prediction(path: Path) -> bool:
    """Whether `predict` wrote the file `path`."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return {"calibrated", "source"} <= set(file.attrs) and "cubes/probability" in file
    except (OSError, RuntimeError):
        return False


def find_fields(path: Path, size: int, *, units: Mapping[str, float | None]) -> list[str]:
    """Names of the 3-D data sets in the HDF5 file `path`, all of them (size, size, size).

    `units` are the attributes `mean`, `std`, `max_wavenumber` and `cells` of the training's file; empty if
    they are not known. Raises UserError if the file cannot be read, holds no or other cubes, or was
    standardized or filtered otherwise.
    """
    names: list[str] = []

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim == 3 and item.dtype.kind in "fiu":
            names.append(name)

    try:
        with h5py.File(path, "r", locking=False) as file:
            file.visititems(collect)
            shapes = {name: file[name].shape for name in names}
            attributes = dict(file.attrs)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: the file cannot be read as HDF5 ({error}). Give an HDF5 file.") from None
    if not names:
        raise UserError(f"{path}: the file has no 3-D data sets of numbers. Give a file of cubes.")
    for name, shape in shapes.items():
        if shape != (size,) * 3:
            raise UserError(
                f"{path}: /{name} has the shape {shape}, but the network was trained on cubes of {size}^3. "
                "Use cubes of that size."
            )
    if units:
        require_same_filter(path, attributes, units)
    for key in ("mean", "std"):
        trained, found = units.get(key), attributes.get(key)
        if trained is not None and found is not None and not np.isclose(float(found), trained, rtol=1e-6):
            raise UserError(
                f"{path}: the cubes were standardized by {key} {float(found):.6g}, those of the training by "
                f"{trained:.6g}. Standardize both files by the same mean and std."
            )
    return names


def read_fields(path: Path, names: Sequence[str], *, std: float) -> Iterator[tuple[str, Tensor]]:
    """Each data set by name, (N, N, N) float32. Raises UserError for values that are not finite or in other
    units.

    `std` is the standard deviation of the training's cubes.
    """
    with h5py.File(path, "r", locking=False) as file:
        for name in names:
            try:
                values = np.asarray(file[name][()], dtype=np.float32)
            except (OSError, RuntimeError) as error:
                raise UserError(f"{path}: /{name} cannot be read ({error}). Copy the file again.") from None
            spread = float(values.std(dtype=np.float64))
            if not np.isfinite(spread):
                raise UserError(f"{path}: /{name} has values that are not finite. Make this cube again.")
            if not SPREAD[0] * std < spread < SPREAD[1] * std:
                raise UserError(
                    f"{path}: /{name} has a standard deviation of {spread:.3g}, the training's cubes about "
                    f"{std:.3g}. Standardize the file like the training's."
                )
            yield name, torch.from_numpy(values)


def slice_field(field: Tensor, axis: int, channels: int) -> Tensor:
    """The slices (N, channels, N, N) of a cube perpendicular to `axis`; channel c is c cells further."""
    planes = field.movedim(axis, 0)
    return torch.stack([planes.roll(-channel, 0) for channel in range(channels)], dim=1)


def classify(
    network: Network, field: Tensor, *, axes: Sequence[int], channels: int, device: torch.device
) -> Floats:
    """Logits (axes, N) of the slices of a cube in the units that `network` takes."""
    logits = []
    with torch.inference_mode():
        for axis in axes:
            parts = slice_field(field, axis, channels).split(ROWS)
            logits.append(torch.cat([network(part.to(device), axes=axis).float() for part in parts]))
    return torch.stack(logits).double().cpu().numpy()


def predict(
    network: TrainedNetwork,
    path: Path,
    output: Path,
    *,
    axes: Sequence[int],
    device: torch.device,
    std: float,
    units: Mapping[str, float | None],
) -> str:
    """Write the predictions of all cubes in `path` to the HDF5 file `output`; returns a table of them.

    Data sets: `logits/NAME` (axes, N) of each cube, and the table `cubes` of all. The probability of a cube
    comes from the mean logit of its slices. `std` and `units` describe the cubes of the training
    (`read_fields`, `find_fields`).
    """
    settings, of_cubes = network.settings, network.calibration.cubes
    logits = {
        name: classify(network, field, axes=axes, channels=settings.channels, device=device)
        for name, field in read_fields(path, find_fields(path, settings.size, units=units), std=std)
    }
    means = np.array([values.mean() for values in logits.values()])
    # The calibration of slices is far too uncertain about a cube, but orders cubes and has their threshold.
    calibration = of_cubes or network.calibration
    probabilities = calibration.probability(means).numpy()
    columns = {f"logits/{name}": values for name, values in logits.items()} | {
        "cubes/name": np.array([name.encode() for name in logits]),
        "cubes/mean_logit": means,
        "cubes/probability": probabilities,
    }
    attributes = {
        "about": "positive logits: General Relativity; probability: of General Relativity, of each cube",
        "axes": list(axes),
        "calibrated": of_cubes is not None,
        "source": str(path),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_hdf5(output, columns, attributes)
    rows = zip(logits, means, probabilities, strict=True)
    lines = [f"/{name}  mean logit {logit:.4f}  P(GR) {share:.4f}" for name, logit, share in rows]
    if of_cubes is None:
        lines.append("P(GR) is not calibrated: this network has no calibration of cubes on validation seeds.")
    return "\n".join(lines)
