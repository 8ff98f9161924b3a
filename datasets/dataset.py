"""Batches of slices on the device, cut from whole cubes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cache import DeviceCache, HostCache, Preparation
from .cache_choice import choose_cache
from .cube_file import GRAVITIES, CubeFile, DataError
from .sampler import EpochSampler, Ids, decode, evaluation_order, random_symmetries


@dataclass(frozen=True)
class Batch:
    """This process's rows of one global batch."""

    ids: Tensor  # (b,) int64 sample ids, in host memory
    images: Tensor  # (b, C, N, N) float32 on the device, in image_memory_format
    labels: Tensor  # (b,) float32 on the device: 1 for General Relativity, 0 for Newtonian gravity
    mask: Tensor  # (b,) float32 on the device: 1, or 0 for slices that only fill up a short batch
    num_valid: int  # slices of weight 1 in the whole batch, all processes together

    def split(self, parts: int) -> list["Batch"]:
        """Micro-batches of (nearly) equal size; each keeps the `num_valid` of the whole batch."""
        fields = (self.ids, self.images, self.labels, self.mask)
        pieces = zip(*(torch.tensor_split(field, parts) for field in fields), strict=True)
        return [Batch(ids, images, labels, mask, self.num_valid) for ids, images, labels, mask in pieces]


class WholeCubeDataset:
    """The slices of the cubes of `seeds`, in batches.

    `batch_size` counts the slices of all `num_processes` processes together; process `process_index` gets its
    rows. `seed` and the epoch decide order and symmetries, nothing else does. Cubes are standardised to
    (cube - `mean`) / `std`; the Newtonian ones are then multiplied by `newton_augmentation`. `cache` is
    `auto`, `disk`, `memory` or `device`. Raises DataError if the file lacks seeds or the batch cannot be
    shared out.
    """

    def __init__(
        self,
        cubes: CubeFile,
        seeds: range,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        axes: tuple[int, ...] = (0, 1, 2),
        channels: int = 1,
        mean: float = 0.0,
        std: float = 1.0,
        newton_augmentation: float = 1.0,
        symmetries: bool = True,
        cache: str = "auto",
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        cubes.require(seeds)
        if batch_size % num_processes:
            raise DataError(
                f"train_params.batch_size {batch_size} cannot be shared out evenly among {num_processes} "
                f"processes; a multiple of {num_processes} can."
            )
        self.cubes, self.seeds, self.device = cubes, seeds, device
        self.batch_size, self.seed = batch_size, seed
        self.axes, self.channels, self.symmetries = tuple(sorted(axes)), channels, symmetries
        self.process_index, self.num_processes = process_index, num_processes
        self.shape = (channels, cubes.size, cubes.size)
        rotated = 2 in axes
        if cache == "auto":
            pair_bytes = 2 * 4 * cubes.size**3
            cache = choose_cache(pair_bytes, len(seeds), device, num_processes, rotated=rotated)
        options: dict[str, Any] = {"channels": channels, "device": device}
        if cache != "device":
            options |= {"rotated": rotated, "keep": cache == "memory"}
        preparation = Preparation(mean, std, newton_augmentation)
        kind = DeviceCache if cache == "device" else HostCache
        self._cache = kind(cubes, seeds, preparation, **options)

    def __len__(self) -> int:
        return len(self.seeds) * len(GRAVITIES) * len(self.axes) * self.cubes.size

    @property
    def cache(self) -> str:
        """Where the cubes live: `disk`, `memory` or `device`."""
        return self._cache.name

    @property
    def steps(self) -> int:
        """Batches in a training epoch. Raises DataError if the batch is larger than the set."""
        return self._order.steps

    def order(self, epoch: int) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids (steps, batch_size) of a training epoch on all processes together, and which of them count."""
        return self._order.epoch(epoch)

    def prefetch(self, epoch: int, first_step: int = 0) -> None:
        """Begins to read what the first batch of `train_batches` needs, while something else is done."""
        self._cache.prefetch(self.order(epoch)[0][:, self._rows], first_step)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This process's rows of the batches of an epoch, from `first_step` on."""
        ids, weights = self.order(epoch)
        mine = self._rows
        turns = np.zeros_like(ids[:, mine])
        if self.symmetries:
            turns = random_symmetries(self.seed, epoch, ids[:, mine])
        yield from self._batches(ids[:, mine], weights[:, mine], turns, weights.sum(axis=1), first_step)

    def evaluation_batches(self) -> Iterator[Batch]:
        """This process's part of all slices, without symmetries; equally many batches on every process."""
        ids, weights, slices = evaluation_order(
            self.seeds, self.cubes.size, self.axes, self.batch_size, self.process_index, self.num_processes
        )
        yield from self._batches(ids, weights, np.zeros_like(ids), slices, 0)

    @property
    def _rows(self) -> slice:
        """This process's columns of a global batch."""
        rows = self.batch_size // self.num_processes
        return slice(self.process_index * rows, (self.process_index + 1) * rows)

    @cached_property
    def _order(self) -> EpochSampler:
        if self.batch_size > len(self):
            raise DataError(
                f"train_params.batch_size {self.batch_size} is larger than the training set:\n"
                f"data_params.train_seeds {len(self.seeds)} gives {len(self)} slices of {self.cubes.path}.\n"
                f"Allowed are batches of up to {len(self)} slices, or more seeds."
            )
        return EpochSampler(self.seeds, self.cubes.size, self.axes, self.batch_size, self.seed)

    def _batches(
        self, ids: Ids, weights: NDArray[np.bool_], turns: Ids, slices: Ids, first_step: int
    ) -> Iterator[Batch]:
        # Small enough to go to the device once for the whole epoch.
        labels = torch.from_numpy(decode(ids, self.cubes.size).gravity.astype(np.float32)).to(self.device)
        counts = torch.from_numpy(weights.astype(np.float32)).to(self.device)
        names = torch.from_numpy(ids)
        for step, images in enumerate(self._cache.images(ids, turns, first_step), first_step):
            yield Batch(names[step], images, labels[step], counts[step], int(slices[step]))


def measure_normalization(cubes: CubeFile, seeds: range) -> tuple[float, float]:
    """Mean and standard deviation over all values of the cubes of `seeds`, accumulated in float64.

    Raises DataError if all values are equal, so that nothing can be standardised by them.
    """
    cube = np.empty((cubes.size,) * 3, np.float32)
    count, mean, squares = 0, 0.0, 0.0
    for seed in seeds:
        for gravity in GRAVITIES:
            cubes.read(seed, gravity, cube)
            for plane in cube:
                values = plane.astype(np.float64)
                centre = values.mean()
                # Pairwise update of mean and sum of squares (Chan, Golub & LeVeque 1979): no cancellation.
                squares += ((values - centre) ** 2).sum()
                squares += (centre - mean) ** 2 * count * plane.size / (count + plane.size)
                mean += (centre - mean) * plane.size / (count + plane.size)
                count += plane.size
    if squares == 0:
        raise DataError(
            f"{cubes.path}: data_params.standardize train needs cubes that vary, but all values are {mean}.\n"
            "Allowed is none, or another file; python -m datasets inspect shows what this one holds."
        )
    return float(mean), float(np.sqrt(squares / count))
