"""Where cubes are held during training: some of them in host memory, all of them there, or all on the device.

A batch takes this path, and `CubeCache.iterate` is its only loop:

    file -> buffer      CubeReader: reads, checks, standardizes and rotates cubes   threads of the Prefetcher
    buffer -> device    DeviceCubes.upload, with cache `device` only                main thread
    cubes -> images     HostSlicer or DeviceSlicer                                slicing threads or a kernel

Every cache does the same arithmetic with the same values, so batches are bit-identical.

**Memory.** The unit is a seed with its two cubes, each with a rotated copy if axis 2 is sliced in host
memory:

    bytes of a seed = 2 * 4 * C * N^3 * (2 with rotated copies, else 1)    256 MiB at N = 256, C = 1 field

    memory    the seeds of this rank's share: S / W (S seeds, W ranks), and those shared with other ranks
    disk      min(share, open + SEEDS_AHEAD) seeds; `open` is the largest number that the order needs at one
              time: 8 w / W with the w of sampler.py, and a few more if a batch takes a large part of a seed
    device    the share without rotated copies on the device, and SEEDS_AHEAD seeds in host memory

So `disk` takes 8 + 2 seeds or 2.5 GiB at N = 256 on one rank, for a file of any size. Memory is allocated
once and reused epoch after epoch; a seed that is still in memory when it is needed is not read again. Beside
this there are two batches of images, one in training and one being sliced, and for each seed 0.1 MiB of ids
and views (N = 256, one channel).
"""

from __future__ import annotations

import system
from system import UserError

import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import kernels, slicing
from .cube_file import GRAVITIES, CubeFile, PerField
from .preparation import checks
from .sampler import STREAMS, Ids
from .slicing import BufferPool, DeviceCubes, DeviceSlicer, HostSlicer

SEEDS_AHEAD = 2  # seeds that are read before they are needed
READERS = 2 * SEEDS_AHEAD  # cubes that are read at a time
PREPARERS = 2  # cubes that are prepared at a time
FREE_SHARE = 0.4  # of free memory; the test set may take as much again, and the network needs memory too

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CubeReader:
    """Reads cubes and standardizes them to (cube - mean) / std, the Newtonian ones times a factor."""

    cubes: CubeFile
    seeds: range
    mean: PerField
    std: PerField
    newton_augmentation: float

    def read(self, seed: int, label: int, copies: NDArray[np.float32]) -> None:
        """Read a cube of `seeds[seed]` into copies[0], of the shape (C, N, N, N). Raises UserError."""
        self.cubes.read_unchecked(self.seeds[seed], GRAVITIES[label], copies[0])

    def prepare(self, seed: int, label: int, copies: NDArray[np.float32]) -> None:
        """Check and standardize the cube that was read, and rotate it into copies[1] if there is one.

        Raises UserError for NaN and infinity.
        """
        self.cubes.check_finite(self.seeds[seed], GRAVITIES[label], copies[0])
        means, stds = (np.broadcast_to(values, len(copies[0])).tolist() for values in (self.mean, self.std))
        for field, (mean, std) in enumerate(zip(means, stds, strict=True)):
            factor = 1 / std * (self.newton_augmentation if GRAVITIES[label] == "newton" else 1)
            if (mean, factor) != (0, 1):
                kernels.standardize(copies[0, field], mean, factor)
            if len(copies) == 2:
                kernels.rotate(copies[0, field], copies[1, field])


class Use(NamedTuple):
    """The steps of an epoch in which a seed is used for the first and for the last time."""

    seed: int
    first: int
    last: int


def schedule(seeds: Ids, first_step: int) -> tuple[list[Use], int]:
    """The seeds used from `first_step` on, by their first use, and the most that an epoch uses at one time.

    `seeds` (steps, rows) holds the seed of each slice of the epoch.
    """
    steps, rows = seeds.shape
    values, first = np.unique(seeds, return_index=True)
    _, from_end = np.unique(seeds.ravel()[::-1], return_index=True)
    first, last = first // rows, (seeds.size - 1 - from_end) // rows
    changes = np.bincount(first, minlength=steps + 1) - np.bincount(last + 1, minlength=steps + 1)
    order = np.argsort(first, kind="stable")
    uses = map(Use, values[order].tolist(), first[order].tolist(), last[order].tolist())
    return [use for use in uses if use.last >= first_step], int(np.cumsum(changes).max())


