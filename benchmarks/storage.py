"""Read speed of cubes on a parallel file system, emulated, and on the local disk.

    python benchmarks/storage.py [--size 256] [--seeds 6] [--folder DIR]

The emulation delays every read: 5 ms of latency, then 160 MB/s per stream, which are the figures of a Lustre
file system without striping. Four threads read the cubes of a file, as in training, each with 1 to 8 streams.
The table gives MB/s over all threads; data are in the page cache. Two more threads check the cubes for NaN at
the same time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets import streams as streams_module
from datasets.buffers import BufferPool
from datasets.cache import READERS, SEEDS_AHEAD, CubeReader, Prefetcher
from datasets.cube_file import GRAVITIES, CubeFile
from datasets.preparation.writer import new_cube, new_file

LATENCY, STREAM_SPEED = 0.005, 160e6  # s, bytes/s
preadv = os.preadv


def delayed_preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
    """os.preadv on the emulated file system."""
    started = time.perf_counter()
    count = preadv(descriptor, buffers, offset)
    time.sleep(max(0.0, LATENCY + count / STREAM_SPEED - (time.perf_counter() - started)))
    return count


def read_speed(path: Path, streams: int, rounds: int) -> float:
    """MB/s of the prefetcher of `cache: disk`; the best round counts. `streams` per cube."""
    cubes = CubeFile(path)
    streams_module.STREAMS = streams
    reader = CubeReader(cubes, range(len(cubes.seeds)), 0.0, 1.0, 1.0)
    pool = BufferPool((2, 1, *(cubes.size,) * 3), len(cubes.seeds))
    best = 0.0
    for _ in range(rounds):
        pool.resize(SEEDS_AHEAD)
        pool.memory.fill(0)  # the first access to new memory is slow
        before, started = cubes.bytes_read, time.perf_counter()
        prefetcher = Prefetcher(reader, pool, reader.seeds)
        for seed in reader.seeds:
            prefetcher.fill()
            prefetcher.wait(seed)
            pool.release(seed)
        prefetcher.close(cancel=True)
        best = max(best, (cubes.bytes_read - before) / (time.perf_counter() - started) / 1e6)
    return best


def main() -> None:
    """Write a file, read it, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=None, help="default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "cubes.h5"
        values = np.random.default_rng(0).standard_normal((options.size,) * 3, dtype=np.float32)
        with new_file(path, bytes_needed=2 * options.seeds * values.nbytes) as file:
            for seed in range(options.seeds):
                for gravity in GRAVITIES:
                    new_cube(file, seed, gravity, options.size).write_direct(values)
        print("| streams per cube | emulated MB/s | share of the limit | local MB/s |\n|---|---|---|---|")
        for streams in (1, 2, 4, 8):
            local = read_speed(path, streams, rounds=6)
            os.preadv = delayed_preadv
            emulated = read_speed(path, streams, rounds=3)
            os.preadv = preadv
            share = f"{emulated * 1e6 / (READERS * streams * STREAM_SPEED):.2f}"
            print(f"| {streams} | {emulated:.0f} | {share} | {local:.0f} |", flush=True)


if __name__ == "__main__":
    main()
