"""New data files: a file appears under its name when it is complete."""

import system
from system import UserError

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

from ..cube_file import packed_name


def require_new(path: Path, *, overwrite: bool) -> None:
    """Raise UserError if `path` exists, unless it is a file and `overwrite`."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Give the name of the file to write.")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already. Choose another name, or overwrite it with --force.")


@contextmanager
def new_file(
    path: Path, *, bytes_needed: int, overwrite: bool = False, verify: Callable[[Path], None] | None = None
) -> Iterator[h5py.File]:
    """Write an HDF5 file under a temporary name, which becomes `path` when the block ends without an error.

    The temporary file (`NAME.xxxxxxxx.partial`, in the same folder) is removed after an error; that of a
    killed program is removed by the next one that writes `path`. Parent folders are created. Raises UserError
    if `path` exists and `overwrite` is False, if the disk has less than `bytes_needed` free, or if writing
    fails. Before the file gets its name `verify` may read it and raise an error.
    """
    require_new(path, overwrite=overwrite)
    remove_abandoned(path)
    existing = system.existing_parent(path.parent)
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise UserError(
            f"{path}: not enough space: the file needs {bytes_needed / 1e9:.2f} GB, "
            f"{existing} has {free / 1e9:.2f} GB. Free some, or choose another disk."
        )
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as written:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(written, fcntl.LOCK_EX)
            with h5py.File(partial, "w", locking=False) as file:
                yield file
            os.fsync(written.fileno())
        if verify is not None:
            verify(partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # h5py raises either for a disk that is full or read-only
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    system.sync_directory(path.parent)


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files of programs that were killed while they wrote `path`: nobody locks them."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.????????.partial"):
        with suppress(OSError), partial.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def new_cube(file: h5py.File, seed: int, gravity: str, size: int, fields: int = 1) -> h5py.Dataset:
    """A data set for a cube in the packed layout: float32 and contiguous, for direct reading.

    Its shape is (N, N, N) with N = `size`, or (C, N, N, N) with several `fields`. Its place in the file is
    allocated at once, without a fill value, so cubes can be written in any order.
    """
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    shape = (size,) * 3 if fields == 1 else (fields, size, size, size)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(packed_name(seed, gravity), shape, np.float32, dcpl=creation)
