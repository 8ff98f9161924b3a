"""Predictions for cubes without labels, in any HDF5 file of 3-D data sets."""

from __future__ import annotations

from system import UserError

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from analysis.report import write_hdf5
from analysis.saliency import Network
from datasets.cube_file import raw_snapshot
from datasets.normalization import like_command, require_same_filter
from datasets.preparation.checks import has_constant_line
from datasets.storage import check_filters
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


def find_cubes(path: Path, fields: int, size: int, *, units: Mapping[str, Any]) -> list[str]:
    """Names of the cubes in the HDF5 file `path`: (N, N, N) or (C, N, N, N) with C = `fields`, N = `size`.

    `units` are the `path` and attributes `mean`, `std`, `max_wavenumber` and `cells` of the training's file;
    empty if they are not known. Raises UserError if the file cannot be read, holds no or other cubes, or was
    standardized or filtered otherwise.
    """
    names: list[str] = []

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim in (3, 4) and item.dtype.kind in "fiu":
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
        if (math.prod(shape[:-3]), *shape[-3:]) != (fields, size, size, size):
            raise UserError(
                f"{path}: /{name} has the shape {shape}, but the network was trained on cubes of {size}^3 "
                f"with {fields} field{'s' * (fields > 1)}. Use such cubes."
            )
    if units:
        require_same_filter(path, attributes, units)
    for key in ("mean", "std"):
        trained, given = units.get(key), attributes.get(key)
        if trained is not None and given is not None and not np.allclose(given, trained, rtol=1e-6):
            now, before = ([f"{value:.6g}" for value in np.atleast_1d(values)] for values in (given, trained))
            raise UserError(
                f"{path}: the cubes were standardized by {key} {', '.join(now)}, those of the training by "
                f"{', '.join(before)}.\n{like_command(path, units['path'])}"
            )
    return names


def read_cubes(
    path: Path, names: Sequence[str], *, std: Sequence[float], trained_on: str
) -> Iterator[tuple[str, Tensor]]:
    """Each cube by name, (C, N, N, N) float32. Raises UserError for values that are not finite or in other
    units.

    `std` are the standard deviations of the fields in training, `trained_on` is its file.
    """
    with h5py.File(path, "r", locking=False) as file:
        for name in names:
            check_filters(file[name], path)
            try:
                values = np.asarray(file[name][()], dtype=np.float32)
            except (OSError, RuntimeError) as error:
                raise UserError(f"{path}: /{name} cannot be read ({error}). Copy the file again.") from None
            values = values.reshape(len(std), *values.shape[-3:])
            for expected, spread in zip(std, values.std(axis=(1, 2, 3), dtype=np.float64), strict=True):
                if not np.isfinite(spread):
                    raise UserError(f"{path}: /{name} has values that are not finite. Make this cube again.")
                if not SPREAD[0] * expected < spread < SPREAD[1] * expected:
                    if name == "data":
                        raise UserError(f"{raw_snapshot(path)} --like {trained_on}")
                    raise UserError(
                        f"{path}: /{name} has a standard deviation of {spread:.3g}, the training's cubes "
                        f"about {expected:.3g}.\n{like_command(path, trained_on)}"
                    )
            if any(map(has_constant_line, values)):
                raise UserError(
                    f"{path}: /{name} has lines of equal values: its simulation did not finish. Rerun it."
                )
            yield name, torch.from_numpy(values)


def slice_cube(cube: Tensor, axis: int, channels: int) -> Tensor:
    """The slices (N, C * channels, N, N) of a cube (C, N, N, N) perpendicular to `axis`.

    Of each field there are `channels` adjacent slices; channel c is c cells further.
    """
    planes = cube.movedim(axis + 1, 0)
    return torch.stack([planes.roll(-channel, 0) for channel in range(channels)], dim=2).flatten(1, 2)


def classify(
    network: Network, cube: Tensor, *, axes: Sequence[int], channels: int, device: torch.device
) -> Floats:
    """Logits (axes, N) of the slices of a cube in the units that `network` takes; as `slice_cube`."""
    logits = []
    with torch.inference_mode():
        for axis in axes:
            parts = slice_cube(cube, axis, channels).split(ROWS)
            logits.append(torch.cat([network(part.to(device), axes=axis).float() for part in parts]))
    return torch.stack(logits).double().cpu().numpy()


def predict(
    network: TrainedNetwork,
    path: Path,
    output: Path,
    *,
    axes: Sequence[int],
    device: torch.device,
    std: Sequence[float],
    units: Mapping[str, Any],
) -> str:
    """Write the predictions of all cubes in `path` to the HDF5 file `output`; returns a table of them.

    Data sets: `logits/NAME` (axes, N) of each cube, and the table `cubes` of all. The probability of a cube
    comes from the mean logit of its slices. `std` and `units` describe the cubes of the training
    (`read_cubes`, `find_cubes`).
    """
    settings, fields, of_cubes = network.settings, network.num_fields, network.calibration.cubes
    names, channels = find_cubes(path, fields, settings.size, units=units), settings.channels // fields
    logits = {
        name: classify(network, cube, axes=axes, channels=channels, device=device)
        for name, cube in read_cubes(path, names, std=std, trained_on=units.get("path", "TRAINING.h5"))
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
