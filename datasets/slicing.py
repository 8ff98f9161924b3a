"""Slices of cubes in memory: where they lie, and how a batch of them is copied to the device.

A slice, flipped, transposed and shifted, is a view of its cube (see kernels.py). If the column stride is 1 or
-1, the rows of the image are contiguous in the cube. Slices across axis 2 would touch one float per cache
line, so host memory holds a second, rotated copy of each cube: rotated[z, x, y] = cube[x, y, z].
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import kernels
from .sampler import Ids, decode

MAX_SLICING_THREADS = 8  # more wait for memory
BATCHES_AHEAD = 2  # batches that the host may copy to an accelerator ahead of the computation


class Views(NamedTuple):
    """Start in the buffer of the seed, and strides of images, in floats; offsets of rows and columns.

    Element (i, j) is at `start + (i + row_offset) mod N * row + (j + column_offset) mod N * column`.
    """

    start: Ids
    row: Ids
    column: Ids
    row_offset: Ids
    column_offset: Ids


def views(
    ids: Ids, symmetries: Ids, shifts: Ids, size: int, *, fields: int, channels: int, rotated: bool
) -> Views:
    """Views (..., fields * channels) of slices `ids` (...), rolled by `shifts` (..., 2), then with
    `symmetries` (...).

    A seed's buffer holds the fields of the Newtonian cube, then those of General Relativity, each followed by
    their rotated copies if there are any. For each field there are `channels` adjacent slices: channel c of
    the slice at position p is taken at position p + c, in a periodic box.
    """
    index = decode(ids, size)
    axis, transposed = index.axis, symmetries >> 2 & 1
    # The rotated copy serves where it makes the image's rows contiguous. Slices across axes 1 and 2 whose
    # rows run along x are contiguous in neither copy.
    copy = ((axis == 2) | ((axis == 0) & (transposed == 1))) & rotated
    strides = np.array([[size * size, size, 1], [size, 1, size * size]])[copy.astype(np.int64)]  # of x, y, z
    across, row, column = (
        np.take_along_axis(strides, np.array(table)[axis][..., None], -1)
        for table in ([0, 1, 2], [1, 0, 0], [2, 2, 1])
    )
    flip_rows, flip_columns = (symmetries & 1)[..., None], (symmetries >> 1 & 1)[..., None]
    cubes = (index.gravity * (2 if rotated else 1) + copy) * fields
    field, channel = np.divmod(np.arange(fields * channels), channels)
    start = (cubes[..., None] + field) * size**3 + (size - 1) * (flip_rows * row + flip_columns * column)
    start = start + (index.position[..., None] + channel) % size * across
    row, column = row * (1 - 2 * flip_rows), column * (1 - 2 * flip_columns)
    # numpy.roll by s puts element i - s at i. In a flipped view the direction is reversed.
    row_offset = shifts[..., :1] * (2 * flip_rows - 1) % size
    column_offset = shifts[..., 1:] * (2 * flip_columns - 1) % size
    swap = transposed[..., None] == 1
    row, column = np.where(swap, column, row), np.where(swap, row, column)
    row_offset, column_offset = (
        np.where(swap, column_offset, row_offset),
        np.where(swap, row_offset, column_offset),
    )
    strides_and_offsets = (row, column, row_offset, column_offset)
    return Views(start, *(np.broadcast_to(array, start.shape).copy() for array in strides_and_offsets))


class BufferPool:
    """Buffers of one shape, each for the cubes of one seed.

    A seed owns a buffer from `acquire` on. A released seed keeps its buffer, and the cubes in it, until
    another seed needs one; the buffer that was released first is reused first. Seeds are numbered from 0 to
    `num_seeds`.
    """

    def __init__(self, shape: tuple[int, ...], num_seeds: int, *, pinned: bool = False) -> None:
        self.shape, self._pinned = shape, pinned
        self.offsets = np.zeros(num_seeds, np.int64)
        """Where the buffer of each seed begins in `memory`, in floats."""
        self.resize(0)

    def resize(self, count: int) -> None:
        """Allocate `count` empty buffers instead of the present ones. Raises MemoryError."""
        self.memory = np.empty(0, np.float32)  # frees the old memory before the new is allocated
        self.memory = self._allocate(count)
        self._free = list(range(count))
        self._slots: dict[int, int] = {}
        self._released: dict[int, None] = {}  # in the order of release

    def _allocate(self, count: int) -> NDArray[np.float32]:
        if self._pinned:
            with torch.inference_mode(False):
                return torch.empty((count, *self.shape), pin_memory=True).numpy()
        # Unlike torch, NumPy asks for huge pages, which make access to distant rows faster.
        return np.empty((count, *self.shape), np.float32)

    def __len__(self) -> int:
        return len(self.memory)

    def __getitem__(self, seed: int) -> NDArray[np.float32]:
        """The buffer of a seed."""
        return self.memory[self._slots[seed]]

    def reacquire(self, seed: int) -> bool:
        """Keep a seed whose buffer was not reused yet; False if it has none."""
        self._released.pop(seed, None)
        return seed in self._slots

    def acquire(self, seed: int) -> bool:
        """Give a seed a buffer, free or released by another; False if there is none now."""
        if self._free:
            slot = self._free.pop()
        elif self._released:
            oldest = next(iter(self._released))
            del self._released[oldest]
            slot = self._slots.pop(oldest)
        else:
            return False
        self._slots[seed] = slot
        self.offsets[seed] = slot * self.memory[0].size
        return True

    def release(self, seed: int) -> None:
        """Allow the buffer of a seed to be reused."""
        self._released[seed] = None

    def release_all(self) -> None:
        """Allow all buffers to be reused."""
        self._released |= dict.fromkeys(seed for seed in self._slots if seed not in self._released)

    def discard(self, seed: int) -> None:
        """Take the buffer from a seed whose cubes could not be read."""
        self._free.append(self._slots.pop(seed))


class HostSlicer:
    """Slices cubes in host memory with several threads and copies the images to the device.

    `seeds` (steps, rows) are the seeds of the slices, `views` (steps, rows, C) lie in their buffers.
    """

    def __init__(self, pool: BufferPool, seeds: Ids, views: Views, size: int, device: torch.device) -> None:
        self._pool, self._seeds, self._views = pool, seeds, views
        self._size, self._device = size, device
        self._executor = ThreadPoolExecutor(MAX_SLICING_THREADS, "slice")
        self._images = torch.empty(0)
        self._parts: list[Future[None]] = []

    def start(self, step: int) -> None:
        """Begin to slice the images of a step, whose seeds must be in their buffers until `result`."""
        start, *fields = (field[step] for field in self._views)
        start = start + self._pool.offsets[self._seeds[step]][:, None]
        shape = (*start.shape, self._size, self._size)
        self._images = torch.empty(shape, pin_memory=copies_asynchronously(self._device))
        images = self._images.view(-1, self._size, self._size).numpy()
        arrays = (start.ravel(), *(field.ravel() for field in fields), images)
        threads = min(torch.get_num_threads(), MAX_SLICING_THREADS, len(start))
        bounds = [len(images) * k // threads for k in range(threads + 1)]
        memory = self._pool.memory.reshape(-1)
        self._parts = [
            self._executor.submit(kernels.copy_slices, memory, *(array[a:b] for array in arrays))
            for a, b in pairwise(bounds)
        ]

    def result(self) -> Tensor:
        """The images (rows, C, N, N) of the step that was started, on the device."""
        for part in self._parts:
            part.result()
        if copies_asynchronously(self._device):
            images = copy_stream(self._device).upload(self._images)
        else:
            images = self._images.to(self._device)
        return to_memory_format(images)

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown()


class DeviceCubes:
    """Cubes `shape` in the memory of the device, two per seed, and their slicing there.

    Only the main thread uses this class: calls from other threads would break the capture of a CUDA graph.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._memory = torch.empty(0)
        self._place: dict[int, int] = {}
        self._resident: set[int] = set()
        self._gather: kernels.Gather | None = None

    def reserve(self, seeds: list[int]) -> None:
        """Allocate memory for these seeds, unless they have it already. Raises torch.OutOfMemoryError."""
        if self._place.keys() >= set(seeds):
            return
        self._resident.clear()
        self._memory = torch.empty(0)  # frees the old memory before the new is allocated
        with torch.inference_mode(False):  # training could not use a tensor made in inference mode
            self._memory = torch.empty((len(seeds), 2, *self.shape), device=self.device)
        self._place = {seed: place for place, seed in enumerate(seeds)}

    def __contains__(self, seed: int) -> bool:
        return seed in self._resident

    def upload(self, seed: int, cubes: NDArray[np.float32]) -> None:
        """Copy both cubes (2, *shape) of a seed to the device; returns when the copy is complete."""
        self._memory[self._place[seed]].copy_(torch.from_numpy(cubes))
        self._resident.add(seed)

    def offsets(self, seeds: Ids) -> Ids:
        """Where the cubes of `seeds` begin, in floats."""
        places = np.zeros(max(self._place) + 1, np.int64)
        places[list(self._place)] = list(self._place.values())
        return places[seeds] * (2 * math.prod(self.shape))

    def slice(self, *fields: Tensor) -> Tensor:
        """Images (n, N, N) on the device; `fields` (n) are those of Views."""
        memory = self._memory.view(-1)
        if self._gather is None:
            self._gather = kernels.choose_gather(memory, self.shape[-1], *fields)
        return self._gather(memory, self.shape[-1], *fields)


