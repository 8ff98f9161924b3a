"""Whether a network trained on one file may judge another: do equal values mean the same?"""

import math

import numpy as np

from .cube_file import GRAVITIES, CubeFile, DataError


def check_normalization(trained_on: CubeFile, other: CubeFile) -> None:
    """Raises DataError if the values of ``other`` are standardised otherwise than those of ``trained_on``."""
    for key in ("mean", "std"):
        before, now = trained_on.attr_float(key), other.attr_float(key)
        if before is not None and now is not None and not math.isclose(before, now, rel_tol=1e-6):
            raise DataError(
                f"{other.path}: found cubes standardised by {key} {now:.6g}, but the network was trained on "
                f"{trained_on.path} with {before:.6g}\nallowed: a file standardised by the same mean and std"
            )
    # Not every file says by what it is standardised; raw potentials are some 10^4 times smaller.
    before, now = (_spread(cubes) for cubes in (trained_on, other))
    if not 0.5 * before < now < 2 * before:
        raise DataError(
            f"{other.path}: found values with standard deviation {now:.3g}, but the network was trained on "
            f"{before:.3g} ({trained_on.path})\nallowed: a file standardised in the same way"
        )


def _spread(cubes: CubeFile) -> float:
    cube = np.empty((cubes.size,) * 3, np.float32)
    cubes.read(cubes.seeds[0], GRAVITIES[0], cube)
    return float(cube.std(dtype=np.float64))
