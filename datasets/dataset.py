"""Batches of slices on the device, taken from whole cubes."""

from __future__ import annotations

from system import UserError

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cache import CubeCache, CubeReader, choose_cache
from .cube_file import GRAVITIES, CubeFile, PerField
from .sampler import (
    EpochSampler,
    Ids,
    decode,
    evaluation_order,
    newtonian_twins,
    random_shifts,
    random_symmetries,
)


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch."""

    ids: Tensor
    """(b,) int64 sample ids, in host memory."""
    images: Tensor
    """(b, C, N, N) float32 on the device, in its memory format: for each field its adjacent slices."""
    labels: Tensor
    """(b,) float32 on the device: 1 for General Relativity, 0 for Newtonian gravity."""
    mask: Tensor
    """(b,) float32 on the device: 1, or 0 for slices that only fill a short batch."""
    num_valid: int
    """Slices with mask 1 in the whole batch, over all ranks."""

    @property
    def axes(self) -> Tensor:
        """(b,) the axis perpendicular to each slice, in host memory."""
        return self.ids // self.images.shape[-1] % 3

    def split(self, parts: int) -> list[Batch]:
        """Micro-batches of (nearly) equal size; each keeps the `num_valid` of the whole batch."""
        fields = (self.ids, self.images, self.labels, self.mask)
        pieces = zip(*(torch.tensor_split(field, parts) for field in fields), strict=True)
        return [Batch(ids, images, labels, mask, self.num_valid) for ids, images, labels, mask in pieces]


class DataSettings(Protocol):
    """What this package reads of an experiment's data section (training.config.DataParams)."""

    axes: Any
    channels: int
    newton_augmentation: float
    symmetries: bool
    shifts: bool
    pairs: bool
    cache: Any


class WholeCubeDataset:
    """The slices of the cubes of `seeds`, in batches.

    `batch_size` counts the slices of all `num_processes` ranks; rank `process_index` gets its rows. Cubes are
    standardized to (cube - `mean`) / `std`, field by field; Newtonian ones are then multiplied by
    `data.newton_augmentation`.

    In training each slice is rolled at random along both axes with `data.shifts`, then gets a random symmetry
    of the square with `data.symmetries`. With `data.pairs` the twin of each slice is in the next row of the
    batch, with the same shift and symmetry. Order, shifts and symmetries depend on `seed`, the epoch and the
    sample ids only.

    `cache` (auto, disk, memory or device) replaces `data.cache`. `transform` is applied to the images
    (b, C, N, N) of each batch and their axes (b,). `cubes` has the `seeds` (`CubeFile.require`); `batch_size`
    is a multiple of `num_processes`, with `data.pairs` of twice that.
    """

    def __init__(
        self,
        cubes: CubeFile,
        seeds: range,
        data: DataSettings,
        *,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        mean: PerField = 0.0,
        std: PerField = 1.0,
        cache: str | None = None,
        process_index: int = 0,
        num_processes: int = 1,
        transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.cubes, self.seeds, self.data, self.axes = cubes, seeds, data, tuple(sorted(data.axes))
        self.batch_size, self.seed, self.device, self._transform = batch_size, seed, device, transform
        self.process_index, self.num_processes = process_index, num_processes
        self.shape = (cubes.num_fields * data.channels, cubes.size, cubes.size)
        rotated, cache = 2 in self.axes, cache or data.cache
        if cache == "auto":
            seed_bytes = 2 * 4 * math.prod(cubes.shape)
            cache = choose_cache(seed_bytes, len(seeds), device, num_processes, rotated=rotated)
        reader = CubeReader(cubes, seeds, mean, std, data.newton_augmentation)
        self._cache = CubeCache(cache, reader, rotated=rotated, channels=data.channels, device=device)

    def __len__(self) -> int:
        return len(self.seeds) * len(GRAVITIES) * len(self.axes) * self.cubes.size

    @property
    def cache(self) -> str:
        """Where the cubes are held: disk, memory or device."""
        return self._cache.kind

    @property
    def steps(self) -> int:
        """Batches in a training epoch. Raises UserError if the batch is larger than the set."""
        return self._sampler.steps

    def order(self, epoch: int) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids (steps, batch_size) of a training epoch over all ranks, and a mask: True for each id once."""
        return self._sampler.epoch(epoch)

    def prefetch(self, epoch: int, first_step: int = 0) -> None:
        """Begin to read what the first batch of `train_batches` needs. Returns at once."""
        self._cache.prefetch(self.order(epoch)[0][:, self._columns], first_step)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's rows of the batches of an epoch, from `first_step` on."""
        ids, mask = self.order(epoch)
        own = ids[:, self._columns]
        keys = newtonian_twins(own, self.cubes.size) if self.data.pairs else own
        symmetries, shifts = np.zeros_like(own), np.zeros((*own.shape, 2), np.int64)
        if self.data.symmetries:
            symmetries = random_symmetries(self.seed, epoch, keys)
        if self.data.shifts:
            shifts = random_shifts(self.seed, epoch, keys, self.cubes.size)
        yield from self._batches(
            own, mask[:, self._columns], symmetries, shifts, mask.sum(axis=1), first_step
        )

    def evaluation_batches(self) -> Iterator[Batch]:
        """This rank's part of all slices, unchanged; all ranks have the same number of batches."""
        ids, mask, num_valid = evaluation_order(
            self.seeds, self.cubes.size, self.axes, self.batch_size, self.process_index, self.num_processes
        )
        shifts = np.zeros((*ids.shape, 2), np.int64)
        yield from self._batches(ids, mask, np.zeros_like(ids), shifts, num_valid, 0)

    @property
    def _columns(self) -> slice:
        """This rank's columns of a global batch."""
        rows = self.batch_size // self.num_processes
        return slice(self.process_index * rows, (self.process_index + 1) * rows)

    @cached_property
    def _sampler(self) -> EpochSampler:
        if self.batch_size > len(self):
            raise UserError(
                f"train_params.batch_size {self.batch_size} is larger than the training set:\n"
                f"data_params.train_seeds {len(self.seeds)} gives {len(self)} slices of {self.cubes.path}.\n"
                f"Reduce batch_size to {len(self)} or less, or add seeds."
            )
        return EpochSampler(
            self.seeds,
            self.cubes.size,
            self.axes,
            self.batch_size,
            self.seed,
            pairs=self.data.pairs,
            fields=self.cubes.num_fields,
        )

    def _batches(
        self,
        ids: Ids,
        mask: NDArray[np.bool_],
        symmetries: Ids,
        shifts: Ids,
        num_valid: Ids,
        first_step: int,
    ) -> Iterator[Batch]:
        # Small enough to go to the device once for the whole epoch.
        index = decode(ids, self.cubes.size)
        labels = torch.from_numpy(index.gravity.astype(np.float32)).to(self.device)
        axes = torch.from_numpy(index.axis).to(self.device)
        masks = torch.from_numpy(mask.astype(np.float32)).to(self.device)
        host_ids = torch.from_numpy(ids)
        for step, images in enumerate(self._cache.iterate(ids, symmetries, shifts, first_step), first_step):
            if self._transform is not None:
                # A few slices at a time on a CPU, so that what it computes stays in the cache.
                rows = 8 if self.device.type == "cpu" else len(images)
                for part, part_axes in zip(images.split(rows), axes[step].split(rows), strict=True):
                    part.copy_(self._transform(part, part_axes))
            yield Batch(host_ids[step], images, labels[step], masks[step], int(num_valid[step]))
