"""New data files: complete under their name, or not there at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from ..cube_file import DataError, packed_name


@contextmanager
def new_file(path: Path, *, bytes_needed: int, overwrite: bool = False) -> Iterator[h5py.File]:
    """An HDF5 file to be written under a temporary name, which becomes `path` when the block ends without an
    error.

    The temporary file (`NAME.xxxxxxxx.partial`, in the same folder) is removed after an error and is left
    behind only by a program that was killed. Folders on the way are made. Raises DataError if `path` exists
    and is not to be overwritten, if the disk is too small for `bytes_needed`, or if writing fails.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; the name of the HDF5 file to write is needed.")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already. Choose another name, or allow overwriting it with --force.")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise DataError(
            f"{path}: not enough space: the file needs {bytes_needed / 1e9:.2f} GB, "
            f"{existing} has {free / 1e9:.2f} GB."
        )
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(partial, "x", locking=False) as file:
            yield file
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # h5py raises either when a disk is full or read-only
        raise DataError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name itself last
    finally:
        os.close(folder)


def new_cube(file: h5py.File, seed: int, gravity: str, size: int) -> h5py.Dataset:
    """A data set (N, N, N) for a cube in the packed layout: float32 and contiguous, to be read straight.

    It gets its place in the file at once, so that the order of writing does not matter, and no filling.
    """
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(packed_name(seed, gravity), (size,) * 3, np.float32, dcpl=creation)
