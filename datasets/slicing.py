"""Cutting slices out of cubes in memory: a slice, flipped and turned, is an affine view of its cube.

Element (i, j) of an image lies `start + i * row + j * column` floats into the memory that holds the cubes.
Where `column` is 1 or -1, the rows of the image lie in the cube as they are. To have that for slices across
axis 2 too, which would otherwise touch one float per cache line, a second copy of each cube is held, rotated
once when it is loaded: rotated[z, x, y] = cube[x, y, z].
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from .sampler import Ids, decode

INDEX_BYTES = 64 << 20  # of the index that `gather_in_parts` builds at a time
ROWS, RUN = 8, 32  # rows walked side by side, and the floats of one row in a run: measured best

Image = NDArray[np.float32]
Gather = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

log = logging.getLogger(__name__)


def _can_cache() -> bool:
    """Whether compiled code can be kept for the next start: not in a read-only image without a home."""
    try:
        njit(_can_cache, cache=True)
    except RuntimeError:
        return False
    return True


CACHED = _can_cache()
_unsigned = np.uint64  # spares compiled loops the handling of negative indices, and lets them be vectorised


class Views(NamedTuple):
    """Where images lie, in floats from the beginning of their pair of cubes; arrays of one shape."""

    start: Ids
    row: Ids
    column: Ids


def views(ids: Ids, symmetries: Ids, size: int, *, channels: int, rotated: bool) -> Views:
    """Views (..., channels) of slices `ids` (...) under `symmetries` (...).

    A pair is the Newtonian cube, then that of General Relativity, each followed by its rotated copy if there
    is one. Channel c of the slice at position p lies at position p + c, periodic as the box is.
    """
    where = decode(ids, size)
    axis, turned = where.axis, symmetries >> 2 & 1
    # The copy of the cube in which the rows of the image lie in one piece; for slices across axes 1 and 2
    # whose rows run along x there is none.
    copy = ((axis == 2) | ((axis == 0) & (turned == 1))) & rotated
    strides = np.array([[size * size, size, 1], [size, 1, size * size]])[copy.astype(np.int64)]  # of x, y, z
    across, row, column = (
        np.take_along_axis(strides, np.array(table)[axis][..., None], -1)
        for table in ([0, 1, 2], [1, 0, 0], [2, 2, 1])
    )
    flip_rows, flip_columns = (symmetries & 1)[..., None], (symmetries >> 1 & 1)[..., None]
    cubes = where.gravity * (2 if rotated else 1) + copy
    start = cubes[..., None] * size**3 + (size - 1) * (flip_rows * row + flip_columns * column)
    start = start + (where.position[..., None] + np.arange(channels)) % size * across
    row, column = row * (1 - 2 * flip_rows), column * (1 - 2 * flip_columns)
    turn = turned[..., None] == 1
    row, column = np.where(turn, column, row), np.where(turn, row, column)
    return Views(start, *(np.broadcast_to(stride, start.shape).copy() for stride in (row, column)))


@njit(nogil=True, cache=CACHED)
def copy_slices(
    memory: NDArray[np.float32], start: Ids, row: Ids, column: Ids, images: NDArray[np.float32]
) -> None:
    """Copies views of `memory` (flat) into `images` (len(start), N, N), on one thread."""
    size = images.shape[1]
    # The padding keeps the columns of the tile from falling onto the same few lines of the processor's cache.
    tile = np.empty((size, size + 16), np.float32)
    for k in range(images.shape[0]):
        image = images[k]
        if abs(column[k]) == 1:
            _copy(memory, start[k], row[k], column[k], size, image)
        else:  # the columns of the image lie in one piece: they become rows, which are turned in the cache
            _copy(memory, start[k], column[k], row[k], size, tile)
            for i in range(size):
                for j in range(size):
                    image[_unsigned(i), _unsigned(j)] = tile[_unsigned(j), _unsigned(i)]


@njit(nogil=True, cache=CACHED, inline="always")
def _copy(memory: NDArray[np.float32], first: int, row: int, column: int, size: int, to: Image) -> None:
    """Copies a view with `column` 1 or -1, whose rows lie in one piece."""
    if (
        abs(row) == size
    ):  # the rows follow each other; the processor fetches ahead if they are read in one sense
        for n in range(size):
            i = size - 1 - n if row < 0 and column == 1 else n
            _run(memory, first + i * row, column, size, to[i])
    else:  # far rows are read several at a time, so that the processor waits for several of them at once
        for i in range(0, size, ROWS):
            for j in range(0, size, RUN):
                for near in range(i, i + ROWS):
                    _run(memory, first + near * row + j * column, column, RUN, to[near, j:])


@njit(nogil=True, cache=CACHED, inline="always")
def _run(memory: NDArray[np.float32], place: int, stride: int, count: int, to: NDArray[np.float32]) -> None:
    begin = _unsigned(place)
    if stride == 1:
        for n in range(count):
            to[_unsigned(n)] = memory[begin + _unsigned(n)]
    else:
        for n in range(count):
            to[_unsigned(n)] = memory[begin - _unsigned(n)]


def choose_gather(memory: Tensor, start: Tensor, row: Tensor, column: Tensor, size: int) -> Gather:
    """The fastest way to do on a device what `cut` does, found by trying it on these views.

    It is called as this function and gives images (len(start), N, N).
    """
    if memory.device.type not in ("cuda", "xpu"):
        return gather_in_parts
    import torch._dynamo

    fused = _fused_gather()
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            fused(memory, start, row, column, size)
    except Exception as error:  # whatever is missing: Triton, a C compiler, Python's headers
        log.warning("slices are cut without torch.compile, which does not work here: %r", error)
        return gather_in_parts
    return fused


@cache
def _fused_gather() -> Gather:
    """One kernel, compiled once, that computes the index as it goes and stores none of it."""
    compiled: Gather = torch.compile(_gather)
    return compiled


def gather_in_parts(memory: Tensor, start: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """The images (len(start), N, N), some at a time because the index takes twice their memory."""
    step = max(1, INDEX_BYTES // (8 * size * size))
    parts = zip(start.split(step), row.split(step), column.split(step), strict=True)
    return torch.cat([_gather(memory, s, r, c, size) for s, r, c in parts])


def _gather(memory: Tensor, start: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    side = torch.arange(size, device=memory.device)
    lines = start[:, None] + row[:, None] * side
    return memory[lines[:, :, None] + (column[:, None] * side)[:, None, :]]


@njit(nogil=True, cache=CACHED)
def standardise(cube: NDArray[np.float32], mean: float, factor: float) -> None:
    """(cube - mean) * factor in place, computed in float64 and rounded once."""
    flat = cube.reshape(-1)
    for i in range(flat.size):
        flat[i] = (flat[i] - mean) * factor


@njit(nogil=True, cache=CACHED)
def rotate(cube: NDArray[np.float32], rotated: NDArray[np.float32]) -> None:
    """rotated[z, x, y] = cube[x, y, z]."""
    size = _unsigned(cube.shape[0])
    # One plane at a time is turned within the processor's cache. The padding keeps the columns of the plane
    # from falling onto the same few cache lines.
    plane = np.empty((size, size + _unsigned(16)), np.float32)
    for x in range(size):
        for y in range(size):
            for z in range(size):
                plane[y, z] = cube[x, y, z]
        for z in range(size):
            for y in range(size):
                rotated[z, x, y] = plane[y, z]
