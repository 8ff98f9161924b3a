"""Reading one stretch of a file by several threads.

A local disk or the page cache gives one thread all its bandwidth. A parallel file system such as Lustre
limits each stream of reads, to some 100 MB/s, and serves many of them at the same time.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

STREAMS = 4  # per cube; several cubes are read at a time
MIN_PART_BYTES = 1 << 20


def read_into(path: Path, offset: int, target: memoryview) -> int:
    """Fill `target` with the bytes of a file from `offset` on; returns their number. Raises OSError."""
    count = max(1, min(STREAMS, len(target) // MIN_PART_BYTES))
    bounds = [len(target) * k // count for k in range(count + 1)]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if count == 1:
            return _read_part(descriptor, offset, target)
        with ThreadPoolExecutor(count, "read-part") as pool:
            offsets = [offset + bound for bound in bounds[:-1]]
            parts = [target[a:b] for a, b in pairwise(bounds)]
            return sum(pool.map(_read_part, [descriptor] * count, offsets, parts))
    finally:
        os.close(descriptor)


def _read_part(descriptor: int, offset: int, target: memoryview) -> int:
    done = 0
    while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
        done += count
    return done
