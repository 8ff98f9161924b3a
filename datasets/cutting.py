"""Cutting slices out of cubes in memory: a slice, flipped and turned in any way, is an affine view of its cube.

Element (i, j) of an image lies ``start + i * row + j * column`` floats into the memory that holds the cubes. Where
``column`` is 1 the rows are copied as they lie. To have that for slices across axis 2 as well, which would touch one
float per cache line, a second copy of each cube is held, rotated once when it is loaded: cube[x, y, z], rotated[z, x, y].
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from .order import Ids, decode

INDEX_BYTES = 64 << 20  # of the index that the torch version builds at a time


class Views(NamedTuple):
    """Where images lie in memory, in floats; three arrays of one shape."""

    start: Ids
    row: Ids
    column: Ids


def views(ids: Ids, symmetries: Ids, places: Ids, size: int, *, channels: int, rotated: bool) -> Views:
    """Views (len(ids) * channels) of slices whose pairs of cubes begin at ``places`` (floats, like ids).

    A pair holds the Newtonian cube, then that of General Relativity, each followed by its rotated copy if there are
    any. Channel c of the slice at position p lies at position p + c, periodic as the box is.
    """
    _, gravity, axis, position = decode(ids, size)
    cube, plane = size**3, size**2
    position = (position[:, None] + np.arange(channels)) % size
    turned = symmetries >> 2 & 1
    # strides of (x, y, z) in the copy of the cube that has this slice's rows in one piece, if one has
    use_copy = (axis == 2) | ((axis == 0) & (turned == 1)) if rotated else np.zeros(len(ids), bool)
    strides = np.where(use_copy[:, None], (size, 1, plane), (plane, size, 1))
    across = np.take_along_axis(strides, axis[:, None], 1)
    row = strides[np.arange(len(ids)), np.where(axis == 0, 1, 0)]
    column = strides[np.arange(len(ids)), np.where(axis == 2, 1, 2)]
    start = places + (gravity * (2 if rotated else 1) + use_copy) * cube
    flip_rows, flip_columns = symmetries & 1, symmetries >> 1 & 1
    start = start + (size - 1) * (flip_rows * row + flip_columns * column)
    row, column = row * (1 - 2 * flip_rows), column * (1 - 2 * flip_columns)
    row, column = np.where(turned, column, row), np.where(turned, row, column)
    starts = (start[:, None] + position * across).ravel()
    return Views(starts, np.repeat(row, channels), np.repeat(column, channels))


@njit(parallel=True, nogil=True, cache=True)
def cut(memory: NDArray[np.float32], start: Ids, row: Ids, column: Ids, images: NDArray[np.float32]) -> None:
    """Copies views of ``memory`` (flat) into ``images`` (len(start), N, N)."""
    size = images.shape[1]
    for image in prange(images.shape[0]):
        first, r, c = start[image], row[image], column[image]
        if c == 1:
            for i in range(size):
                place = first + i * r
                images[image, i, :] = memory[place : place + size]
        elif c == -1:
            for i in range(size):
                place = first + i * r
                images[image, i, :] = memory[place - size + 1 : place + 1][::-1]
        else:
            # The columns lie in one piece instead: read them as they lie and turn them within the cache. The padding
            # keeps the rows of the tile from falling onto the same few cache lines.
            tile = np.empty((size, size + 16), np.float32)
            low = first if r == 1 else first - size + 1
            for j in range(size):
                place = low + j * c
                tile[j, :size] = memory[place : place + size]
            for i in range(size):
                k = i if r == 1 else size - 1 - i
                for j in range(size):
                    images[image, i, j] = tile[j, k]


def cut_on_device(memory: Tensor, start: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """The same as `cut` where ``memory`` is: images (len(start), N, N)."""
    side = torch.arange(size, device=memory.device)
    images = memory.new_empty(len(start), size, size)
    step = max(1, INDEX_BYTES // (8 * size * size))
    for k in range(0, len(start), step):
        part = slice(k, k + step)
        index = (
            start[part, None, None] + row[part, None, None] * side[:, None] + column[part, None, None] * side
        )
        images[part] = memory[index]
    return images


@njit(nogil=True, cache=True)
def standardise(cube: NDArray[np.float32], mean: float, std: float, factor: float) -> None:
    """(cube - mean) / std * factor in place, computed in float64 and rounded once."""
    flat = cube.reshape(-1)
    for i in range(flat.size):
        flat[i] = (flat[i] - mean) / std * factor


@njit(nogil=True, cache=True)
def rotate(cube: NDArray[np.float32], rotated: NDArray[np.float32]) -> None:
    """rotated[z, x, y] = cube[x, y, z]."""
    size = cube.shape[0]
    tile = np.empty((size, size + 16), np.float32)
    for x in range(size):
        for y in range(size):
            tile[y, :size] = cube[x, y]
        for z in range(size):
            for y in range(size):
                rotated[z, x, y] = tile[y, z]
