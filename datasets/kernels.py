"""Inner loops over cubes: compiled by Numba for host memory, by torch.compile for an accelerator.

A slice under a symmetry is an affine view of its cube: element (i, j) of the image lies
`start + i * row + j * column` floats into the memory that holds the cubes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from .sampler import Ids

ROWS, RUN = 8, 32  # rows copied side by side, and floats of one row in a run: the fastest in measurements
INDEX_BYTES = 64 << 20  # memory of the index that `gather_in_parts` builds at a time

Image = NDArray[np.float32]
Gather = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

log = logging.getLogger(__name__)


def _can_cache() -> bool:
    """Whether compiled code can be stored for the next start; a read-only image without a home cannot."""
    try:
        njit(_can_cache, cache=True)
    except RuntimeError:
        return False
    return True


CACHED = _can_cache()
_unsigned = np.uint64  # indices that cannot be negative let the compiler vectorize the loops


@njit(nogil=True, cache=CACHED)
def copy_slices(
    memory: NDArray[np.float32], start: Ids, row: Ids, column: Ids, images: NDArray[np.float32]
) -> None:
    """Copy views of `memory` (flat) into `images` (len(start), N, N), on one thread."""
    size = images.shape[1]
    # The padding spreads the columns of the tile over the sets of the processor's cache.
    tile = np.empty((size, size + 16), np.float32)
    for k in range(images.shape[0]):
        image = images[k]
        if abs(column[k]) == 1:
            _copy(memory, start[k], row[k], column[k], size, image)
        else:  # the columns of the image are contiguous in memory: copy them as rows, transpose in the cache
            _copy(memory, start[k], column[k], row[k], size, tile)
            for i in range(size):
                for j in range(size):
                    image[_unsigned(i), _unsigned(j)] = tile[_unsigned(j), _unsigned(i)]


@njit(nogil=True, cache=CACHED, inline="always")
def _copy(memory: NDArray[np.float32], first: int, row: int, column: int, size: int, to: Image) -> None:
    """Copy a view whose rows are contiguous in memory: `column` is 1 or -1."""
    if abs(row) == size:  # the rows are adjacent; in ascending order the hardware prefetches them
        for n in range(size):
            i = size - 1 - n if row < 0 and column == 1 else n
            _copy_run(memory, first + i * row, column, size, to[i])
    else:  # the rows are far apart: several at a time, so that their cache misses overlap
        for i in range(0, size, ROWS):
            for j in range(0, size, RUN):
                for near in range(i, i + ROWS):
                    _copy_run(memory, first + near * row + j * column, column, RUN, to[near, j:])


@njit(nogil=True, cache=CACHED, inline="always")
def _copy_run(
    memory: NDArray[np.float32], offset: int, stride: int, count: int, to: NDArray[np.float32]
) -> None:
    begin = _unsigned(offset)
    if stride == 1:
        for n in range(count):
            to[_unsigned(n)] = memory[begin + _unsigned(n)]
    else:
        for n in range(count):
            to[_unsigned(n)] = memory[begin - _unsigned(n)]


@njit(nogil=True, cache=CACHED)
def standardize(cube: NDArray[np.float32], mean: float, factor: float) -> None:
    """(cube - mean) * factor in place, computed in float64 and rounded once."""
    flat = cube.reshape(-1)
    for i in range(flat.size):
        flat[i] = (flat[i] - mean) * factor


@njit(nogil=True, cache=CACHED)
def rotate(cube: NDArray[np.float32], rotated: NDArray[np.float32]) -> None:
    """rotated[z, x, y] = cube[x, y, z]."""
    size = _unsigned(cube.shape[0])
    # Each plane is transposed within the processor's cache; the padding spreads its columns over the cache's
    # sets.
    plane = np.empty((size, size + _unsigned(16)), np.float32)
    for x in range(size):
        for y in range(size):
            for z in range(size):
                plane[y, z] = cube[x, y, z]
        for z in range(size):
            for y in range(size):
                rotated[z, x, y] = plane[y, z]


def choose_gather(memory: Tensor, start: Tensor, row: Tensor, column: Tensor, size: int) -> Gather:
    """The fastest function that does on the device of `memory` what `copy_slices` does on the host.

    It takes the same arguments as this function and returns images (len(start), N, N). The compiled function
    is tried on these views; where compilation fails, a warning is logged and the eager function is returned.
    """
    if memory.device.type in ("cpu", "mps"):
        return gather_in_parts
    import torch._dynamo

    fused = _fused_gather()
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            fused(memory, start, row, column, size)
    except Exception as error:  # Triton, a C compiler or the headers of Python are missing
        log.warning("torch.compile does not work here, slicing runs without it: %r", error)
        return gather_in_parts
    return fused


@cache
def _fused_gather() -> Gather:
    """One kernel that computes indices as it copies and stores none of them."""
    compiled: Gather = torch.compile(_gather)
    return compiled


def gather_in_parts(memory: Tensor, start: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """The images (len(start), N, N), in parts, because an index takes twice the memory of its images."""
    step = max(1, INDEX_BYTES // (8 * size * size))
    parts = zip(start.split(step), row.split(step), column.split(step), strict=True)
    return torch.cat([_gather(memory, s, r, c, size) for s, r, c in parts])


def _gather(memory: Tensor, start: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    side = torch.arange(size, device=memory.device)
    lines = start[:, None] + row[:, None] * side
    return memory[lines[:, :, None] + (column[:, None] * side)[:, None, :]]
