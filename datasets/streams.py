"""Reading one stretch of a file by several threads, as many as the storage rewards.

A local disk or the page cache gives one thread all its bandwidth. A parallel file system such as Lustre
limits each stream of reads, to some 100 MB/s, and serves many of them at the same time.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

MAX_STREAMS = 8  # per cube; several cubes are read at a time
MIN_PART_BYTES = 1 << 20
GAIN = 1.2  # twice as many streams must be this much faster
READS = 3  # measurements before a decision, of which the fastest counts


class StreamTuner:
    """Chooses the number of streams: doubles it from 1 while that makes reads faster. Thread-safe."""

    def __init__(self) -> None:
        self.count = 1
        self._settled = False
        self._previous = 0.0
        self._speeds: list[float] = []
        self._lock = threading.Lock()

    def fix(self, count: int) -> None:
        """Use this number and measure no more."""
        self.count, self._settled = count, True

    def record(self, count: int, num_bytes: int, seconds: float) -> None:
        """Take a measurement of a read with `count` streams into account."""
        with self._lock:
            if self._settled or count != self.count:
                return
            self._speeds.append(num_bytes / max(seconds, 1e-9))
            if len(self._speeds) < READS:
                return
            speed, self._speeds = max(self._speeds), []
            if speed < GAIN * self._previous:
                self.count //= 2
                self._settled = True
            elif self.count == MAX_STREAMS:
                self._settled = True
            else:
                self.count *= 2
                self._previous = speed


def read_into(path: Path, offset: int, target: memoryview, tuner: StreamTuner) -> int:
    """Fill `target` with the bytes of a file from `offset` on; returns their number. Raises OSError."""
    size = len(target)
    count = max(1, min(tuner.count, size // MIN_PART_BYTES))
    bounds = [size * k // count for k in range(count + 1)]
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if count == 1:
            done = _read_part(descriptor, offset, target)
        else:
            with ThreadPoolExecutor(count, "read-part") as pool:
                offsets = [offset + bound for bound in bounds[:-1]]
                parts = [target[a:b] for a, b in pairwise(bounds)]
                done = sum(pool.map(_read_part, [descriptor] * count, offsets, parts))
    finally:
        os.close(descriptor)
    tuner.record(count, size, time.perf_counter() - started)
    return done


def _read_part(descriptor: int, offset: int, target: memoryview) -> int:
    done = 0
    while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
        done += count
    return done
