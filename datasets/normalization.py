"""Mean, standard deviation and power spectrum of cubes; whether two files are standardized alike."""

from __future__ import annotations

from system import UserError

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cube_file import GRAVITIES, CubeFile
from .dataset import DataSettings, WholeCubeDataset

POWER_POSITIONS = 16  # neighboring slices look nearly the same


class Moments:
    """Running mean and variance over parts of the data (Chan, Golub & LeVeque 1983, Am. Stat. 37, 242).

    Sums of squares are taken about the mean of each part, so a small variance about a large mean is exact.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Add one part, at least one value, C-contiguous; its values are overwritten."""
        mean = float(values.mean())
        values -= mean
        with np.errstate(over="ignore"):  # values that are too large have an infinite variance
            values *= values
            squares = float(values.sum())
        self._merge(values.size, mean, squares)

    def merge(self, other: Moments) -> None:
        """Add all values of `other`."""
        if other.count:
            self._merge(other.count, other.mean, other._squares)

    def _merge(self, count: int, mean: float, squares: float) -> None:
        difference, total = np.float64(mean - self.mean), self.count + count
        with np.errstate(over="ignore", invalid="ignore"):
            self._squares += squares
            self._squares += float(difference**2 * self.count * count / total)
            self.mean += float(difference * count / total)
        self.count = total

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean."""
        return self._squares / self.count

    @property
    def std(self) -> float:
        """Standard deviation, without Bessel's correction."""
        return math.sqrt(self.variance)


def measure_normalization(cubes: CubeFile, seeds: range) -> tuple[float, float]:
    """Mean and standard deviation over all values of the cubes of `seeds`, in float64.

    Raises UserError if all values are equal.
    """
    cube = np.empty((cubes.size,) * 3, np.float32)
    moments = Moments()
    for seed in seeds:
        for gravity in GRAVITIES:
            cubes.read(seed, gravity, cube)
            for plane in cube:
                moments.add(plane.astype(np.float64))
    if moments.variance == 0:
        raise UserError(
            f"{cubes.path}: all values are {moments.mean}, so data_params.standardize train cannot divide by "
            "their standard deviation.\n"
            "Use another file, or set standardize to none. python -m datasets inspect lists its contents."
        )
    return moments.mean, moments.std


def measure_power(
    cubes: CubeFile,
    seeds: range,
    data: DataSettings,
    mean: float,
    std: float,
    isotropic_power: Callable[[Tensor], Tensor],
) -> list[list[float] | None]:
    """Isotropic power spectrum of the slices perpendicular to each axis, None for axes that are not sliced.

    From POWER_POSITIONS slices per axis of each cube of `seeds`. `isotropic_power` gives the mean spectrum of
    images (b, C, N, N). Computed on the CPU in one order, so that it is the same on every rank and device.
    """
    device, stride = torch.device("cpu"), max(1, cubes.size // POWER_POSITIONS)
    slices = WholeCubeDataset(
        cubes, seeds, data, batch_size=64, device=device, mean=mean, std=std, cache="disk"
    )
    sums, counts = [torch.zeros(cubes.size // 2, dtype=torch.float64) for _ in range(3)], [0, 0, 0]
    for batch in slices.evaluation_batches():
        chosen = (batch.mask > 0) & (batch.ids % cubes.size % stride == 0)
        for axis in slices.axes:
            images = batch.images[chosen & (batch.axes == axis)]
            if len(images):
                sums[axis] += len(images) * isotropic_power(images)
                counts[axis] += len(images)
    return [(total / n).tolist() if n else None for total, n in zip(sums, counts, strict=True)]


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


def check_normalization(trained_on: CubeFile, other: CubeFile) -> None:
    """Raise UserError if `other` is standardized or filtered otherwise than `trained_on`.

    Files of different redshifts may each be standardized by its own mean and standard deviation.
    """
    require_same_filter(other.path, other.attributes, trained_on.attributes)
    redshifts = {trained_on.attr_float("redshift"), other.attr_float("redshift")} - {None}
    for key in ("mean", "std") if len(redshifts) < 2 else ():
        before, now = trained_on.attr_float(key), other.attr_float(key)
        if before is not None and now is not None and not math.isclose(before, now, rel_tol=1e-6):
            raise UserError(
                f"{other.path}: found cubes standardized by {key} {now:.6g}, but the network was trained on "
                f"{trained_on.path} with {before:.6g}.\nUse a file standardized by the same mean and std."
            )
    # Not every file has these attributes; the values of raw potentials are some 10^4 times smaller.
    before, now = (_std_of_first_cube(cubes) for cubes in (trained_on, other))
    if not 0.5 * before < now < 2 * before:
        raise UserError(
            f"{other.path}: found values with standard deviation {now:.3g}, but the network was trained on "
            f"{before:.3g} ({trained_on.path}).\nUse a file standardized in the same way."
        )


def _std_of_first_cube(cubes: CubeFile) -> float:
    cube = np.empty((cubes.size,) * 3, np.float32)
    cubes.read(cubes.seeds[0], GRAVITIES[0], cube)
    return float(cube.std(dtype=np.float64))
