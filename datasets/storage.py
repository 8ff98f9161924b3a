"""How the values of a data set lie in its file: filters, chunks, and reading one stretch by several threads.

A local disk or the page cache gives one thread all its bandwidth. A parallel file system such as Lustre
limits each stream of reads, to about 100 MB/s, and serves many of them at the same time.
"""

from __future__ import annotations

from system import UserError

import contextlib
import importlib
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

if TYPE_CHECKING:
    from .cube_file import Cubes

STREAMS = 4  # per cube; several cubes are read at a time
MIN_PART_BYTES = 1 << 20
CHUNK_BYTES = 64 * 1024  # smaller chunks take longer to find than to copy
CHUNK_ROW_BYTES = 64  # shorter rows use a part of each cache line only

# Filters that the package hdf5plugin brings, by their registered number.
PLUGIN_FILTERS = {
    307: "bzip2", 32001: "Blosc", 32004: "LZ4", 32008: "bitshuffle", 32013: "ZFP", 32015: "Zstandard",
    32017: "SZ", 32018: "FCIDECOMP", 32024: "SZ3", 32026: "Blosc2", 32028: "Sperr",
}  # fmt: skip


def read_filters(data: h5py.Dataset) -> tuple[tuple[str, ...], str | None]:
    """The names of a data set's filters, and what to install for one that is missing."""
    creation, names, missing = data.id.get_create_plist(), [], None
    for i in range(creation.get_nfilters()):
        number, _, _, name = creation.get_filter(i)
        names.append(PLUGIN_FILTERS.get(number) or name.decode() or str(number))
        if not h5py.h5z.filter_avail(number):
            with contextlib.suppress(ImportError):
                importlib.import_module("hdf5plugin")  # registers its filters
        if not h5py.h5z.filter_avail(number):
            package = "pip install hdf5plugin" if number in PLUGIN_FILTERS else "install its HDF5 plugin"
            missing = f"is compressed with {names[-1]} (HDF5 filter {number}), not installed here: {package}"
    return tuple(names), missing


def check_filters(data: h5py.Dataset, path: Path) -> None:
    """Raise UserError if a filter is missing without which a data set cannot be read."""
    if missing := read_filters(data)[1]:
        raise UserError(f"{path}: {data.name} {missing}")


def slow_chunks(path: Path, cubes: Cubes) -> str | None:
    """A warning if filters or chunks make it slow to read whole cubes, with the command that fixes it."""
    for cube in cubes.values():
        if cube.chunks is None or cube.missing_filter:
            continue
        reasons = [f"has filters ({', '.join(cube.filters)})"] if cube.filters else []
        chunk, row = int(np.prod(cube.chunks)) * cube.dtype.itemsize, cube.chunks[-1] * cube.dtype.itemsize
        if chunk < CHUNK_BYTES or row < CHUNK_ROW_BYTES:
            reasons.append(f"has small or thin chunks {cube.chunks}")
        if reasons:
            repacked = path.with_name(f"{path.stem}_contiguous.h5")
            return (
                f"{path}: whole cubes are slow to read: /{cube.name} {' and '.join(reasons)}.\n"
                "Repack the file once: "
                f"python -m datasets repack {shlex.quote(str(path))} {shlex.quote(str(repacked))}"
            )
    return None


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
