"""Host memory for cubes, allocated once and reused epoch after epoch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


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
