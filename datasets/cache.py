"""Where cubes live while training: a window of them (``disk``), all in host memory, or all on the device.

Whatever the cache, cubes pass through the same steps (read, standardised, rotated) and slices are cut from the same
numbers, so batches are equal bit for bit.

**Memory.** Cubes of N^3 float32 are held in pairs (both twins of a seed), each with a rotated copy if axis 2 is cut:

    pair = 2 * N^3 * 4 bytes * (2 if axis 2 is cut else 1)                      (256 MiB at N = 256)

``memory`` holds the pairs of this process's share, about S / W of S training seeds on W processes. ``disk`` holds

    pairs = min(share, open + AHEAD)          open = (lanes of this process) * w + 1 or 2, see `order`

so at N = 256 and one process 8 + 1 or 2 pairs, about 2.5 GiB, whatever the size of the file. ``device`` holds the share on the
device, without rotated copies, and AHEAD pairs in host memory. The memory is taken once and used again, epoch after
epoch; a pair that is still in it when it is needed again is not read again.
"""

import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from . import cutting
from .cubes import GRAVITIES, CubeFile
from .cutting import Views
from .order import Ids

AHEAD = 2  # pairs that are read before they are needed
READERS = 2  # threads that read, so that both twins of a seed come at the same time
FREE_SHARE = (
    0.4  # of the free memory that `auto` takes; the test set may take as much, the network needs the rest
)

log = logging.getLogger(__name__)


class Preparation(NamedTuple):
    """What is done to a cube when it is loaded: (cube - mean) / std, Newtonian cubes times newton_augmentation."""

    mean: float
    std: float
    newton_augmentation: float


class Plan(NamedTuple):
    """Which pairs an epoch needs, in the order of their first use, and from which step to which."""

    pairs: Ids
    first: Ids
    last: Ids
    steps: int

    @property
    def most_open(self) -> int:
        """The largest number of pairs that are needed at one time."""
        change = np.bincount(self.first, minlength=self.steps + 1) - np.bincount(
            self.last + 1, minlength=self.steps + 1
        )
        return int(np.cumsum(change).max())