class Prefetcher:
    """Reads the cubes of a queue of seeds into buffers, in threads, while there are buffers.

    Other threads prepare the cubes, so that the storage is never idle while there is something to read.
    """

    def __init__(self, reader: CubeReader, pool: BufferPool, seeds: Iterable[int]) -> None:
        self._reader, self._pool, self._queue = reader, pool, deque(seeds)
        self._reads: dict[int, list[Future[Future[None]]]] = {}
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._preparers = ThreadPoolExecutor(PREPARERS, "prepare")

    def fill(self) -> None:
        """Start reads until there is no buffer left, or the queue is empty."""
        while self._queue:
            seed = self._queue[0]
            if not self._pool.reacquire(seed):
                if not self._pool.acquire(seed):
                    return
                buffer = self._pool[seed]
                self._reads[seed] = [
                    self._readers.submit(self._read, seed, label, buffer[label])
                    for label in range(len(GRAVITIES))
                ]
            self._queue.popleft()

    def _read(self, seed: int, label: int, copies: NDArray[np.float32]) -> Future[None]:
        self._reader.read(seed, label, copies)
        return self._preparers.submit(self._reader.prepare, seed, label, copies)

    def wait(self, seed: int) -> None:
        """Return when the cubes of a seed are in its buffer. Raises UserError unless they are twins."""
        for read in self._reads.get(seed, ()):
            read.result().result()
        if self._reads.pop(seed, None):
            newton, gr = self._pool[seed][:, 0]
            checks.check_pair(self._reader.cubes, self._reader.seeds[seed], newton, gr)

    def finish(self) -> None:
        """Start no more reads. Returns at once."""
        self._readers.shutdown(wait=False)

    def close(self, *, cancel: bool) -> None:
        """Wait for the reads, also for those not yet begun unless `cancel`, and release all buffers."""
        self._readers.shutdown(cancel_futures=cancel)
        self._preparers.shutdown()
        for seed, reads in self._reads.items():
            if any(read.cancelled() or read.exception() or read.result().exception() for read in reads):
                self._pool.discard(seed)
        self._pool.release_all()


