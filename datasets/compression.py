"""Filters and chunks of HDF5 data sets: which are missing, and which make it slow to read whole cubes."""

from __future__ import annotations

from system import UserError

import contextlib
import importlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

if TYPE_CHECKING:
    from .cube_file import Cubes

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
