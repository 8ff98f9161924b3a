"""Inner loops over cubes: compiled by Numba for host memory, by torch.compile for an accelerator.

A slice under a symmetry is an affine view of its cube, and a periodic shift rotates the indices of the view.
With i' = (i + row_offset) mod N and j' = (j + column_offset) mod N, element (i, j) of the image is at `start
+ i' * row + j' * column` in the memory that holds the cubes, in floats.
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
Gather = Callable[..., Tensor]  # arguments as those of `gather_in_parts`

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
    memory: NDArray[np.float32],
    start: Ids,
    row: Ids,
    column: Ids,
    row_offset: Ids,
    column_offset: Ids,
    images: NDArray[np.float32],
) -> None:
    """Copy views of `memory` (flat) into `images` (len(start), N, N), on one thread."""
    size = images.shape[1]
    # The padding spreads the columns of the tile over the sets of the processor's cache.
    tile = np.empty((size, size + 16), np.float32)
    for k in range(images.shape[0]):
        image = images[k]
        if abs(column[k]) == 1:
            _copy(memory, start[k], row[k], column[k], row_offset[k], column_offset[k], size, image)
        else:  # the columns of the image are contiguous in memory: copy them as rows, transpose in the cache
            _copy(memory, start[k], column[k], row[k], column_offset[k], row_offset[k], size, tile)
            for i in range(size):
                for j in range(size):
                    image[_unsigned(i), _unsigned(j)] = tile[_unsigned(j), _unsigned(i)]


@njit(nogil=True, cache=CACHED, inline="always")
def _copy(
    memory: NDArray[np.float32],
    first: int,
    row: int,
    column: int,
    row_offset: int,
    column_offset: int,
    size: int,
    to: Image,
) -> None:
    """Copy a view whose rows are contiguous in memory: `column` is 1 or -1."""
    if abs(row) == size:  # the rows are adjacent; in ascending order the hardware prefetches them
        for n in range(size):
            i = size - 1 - n if row < 0 and column == 1 else n
            image_row = to[(i - row_offset) % size]
            begin, count = first + i * row, size - column_offset
            _copy_run(memory, begin + column_offset * column, column, count, image_row)
            _copy_run(memory, begin, column, column_offset, image_row[count:])
    else:  # the rows are far apart: several at a time, so that their cache misses overlap
        for i in range(0, size, ROWS):
            for j in range(0, size, RUN):
                image_column = (j - column_offset) % size
                count = size - image_column  # to the right edge of the image, where a shifted run is split
                for near in range(i, i + ROWS):
                    image_row = to[(near - row_offset) % size]
                    begin = first + near * row + j * column
                    if count >= RUN:
                        _copy_run(memory, begin, column, RUN, image_row[image_column:])
                    else:
                        _copy_run(memory, begin, column, count, image_row[image_column:])
                        _copy_run(memory, begin + count * column, column, RUN - count, image_row)


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


@njit(nogil=True, cache=CACHED)
def twin_correlation(a: NDArray[np.float32], b: NDArray[np.float32], points: int, step: int) -> float:
    """Correlation of the curvature of two cubes at `points`^3 places; NaN for a constant line in one.

    Curvature is the sum of the second differences along the axes. Lines run along axis 1 or 2: beside those
    in the first plane and the first of each plane, every `step`-th of each `step`-th plane is examined.
    """
    if _has_constant_line(a, step) or _has_constant_line(b, step):
        return np.nan
    size = len(a)
    between = size // points
    product = square_a = square_b = 0.0
    for x in range(between // 2, size, between):
        for y in range(between // 2, size, between):
            for z in range(between // 2, size, between):
                value_a, value_b = _curvature(a, x, y, z), _curvature(b, x, y, z)
                product += value_a * value_b
                square_a += value_a * value_a
                square_b += value_b * value_b
    return product / max(np.sqrt(square_a) * np.sqrt(square_b), 1e-300)


@njit(nogil=True, cache=CACHED, inline="always")
def _curvature(cube: NDArray[np.float32], x: int, y: int, z: int) -> float:
    return (np.float64(cube[x - 1, y, z]) + cube[x + 1, y, z] + cube[x, y - 1, z] + cube[x, y + 1, z]) + (
        np.float64(cube[x, y, z - 1]) + cube[x, y, z + 1] - 6 * np.float64(cube[x, y, z])
    )


@njit(nogil=True, cache=CACHED)
def _has_constant_line(cube: NDArray[np.float32], step: int) -> bool:
    size = len(cube)
    for x in range(size):
        every = 1 if x == 0 else step if x % step == 0 else size
        for y in range(0, size, every):
            z = 1
            while z < size and cube[x, y, z] == cube[x, y, 0]:
                z += 1
            if z == size:
                return True
        for z in range(0, size, every):
            y = 1
            while y < size and cube[x, y, z] == cube[x, 0, z]:
                y += 1
            if y == size:
                return True
    return False


def choose_gather(memory: Tensor, size: int, *views: Tensor) -> Gather:
    """The fastest function that does on the device of `memory` what `copy_slices` does on the host.

    It takes the same arguments as this function: memory (flat), N, and the fields (n) of the views in the
    order of `copy_slices`. It returns images (n, N, N). The compiled function is tried on these views; where
    compilation fails, a warning is logged and the eager function is returned.
    """
    if memory.device.type in ("cpu", "mps"):
        return gather_in_parts
    import torch._dynamo

    fused = _fused_gather()
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            fused(memory, size, *views)
    except Exception as error:  # Triton, a C compiler or the headers of Python are missing
        log.warning("torch.compile does not work here, slicing runs without it: %r", error)
        return gather_in_parts
    return fused


@cache
def _fused_gather() -> Gather:
    """One kernel that computes indices as it copies and stores none of them."""
    compiled: Gather = torch.compile(_gather)
    return compiled


def gather_in_parts(memory: Tensor, size: int, *views: Tensor) -> Tensor:
    """The images, in parts, because an index takes twice the memory of its images."""
    count = max(1, INDEX_BYTES // (8 * size * size))
    parts = zip(*(field.split(count) for field in views), strict=True)
    return torch.cat([_gather(memory, size, *part) for part in parts])


def _gather(
    memory: Tensor,
    size: int,
    start: Tensor,
    row: Tensor,
    column: Tensor,
    row_offset: Tensor,
    column_offset: Tensor,
) -> Tensor:
    side = torch.arange(size, device=memory.device)
    rows = start[:, None] + row[:, None] * ((side + row_offset[:, None]) % size)
    columns = column[:, None] * ((side + column_offset[:, None]) % size)
    return memory[rows[:, :, None] + columns[:, None, :]]