class CubeCache:
    """Gives the images of slices. `kind` is disk, memory or device."""

    def __init__(self, kind: str, reader: CubeReader, *, rotated: bool, channels: int, device: torch.device):
        self.kind, self._reader, self._channels, self._device = kind, reader, channels, device
        size = self._size = reader.cubes.size
        # An accelerator reads along any axis without a rotated copy.
        self._rotated = rotated and kind != "device"
        fields = reader.cubes.num_fields
        shape = (len(GRAVITIES), 2 if self._rotated else 1, fields, size, size, size)
        pinned = kind == "device" and slicing.copies_asynchronously(device)
        self._pool = BufferPool(shape, len(reader.seeds), pinned=pinned)
        self._device_cubes = DeviceCubes(shape[2:], device) if kind == "device" else None
        self._prefetcher: Prefetcher | None = None
        self._busy = False

    def prefetch(self, ids: Ids, first_step: int) -> None:
        """Begin to read what `iterate` needs for its first batch. Returns at once.

        This covers two steps, as the second one is sliced while the first one is trained on.
        """
        with self._one_loop():
            uses = self._prepare(ids // (6 * self._size) - self._reader.seeds.start, first_step)
            seeds = [use.seed for use in uses if use.first <= first_step + 1]
            self._prefetcher = Prefetcher(self._reader, self._pool, seeds)
            self._prefetcher.fill()
            self._prefetcher.finish()

    def iterate(self, ids: Ids, symmetries: Ids, shifts: Ids, first_step: int) -> Iterator[Tensor]:
        """For each row of `ids` (steps, rows) from `first_step` on, the images (rows, C, N, N) of its slices.

        The channels are those of `slicing.views`: for each field its adjacent slices.

        A slice is rolled by its `shifts` (steps, rows, 2), then transformed by its symmetry.

        The images are on the device, in its memory format, and never overwritten. The threads end with the
        iteration. Raises UserError for a cube that cannot be read.
        """
        with self._one_loop():
            # Which seeds the epoch needs, when, and where its slices lie in their buffers.
            seeds = ids // (6 * self._size) - self._reader.seeds.start
            uses = deque(self._prepare(seeds, first_step))
            views = slicing.views(
                ids,
                symmetries,
                shifts,
                self._size,
                fields=self._reader.cubes.num_fields,
                channels=self._channels,
                rotated=self._rotated,
            )
            slicer: HostSlicer | DeviceSlicer
            if self._device_cubes is None:
                slicer = HostSlicer(self._pool, seeds, views, self._size, self._device)
            else:
                slicer = DeviceSlicer(self._device_cubes, seeds, views)
            prefetcher = Prefetcher(self._reader, self._pool, [use.seed for use in uses])
            last_uses: dict[int, list[int]] = defaultdict(list)
            images: Tensor | None = None
            try:
                for step in range(first_step, len(ids)):
                    # Wait for the cubes that this step is the first to use.
                    prefetcher.fill()
                    while uses and uses[0].first <= step:
                        use = uses.popleft()
                        prefetcher.wait(use.seed)
                        if self._device_cubes is None:
                            last_uses[use.last].append(use.seed)
                        else:
                            self._device_cubes.upload(use.seed, self._pool[use.seed][:, 0])
                            self._pool.release(use.seed)
                            prefetcher.fill()
                    # The caller trains on one batch while the next one is sliced.
                    slicer.start(step)
                    if images is not None:
                        yield images
                    images = slicer.result()
                    # Free the buffers of cubes that no later step uses.
                    for seed in last_uses.pop(step, ()):
                        self._pool.release(seed)
                if images is not None:
                    yield images
            finally:
                slicer.close()
                prefetcher.close(cancel=True)

    @contextmanager
    def _one_loop(self) -> Iterator[None]:
        """Raise RuntimeError while another loop uses the buffers; wait for the reads of `prefetch`."""
        if self._busy:
            raise RuntimeError(
                "only one loop at a time can read the batches of a data set; close the other one"
            )
        self._busy = True
        try:
            if self._prefetcher is not None:
                self._prefetcher.close(cancel=False)
                self._prefetcher = None
            yield
        finally:
            self._busy = False

    def _prepare(self, seeds: Ids, first_step: int) -> list[Use]:
        """Allocate memory for an epoch; returns what has to be read."""
        uses, max_open = schedule(seeds, first_step)
        share = np.unique(seeds).tolist()
        try:
            if self._device_cubes is not None:
                self._device_cubes.reserve(share)
                uses = [use for use in uses if use.seed not in self._device_cubes]
                buffers = min(len(share), SEEDS_AHEAD) if uses else 0
            else:
                buffers = len(share) if self.kind == "memory" else min(len(share), max_open + SEEDS_AHEAD)
            if buffers > len(self._pool):
                self._pool.resize(buffers)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UserError(
                f"data_params.cache {self.kind} needs more memory than is available: {error}.\n"
                "Set it to auto, which chooses by the free memory, or to disk, which needs least."
            ) from error
        return uses


def choose_cache(seed_bytes: int, seeds: int, device: torch.device, ranks: int, *, rotated: bool) -> str:
    """The fastest cache that fits in the free memory, for `cache: auto`; the log gives it with the reason.

    `seed_bytes` is the size of both cubes of one of the `seeds`, which are divided among `ranks`; with
    `rotated` host memory holds them twice.
    """
    # The streams of a rank, rounded up; at the borders of its share it needs seeds that others need too.
    streams = min(STREAMS, -(-STREAMS // ranks) + (STREAMS % ranks > 0))
    share, choice = min(seeds, seeds * streams // STREAMS + 3) * seed_bytes, ""
    if hasattr(torch.get_device_module(device), "mem_get_info"):
        free = FREE_SHARE * torch.get_device_module(device).mem_get_info(device)[0]
        choice = "device" if share <= free else ""
    if not choice:
        share *= 2 if rotated else 1
        free = FREE_SHARE * system.available_memory() / system.local_world_size()
        choice = "memory" if share <= free else "disk"
    needed = f"{share / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB free for cubes"
    log.info("cache: %s for %d seeds (%s)", choice, seeds, needed)
    return choice
