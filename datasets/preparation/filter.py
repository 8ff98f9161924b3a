"""Cubes without their small scales: a sharp filter in three dimensions, and fewer cells.

On small scales twins differ by the numerical method, not by gravity: the lattice of the particles and the
cell of the grid. A filter of the cubes removes these modes before slices are taken; a filter of slices would
leave modes of all wavenumbers along their normal. n is the wavenumber in units of the fundamental mode,
2 pi / L.

Fewer cells hold the remaining modes exactly: a cube of M cells per side represents all modes with
|n_i| < M/2, so cropping the discrete Fourier transform to these samples the same field, without these small
scales, at M^3 points. The modes |n_i| = M/2, of which M cells hold only the real part, are removed.
"""

from system import UserError

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cube_file import SIZE_UNIT


@dataclass(frozen=True)
class Filter:
    """What is kept of a cube; by default everything."""

    max_wavenumber: float | None = None
    """Keep the modes with |n| up to this."""
    cells: int | None = None
    """M, the cells per side of the filtered cube."""

    def __bool__(self) -> bool:
        return self.max_wavenumber is not None or self.cells is not None

    def attributes(self, path: Path, size: int, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """What a file of filtered cubes of `size` cells records, given the `attributes` of `path`.

        Raises UserError if the filter leaves no modes, removes none, or does not fit the cells.
        """
        n, cells = self.max_wavenumber, self.cells or size
        if not 0 < cells <= size or cells % SIZE_UNIT:
            raise UserError(
                f"--cells: found {cells}, allowed: a multiple of {SIZE_UNIT}, at most the {size} of {path}"
            )
        if n is not None and not 1 <= n < cells / 2:
            raise UserError(
                f"--max-wavenumber: found {n:g}, allowed: from 1, the longest wave of the box, to less than "
                f"{cells // 2}, half of the cells per side. No modes are left below, none removed above."
            )
        kept = [limit for limit in (n, attributes.get("max_wavenumber")) if limit is not None]
        return {"cells": cells} | ({"max_wavenumber": float(min(kept))} if kept else {})

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """A cube (..., N, N, N) -> (..., M, M, M), of the same floating-point type."""
        from scipy import fft  # takes a second, which training need not wait

        size = values.shape[-1]
        cells = self.cells or size
        half, axes = cells // 2, (-3, -2, -1)
        modes = fft.rfftn(values, axes=axes, workers=-1)
        if cells < size:
            rows = np.r_[:half, size - half : size]  # n = 0, ..., M/2 - 1, -M/2, ..., -1
            modes = modes[..., rows, :, :][..., rows, : half + 1] * (cells / size) ** 3
            modes[..., half, :, :], modes[..., half, :], modes[..., half] = 0, 0, 0
        if self.max_wavenumber is not None:
            squares = np.fft.fftfreq(cells, 1 / cells) ** 2
            n2 = squares[:, None, None] + squares[:, None] + squares[: half + 1]
            modes[..., n2 > self.max_wavenumber**2] = 0
        return np.asarray(fft.irfftn(modes, (cells,) * 3, axes, overwrite_x=True, workers=-1))


EVERYTHING = Filter()
