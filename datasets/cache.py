"""Where cubes live while training: a window of them, all in host memory, or all on the device.

Whatever the cache, cubes take the same steps (read, standardised, rotated) and slices are copied from the
same numbers, so batches are equal bit for bit.

**Memory.** Cubes are held in pairs, both twins of a seed, each with a rotated copy if axis 2 is cut:

    bytes of a pair = 2 * 4 * N^3 * (2 if axis 2 is cut else 1)             256 MiB at N = 256

    memory    the pairs of this process's share: S / W (S seeds, W processes) and those shared with others
    disk      min(share, open + AHEAD) pairs; `open` are those that the order needs at one time: see `order`,
              8 w / W for its w, and some more where a batch takes a large part of a simulation
    device    the share without rotated copies on the device, and AHEAD pairs in host memory

So `disk` takes 8 + 2 pairs or 2.5 GiB at N = 256 on one process, whatever the size of the file. The memory is
taken once and used again, epoch after epoch; a pair that still lies in it when it is needed is not read
again. To this come two batches of images, one trained on and one being cut, and for each seed 0.1 MiB of ids
and views (N = 256, one channel).
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import slicing
from .cube_file import GRAVITIES, CubeFile, DataError
from .sampler import Ids
from .slicing import Views

AHEAD = 2  # pairs that are read before they are needed
READERS = 2  # threads that read, so that both twins of a seed come at the same time
BATCHES_AHEAD = 2  # of what a GPU has finished
STREAMING = ("cuda", "xpu")  # types of devices that have streams and copy from pinned memory
MOST_CUTTERS = 8  # threads that cut; more do not help, they wait for memory


Cutter = Callable[[int], Callable[[], Tensor]]


class Preparation(NamedTuple):
    """What is done to cubes as they are loaded: (cube - mean) / std; Newtonian ones * newton_augmentation."""

    mean: float
    std: float
    newton_augmentation: float


class Plan(NamedTuple):
    """The pairs that an epoch needs, in the order of their first use: (pair, first step, last step)."""

    uses: list[tuple[int, int, int]]
    most_open: int  # pairs that are needed at one time


def plan(pairs: Ids, first_step: int) -> Plan:
    """The plan of an epoch from `first_step` on; `pairs` (steps, rows) holds the pair of each slice."""
    steps, rows = pairs.shape
    names, first = np.unique(pairs, return_index=True)
    _, from_end = np.unique(pairs.ravel()[::-1], return_index=True)
    first, last = first // rows, (pairs.size - 1 - from_end) // rows
    changes = np.bincount(first, minlength=steps + 1) - np.bincount(last + 1, minlength=steps + 1)
    order = np.argsort(first, kind="stable")
    uses = zip(names[order].tolist(), first[order].tolist(), last[order].tolist(), strict=True)
    return Plan([use for use in uses if use[2] >= first_step], int(np.cumsum(changes).max()))


class HostCache:
    """Pairs of cubes in host memory: those needed soon (`disk`), or the process's whole share (`memory`)."""

    def __init__(
        self,
        cubes: CubeFile,
        seeds: range,
        preparation: Preparation,
        *,
        rotated: bool,
        channels: int,
        device: torch.device,
        keep: bool,
    ) -> None:
        self.name = "memory" if keep else "disk"
        self.cubes, self.seeds, self.preparation = cubes, seeds, preparation
        self.rotated, self.channels, self.device, self.keep = rotated, channels, device, keep
        size = cubes.size
        self._shape = (len(GRAVITIES), 2 if rotated else 1, size, size, size)
        self._resize(0)
        self._busy = False

    def prefetch(self, ids: Ids, first_step: int) -> None:
        """Begins to read, in threads of its own, the cubes without which `images` gives no batch.

        They are those of two steps, as the second is cut while the first is trained on.
        """
        if self._busy:
            raise RuntimeError("one loop at a time reads the batches of a data set: close the other first")
        self._settle()
        _, coming = self._prepare(ids, first_step)
        readers = ThreadPoolExecutor(READERS, "read")
        self._read_on(deque(use for use in coming.uses if use[1] <= first_step + 1), readers)
        readers.shutdown(wait=False)

    def images(self, ids: Ids, symmetries: Ids, first_step: int) -> Iterator[Tensor]:
        """For each row of `ids` (steps, rows) from `first_step` on the images (rows, C, N, N) of its slices.

        They are on the device, in `image_memory_format`, in memory of their own. Threads read cubes ahead and
        end with the iteration. Raises DataError for a cube that cannot be read.
        """
        if self._busy:
            raise RuntimeError("one loop at a time reads the batches of a data set: close the other first")
        self._settle()
        pairs, coming = self._prepare(ids, first_step)
        self._busy = True
        try:
            where = slicing.views(
                ids, symmetries, self.cubes.size, channels=self.channels, rotated=self.rotated
            )
            with (
                ThreadPoolExecutor(READERS, "read") as readers,
                ThreadPoolExecutor(MOST_CUTTERS, "cut") as cutters,
            ):
                try:
                    cut = self._cutter(pairs, where, cutters)
                    ready: Tensor | None = None
                    for step in self._walk(coming, range(first_step, len(ids)), readers):
                        images = cut(step)  # while the batch before is trained on
                        if ready is not None:
                            yield ready
                        ready = images()
                    if ready is not None:
                        yield ready
                finally:
                    readers.shutdown(cancel_futures=True)
        finally:
            self._settle()
            self._busy = False

    def _prepare(self, ids: Ids, first_step: int) -> tuple[Ids, Plan]:
        """The pair of each slice, and the plan of the epoch, with memory taken for it."""
        pairs = ids // (6 * self.cubes.size) - self.seeds.start
        coming = plan(pairs, first_step)
        try:
            self._make_room(pairs, coming)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise DataError(
                f"data_params.cache {self.name} needs more memory than there is: {error}.\n"
                "Allowed are auto, which takes what fits, and disk, which needs least."
            ) from error
        return pairs, coming

    def _make_room(self, pairs: Ids, coming: Plan) -> None:
        share = len(np.unique(pairs))
        slots = share if self.keep else min(share, coming.most_open + AHEAD)
        if slots > len(self._memory):
            self._resize(slots)

    def _resize(self, slots: int) -> None:
        """Takes memory for `slots` pairs, empty."""
        self._memory = np.empty(0, np.float32)  # the old is given back before the new is taken
        self._memory = self._allocate(slots)
        self._free = list(range(slots))
        self._slot: dict[int, int] = {}  # pair -> its place in memory, from when it is being read
        self._idle: dict[int, None] = {}  # pairs in memory that may be overwritten, the longest idle first
        self._reading: dict[int, list[Future[None]]] = {}
        self._places = np.zeros(len(self.seeds), np.int64)  # pair -> where it begins, in floats

    def _allocate(self, slots: int) -> NDArray[np.float32]:
        # NumPy's memory, unlike torch's, lies on huge pages where there are any, which makes far rows faster.
        return np.empty((slots, *self._shape), np.float32)

    def _walk(self, coming: Plan, steps: range, readers: ThreadPoolExecutor) -> Iterator[int]:
        """Yields the steps, each when all that it needs is in memory; reads on as far as there is room."""
        to_read, to_open = deque(coming.uses), deque(coming.uses)
        closing: dict[int, list[int]] = {}
        for pair, _, last in coming.uses:
            closing.setdefault(last, []).append(pair)
        for step in steps:
            self._read_on(to_read, readers)
            while to_open and to_open[0][1] <= step:
                pair = to_open.popleft()[0]
                for future in self._reading.get(pair, ()):
                    future.result()
                self._reading.pop(pair, None)
                if self._arrived(pair):
                    self._read_on(to_read, readers)
            yield step
            self._idle |= {pair: None for pair in closing.get(step, ()) if pair in self._slot}

    def _read_on(self, to_read: deque[tuple[int, int, int]], readers: ThreadPoolExecutor) -> None:
        while to_read and self._read(to_read[0][0], readers):
            to_read.popleft()

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
        self._places[pair] = slot * self._memory[0].size
        self._reading[pair] = [readers.submit(self._load, pair, gravity, slot) for gravity in range(2)]
        return True

    def _load(self, pair: int, gravity: int, slot: int) -> None:
        copies = self._memory[slot, gravity]
        self.cubes.read(self.seeds[pair], GRAVITIES[gravity], copies[0])
        mean, std, newton = self.preparation
        factor = 1 / std * (newton if GRAVITIES[gravity] == "newton" else 1)
        if (mean, factor) != (0, 1):
            slicing.standardise(copies[0], mean, factor)
        if self.rotated:
            slicing.rotate(copies[0], copies[1])

    def _arrived(self, pair: int) -> bool:
        """Called when a pair is first needed and lies in host memory; True if that made room there."""
        assert pair in self._slot
        return False

    def _settle(self) -> None:
        """Around an iteration: pairs that were read whole stay as long as nobody needs the room."""
        for pair, futures in self._reading.items():
            if any(future.cancelled() or future.exception() for future in futures):
                self._free.append(self._slot.pop(pair))
        self._reading.clear()
        self._idle |= dict.fromkeys(pair for pair in self._slot if pair not in self._idle)

    def _cutter(self, pairs: Ids, where: Views, cutters: ThreadPoolExecutor) -> Cutter:
        """What begins to cut the images of a step, when its pairs are in memory, and later gives them."""
        size, count = self.cubes.size, pairs.shape[1]
        threads = min(torch.get_num_threads(), MOST_CUTTERS, count)
        bounds = [count * self.channels * k // threads for k in range(threads + 1)]
        row, column = where.row.reshape(len(pairs), -1), where.column.reshape(len(pairs), -1)
        send = _sender(self.device) if self.device.type in STREAMING else None

        def cut(step: int) -> Callable[[], Tensor]:
            images = torch.empty((count, self.channels, size, size), pin_memory=send is not None)
            start = (where.start[step] + self._places[pairs[step]][:, None]).ravel()
            arrays = (start, row[step], column[step], images.view(-1, size, size).numpy())
            parts = [[array[a:b] for array in arrays] for a, b in pairwise(bounds)]
            memory = self._memory.reshape(-1)
            pieces = [cutters.submit(slicing.copy_slices, memory, *part) for part in parts]

            def finish() -> Tensor:
                for piece in pieces:
                    piece.result()
                return _in_memory_format(send(images) if send else images.to(self.device))

            return finish

        return cut


class DeviceCache(HostCache):
    """The pairs of this process's share on the device, where slices are cut; host memory passes them on."""

    def __init__(
        self, cubes: CubeFile, seeds: range, preparation: Preparation, *, channels: int, device: torch.device
    ) -> None:
        # A GPU reads along any axis without a rotated copy.
        super().__init__(
            cubes, seeds, preparation, rotated=False, channels=channels, device=device, keep=False
        )
        self.name = "device"
        self._on_device = torch.empty(0)
        self._cut_views: slicing.Gather | None = None
        self._rank: dict[int, int] = {}  # pair -> its place on the device
        self._there: set[int] = set()

    def _make_room(self, pairs: Ids, coming: Plan) -> None:
        share = np.unique(pairs).tolist()
        if not self._rank.keys() >= set(share):
            self._on_device = torch.empty(0)
            with torch.inference_mode(False):
                self._on_device = torch.empty(
                    (len(share), len(GRAVITIES), *self._shape[2:]), device=self.device
                )
            self._rank = {pair: rank for rank, pair in enumerate(share)}
            self._there.clear()
        if not self._there >= set(share) and len(self._memory) == 0:
            self._resize(min(len(share), AHEAD))

    def _allocate(self, slots: int) -> NDArray[np.float32]:
        with torch.inference_mode(False):
            return torch.empty((slots, *self._shape), pin_memory=self.device.type in STREAMING).numpy()

    def _read(self, pair: int, readers: ThreadPoolExecutor) -> bool:
        return pair in self._there or super()._read(pair, readers)

    def _arrived(self, pair: int) -> bool:
        if pair in self._there:
            return False
        # Only this thread speaks to the device: calls of others would break the capture of a CUDA graph.
        self._on_device[self._rank[pair]].copy_(torch.from_numpy(self._memory[self._slot[pair], :, 0]))
        self._there.add(pair)
        self._idle[pair] = None
        return True

    def _cutter(self, pairs: Ids, where: Views, cutters: ThreadPoolExecutor) -> Cutter:
        size, (steps, count) = self.cubes.size, pairs.shape
        ranks = np.zeros(len(self.seeds), np.int64)
        ranks[list(self._rank)] = list(self._rank.values())
        places = (ranks * self._on_device[0].numel())[pairs][:, :, None]
        start, row, column = (
            torch.from_numpy(part.reshape(steps, -1)).to(self.device)  # once for the whole epoch
            for part in (where.start + places, where.row, where.column)
        )
        memory = self._on_device.view(-1)
        cut_views = self._cut_views or slicing.choose_gather(memory, start[0], row[0], column[0], size)
        self._cut_views = cut_views

        def cut(step: int) -> Callable[[], Tensor]:
            images = cut_views(memory, start[step], row[step], column[step], size)
            return lambda: _in_memory_format(images.view(count, self.channels, size, size))

        return cut


class _Sender:
    """Copies batches to a GPU while it computes.

    Nothing else in a step waits for the GPU, so this keeps the host from preparing more than a few batches
    ahead of it, each of which takes memory on both.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._steps: deque[torch.Event] = deque()

    def __call__(self, images: Tensor) -> Tensor:
        """The images on the device; `images` are pinned."""
        computing = self._module.current_stream(self._device)
        self._steps.append(computing.record_event())
        if len(self._steps) > BATCHES_AHEAD:
            self._steps.popleft().synchronize()
        with self._module.stream(self._stream):
            there = images.to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        there.record_stream(computing)  # its memory was taken by one stream and is used by another
        return there


@cache
def _sender(device: torch.device) -> _Sender:
    """The one sender for a device: every stream has a memory pool of its own, which is never given back."""
    return _Sender(device)


def image_memory_format(device: torch.device) -> torch.memory_format:
    """The memory format of images, and of the network that takes them, on `device`.

    channels_last is several times as fast. On MPS the gradient of batch normalization is wrong in it
    (https://github.com/pytorch/pytorch/issues/175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def _in_memory_format(images: Tensor) -> Tensor:
    """The same images; with one channel the memory is the same too, only the strides say what they are."""
    memory_format = image_memory_format(images.device)
    _, channels, height, width = images.shape
    if channels == 1 and memory_format is torch.channels_last:
        return images.as_strided(images.shape, (height * width, 1, width, 1))
    return images.contiguous(memory_format=memory_format)