class DeviceSlicer:
    """Slices cubes in the memory of the device with one kernel; arguments as those of HostSlicer."""

    def __init__(self, cubes: DeviceCubes, seeds: Ids, views: Views) -> None:
        self._cubes = cubes
        views = views._replace(start=views.start + cubes.offsets(seeds)[..., None])
        # They are small enough to be copied to the device once for the whole epoch.
        self._views = [torch.from_numpy(field).to(cubes.device) for field in views]
        self._images = torch.empty(0)

    def start(self, step: int) -> None:
        """Queue the kernel that slices the images of a step."""
        shape = self._views[0].shape[1:]
        images = self._cubes.slice(*(field[step].reshape(-1) for field in self._views))
        self._images = images.view(*shape, *images.shape[1:])

    def result(self) -> Tensor:
        """The images (rows, C, N, N) of the step that was started."""
        return to_memory_format(self._images)

    def close(self) -> None:
        """No threads to end."""


class CopyStream:
    """Copies batches to an accelerator while it computes, on a second stream.

    Nothing else in a step waits for the accelerator. So this class also keeps the host from preparing more
    than BATCHES_AHEAD batches, each of which takes memory on both.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._backend = device, torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        self._steps: deque[torch.Event] = deque()

    def upload(self, images: Tensor) -> Tensor:
        """The images, which are in pinned memory, on the device."""
        computing = self._backend.current_stream(self._device)
        # By default a host that waits for a CUDA event spins on a core.
        blocking = {"blocking": True} if self._device.type == "cuda" else {}
        self._steps.append(computing.record_event(self._backend.Event(**blocking)))
        if len(self._steps) > BATCHES_AHEAD:
            self._steps.popleft().synchronize()
        with self._backend.stream(self._stream):
            copy = images.to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        copy.record_stream(computing)  # allocated on one stream, used on another
        return copy


@cache
def copy_stream(device: torch.device) -> CopyStream:
    """The copy stream of a device: one per process, because the memory pool of a stream is never freed."""
    return CopyStream(device)


def copies_asynchronously(device: torch.device) -> bool:
    """Whether torch has streams and pinned host memory for this type of device."""
    return device.type not in ("cpu", "mps")


def memory_format(device: torch.device) -> torch.memory_format:
    """The memory format of images and networks on a device: channels last, which is faster, except on MPS.

    The backward pass of batch normalization is wrong for channels-last tensors on MPS
    (pytorch/pytorch#175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def to_memory_format(images: Tensor) -> Tensor:
    """Contiguous images (rows, C, N, N) in the memory format of their device."""
    rows, channels, height, width = images.shape
    if memory_format(images.device) == torch.contiguous_format:
        return images
    if channels == 1:  # both formats have the same memory; only the strides tell them apart
        return images.as_strided(images.shape, (height * width, 1, width, 1))
    if images.device.type == "cpu":  # where torch's conversion takes ten times as long as NumPy's
        pixels = np.empty((rows, height, width, channels), np.float32)
        for channel in range(channels):
            pixels[..., channel] = images[:, channel].numpy()
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last)
