"""Mean, standard deviation and power spectrum of cubes; whether two files are standardized alike."""

from __future__ import annotations

from system import UserError

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cube_file import CubeFile, PerField
from .dataset import DataSettings, WholeCubeDataset
from .moments import Moments
from .preparation.checks import read_pair

POWER_POSITIONS = 16  # neighboring slices look nearly the same


def measure_normalization(cubes: CubeFile, seeds: range) -> tuple[PerField, PerField]:
    """Mean and standard deviation over all values of the cubes of `seeds`, in float64, for each field."""
    moments = [Moments() for _ in range(cubes.num_fields)]
    for seed in seeds:
        for cube in read_pair(cubes, seed):
            for field, of_field in zip(cube, moments, strict=True):
                for plane in field:
                    of_field.add(plane.astype(np.float64))
    if len(moments) == 1:
        return moments[0].mean, moments[0].std
    return [of_field.mean for of_field in moments], [of_field.std for of_field in moments]


def measure_power(
    cubes: CubeFile,
    seeds: range,
    data: DataSettings,
    mean: PerField,
    std: PerField,
    isotropic_power: Callable[[Tensor], Tensor],
) -> list[Any]:
    """Isotropic power spectrum of the slices perpendicular to each axis, None for axes that are not sliced.

    [axis][n], and with several fields [axis][field][n]. From POWER_POSITIONS slices per axis of each cube of
    `seeds`. `isotropic_power` gives the mean spectrum of images (b, C, N, N). Computed on the CPU in one
    order, so that it is the same on every rank and device.
    """
    device, stride = torch.device("cpu"), max(1, cubes.size // POWER_POSITIONS)
    slices = WholeCubeDataset(
        cubes, seeds, data, batch_size=64, device=device, mean=mean, std=std, cache="disk"
    )
    shape = (3, cubes.num_fields, cubes.size // 2)
    sums, counts = torch.zeros(shape, dtype=torch.float64), [0, 0, 0]
    for batch in slices.evaluation_batches():
        chosen = (batch.mask > 0) & (batch.ids % cubes.size % stride == 0)
        for axis in slices.axes:
            images = batch.images[chosen & (batch.axes == axis)]
            if len(images):
                fields = images.split(data.channels, dim=1)
                sums[axis] += len(images) * torch.stack([isotropic_power(field) for field in fields])
                counts[axis] += len(images)
    means = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
    return [None if mean is None else (mean if len(mean) > 1 else mean[0]).tolist() for mean in means]


def require_same_filter(path: Path, attributes: Mapping[str, Any], trained_on: Mapping[str, Any]) -> None:
    """Raise UserError if cubes with these `attributes` are filtered otherwise than those of the training."""
    names = [
        " ".join(
            f"--{key.replace('_', '-')} {values[key]:g}"
            for key in ("max_wavenumber", "cells")
            if values.get(key) is not None
        )
        for values in (attributes, trained_on)
    ]
    if names[0] != names[1]:
        cubes = [f"cubes repacked with {name}" if name else "unfiltered cubes" for name in names]
        raise UserError(
            f"{path}: found {cubes[0]}, but the network was trained on {cubes[1]}. Use those, or filter a "
            "copy: python -m datasets repack IN.h5 OUT.h5 --max-wavenumber N --cells M"
        )


def like_command(path: Path, trained_on: str | Path) -> str:
    """How to standardize the file `path` as that of the training."""
    return (
        f"Standardize it alike: python -m datasets repack {path} OUT.h5 --like {trained_on}\n"
        f"or from raw simulations: python -m datasets pack RAW_DIR OUT.h5 --redshift Z --like {trained_on}"
    )


def check_normalization(trained_on: CubeFile, other: CubeFile) -> None:
    """Raise UserError if `other` is standardized or filtered otherwise than `trained_on`.

    Both have as many fields. Files of different redshifts may each be standardized by its own mean and
    standard deviation.
    """
    require_same_filter(other.path, other.attributes, trained_on.attributes)
    redshifts = {tuple(cubes.field_floats("redshifts", "redshift")) for cubes in (trained_on, other)}
    redshifts = {values for values in redshifts if None not in values}
    for key in ("mean", "std") if len(redshifts) < 2 else ():
        for before, now in zip(trained_on.field_floats(key), other.field_floats(key), strict=True):
            if before is not None and now is not None and not math.isclose(before, now, rel_tol=1e-6):
                raise UserError(
                    f"{other.path}: found cubes standardized by {key} {now:.6g}, but the network was trained "
                    f"on {trained_on.path} with {before:.6g}.\n{like_command(other.path, trained_on.path)}"
                )
    # Not every file has these attributes; the values of raw potentials are about 10^4 times smaller.
    for before, now in zip(*(_stds_of_first_cube(cubes) for cubes in (trained_on, other)), strict=True):
        if not 0.5 * before < now < 2 * before:
            raise UserError(
                f"{other.path}: found values with standard deviation {now:.3g}, but the network was trained "
                f"on {before:.3g} ({trained_on.path}).\n{like_command(other.path, trained_on.path)}"
            )


def _stds_of_first_cube(cubes: CubeFile) -> list[float]:
    cube = read_pair(cubes, cubes.seeds[0])[0]
    return [float(field.std(dtype=np.float64)) for field in cube]