def plan(pairs: Ids) -> Plan:
    """The plan of an epoch whose row s (steps, rows) names the pair of each slice of step s."""
    steps, rows = pairs.shape
    names, first = np.unique(pairs, return_index=True)
    _, from_end = np.unique(pairs.ravel()[::-1], return_index=True)
    order = np.argsort(first, kind="stable")
    return Plan(names[order], first[order] // rows, (pairs.size - 1 - from_end[order]) // rows, steps)


class HostCache:
    """Pairs of cubes in host memory: those that are needed soon (``disk``), or all of this process's (``memory``)."""

    def __init__(
        self,
        cubes: CubeFile,
        seeds: range,
        preparation: Preparation,
        *,
        axes: tuple[int, ...],
        channels: int,
        device: torch.device,
        keep: bool,
    ) -> None:
        self.name = "memory" if keep else "disk"
        self.keep, self.rotated = keep, 2 in axes
        self.cubes, self.seeds, self.preparation = cubes, seeds, preparation
        self.channels, self.device = channels, device
        size = cubes.size
        self._shape = (len(GRAVITIES), 2 if self.rotated else 1, size, size, size)
        self._resize(0)
        self._walking = False

    def walk(self, plan: Plan, first_step: int) -> Iterator[int]:
        """Yields first_step, first_step + 1, ...: while it waits after step s, the slices of s can be cut.

        Reads ahead in threads, which end with the iteration. Raises DataError for cubes that cannot be read.
        """
        if self._walking:
            raise RuntimeError(
                "the batches of one data set are read by one loop at a time; close the other first"
            )
        self._walking = True
        if (slots := self._slots_for(plan)) > len(self._memory):
            self._resize(slots)
        coming = deque((p, f, e) for p, f, e in zip(*plan[:3], strict=True) if e >= first_step)
        try:
            with ThreadPoolExecutor(READERS, "cubes") as readers:
                try:
                    yield from self._steps(coming, range(first_step, plan.steps), readers)
                finally:
                    readers.shutdown(cancel_futures=True)
        finally:
            self._settle()
            self._walking = False

    def cut(self, ids: Ids, symmetries: Ids) -> Tensor:
        """The images (len(ids), C, N, N) of these slices on the device, channels last, in memory of their own."""
        size, count = self.cubes.size, len(ids)
        where = self._views(ids, symmetries, self._places)
        pinned = self.device.type == "cuda"
        images = torch.empty((count, self.channels, size, size), pin_memory=pinned)
        cutting.cut(self._memory.numpy().reshape(-1), *where, images.view(-1, size, size).numpy())
        return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def _views(self, ids: Ids, symmetries: Ids, places: Ids) -> Views:
        size = self.cubes.size
        pairs = ids // (6 * size) - self.seeds.start
        return cutting.views(
            ids, symmetries, places[pairs], size, channels=self.channels, rotated=self.rotated
        )

    def _slots_for(self, plan: Plan) -> int:
        return len(plan.pairs) if self.keep else min(len(plan.pairs), plan.most_open + AHEAD)

    def _resize(self, slots: int) -> None:
        """Memory for ``slots`` pairs, empty."""
        self._memory = torch.empty(0)  # given back before more is asked for
        with torch.inference_mode(False):
            self._memory = torch.empty((slots, *self._shape))
        self._free = list(range(slots))
        self._slot: dict[int, int] = {}  # pair -> its place in memory, also while it is being read
        self._idle: dict[int, None] = {}  # pairs in memory that may be overwritten, the longest idle first
        self._reading: dict[int, list[Future[None]]] = {}
        self._places = np.zeros(len(self.seeds), np.int64)

    def _steps(
        self, coming: deque[tuple[int, int, int]], steps: range, readers: ThreadPoolExecutor
    ) -> Iterator[int]:
        ends: dict[int, list[int]] = {}
        for pair, _, last in coming:
            ends.setdefault(last, []).append(pair)
        opening = deque(coming)
        for step in steps:
            while True:
                while coming and self._read(coming[0][0], readers):
                    coming.popleft()
                if not opening or opening[0][1] > step:
                    break
                pair = opening.popleft()[0]
                for future in self._reading.get(pair, ()):
                    future.result()
                self._reading.pop(pair, None)
                self._arrived(pair)
            yield step
            self._idle.update(dict.fromkeys(ends.get(step, ())))

    def _read(self, pair: int, readers: ThreadPoolExecutor) -> bool:
        """Starts reading a pair, unless it is in memory; False if there is no room for it now."""
        if pair in self._slot:
            self._idle.pop(pair, None)
            return True
        if self._free:
            slot = self._free.pop()
        elif self._idle:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            slot = self._slot.pop(oldest)
        else:
            return False
        self._slot[pair] = slot
        self._places[pair] = slot * self._memory[0].numel()
        self._reading[pair] = [readers.submit(self._load, pair, gravity, slot) for gravity in range(2)]
        return True

    def _load(self, pair: int, gravity: int, slot: int) -> None:
        copies = self._memory[slot, gravity].numpy()
        self.cubes.read(self.seeds[pair], GRAVITIES[gravity], copies[0])
        mean, std, factor = self.preparation
        factor = 1.0 if GRAVITIES[gravity] == "gr" else factor
        if (mean, std, factor) != (0.0, 1.0, 1.0):
            cutting.standardise(copies[0], mean, std, factor)
        if self.rotated:
            cutting.rotate(copies[0], copies[1])

    def _arrived(self, pair: int) -> None:
        """Called when a pair is needed for the first time and lies in host memory."""

    def _settle(self) -> None:
        """After an iteration: what was read whole stays, as long as nothing else needs the room."""
        for pair, futures in self._reading.items():
            if any(future.cancelled() or future.exception() for future in futures):
                self._free.append(self._slot.pop(pair))
        self._reading.clear()
        self._idle |= dict.fromkeys(pair for pair in self._slot if pair not in self._idle)


class DeviceCache(HostCache):
    """All pairs of this process's share on the device, where slices are cut; host memory only passes them on."""

    def __init__(
        self,
        cubes: CubeFile,
        seeds: range,
        preparation: Preparation,
        *,
        channels: int,
        device: torch.device,
    ) -> None:
        # A GPU reads along any axis without a rotated copy.
        super().__init__(cubes, seeds, preparation, axes=(), channels=channels, device=device, keep=False)
        self.name = "device"
        self._on_device = torch.empty(0)
        self._place_on_device = np.full(len(seeds), -1, np.int64)
        self._arrivals: set[int] = set()

    def walk(self, plan: Plan, first_step: int) -> Iterator[int]:
        """See HostCache."""
        if (self._place_on_device[plan.pairs] < 0).any():
            self._arrivals.clear()
            self._on_device = torch.empty(0)
            with torch.inference_mode(False):
                self._on_device = torch.empty((len(plan.pairs), 2, *self._shape[2:]), device=self.device)
            self._place_on_device[:] = -1
            self._place_on_device[plan.pairs] = np.arange(len(plan.pairs)) * self._on_device[0].numel()
        yield from super().walk(plan, first_step)

    def cut(self, ids: Ids, symmetries: Ids) -> Tensor:
        """See HostCache."""
        size = self.cubes.size
        where = self._views(ids, symmetries, self._place_on_device)
        start, row, column = (torch.from_numpy(part).to(self.device) for part in where)
        images = cutting.cut_on_device(self._on_device.view(-1), start, row, column, size)
        return images.view(len(ids), self.channels, size, size).to(memory_format=torch.channels_last)

    def _slots_for(self, plan: Plan) -> int:
        return min(len(plan.pairs), AHEAD)

    def _read(self, pair: int, readers: ThreadPoolExecutor) -> bool:
        return pair in self._arrivals or super()._read(pair, readers)

    def _arrived(self, pair: int) -> None:
        if pair not in self._arrivals:
            place = self._place_on_device[pair] // self._on_device[0].numel()
            self._on_device[place].copy_(self._memory[self._slot[pair], :, 0])
            self._arrivals.add(pair)
            self._idle[pair] = None


def choose(
    wanted: str,
    cubes: CubeFile,
    seeds: range,
    preparation: Preparation,
    *,
    axes: tuple[int, ...],
    channels: int,
    device: torch.device,
    num_processes: int,
) -> HostCache:
    """The cache with this name; for ``auto`` the fastest that fits into what is free, said in the log."""
    if wanted == "auto":
        wanted = _fitting(cubes, seeds, axes, device, num_processes)
    if wanted == "device":
        return DeviceCache(cubes, seeds, preparation, channels=channels, device=device)
    keep = wanted == "memory"
    return HostCache(cubes, seeds, preparation, axes=axes, channels=channels, device=device, keep=keep)


def _fitting(
    cubes: CubeFile, seeds: range, axes: tuple[int, ...], device: torch.device, processes: int
) -> str:
    share = (len(seeds) / processes + 2) * 2 * cubes.size**3 * 4
    if device.type == "cuda":
        free = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
        if share <= free:
            log.info("cache: device (%.1f GiB of cubes, %.1f GiB may be used)", share / 2**30, free / 2**30)
            return "device"
    share *= 2 if 2 in axes else 1
    free = FREE_SHARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    choice = "memory" if share <= free else "disk"
    log.info("cache: %s (%.1f GiB of cubes, %.1f GiB may be used)", choice, share / 2**30, free / 2**30)
    return choice


def free_memory() -> int:
    """Bytes of host memory that this job may still take."""
    return int(psutil.virtual_memory().available)
