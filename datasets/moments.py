"""Mean and variance of values that come in parts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


class Moments:
    """Running mean and variance over parts of the data (Chan, Golub & LeVeque 1983, Am. Stat. 37, 242).

    Sums of squares are taken about the mean of each part, so a small variance about a large mean is exact.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Add one part, at least one value, C-contiguous; its values are overwritten."""
        mean = float(values.mean())
        values -= mean
        with np.errstate(over="ignore"):  # values that are too large have an infinite variance
            values *= values
            squares = float(values.sum())
        self._merge(values.size, mean, squares)

    def merge(self, other: Moments) -> None:
        """Add all values of `other`."""
        if other.count:
            self._merge(other.count, other.mean, other._squares)

    def _merge(self, count: int, mean: float, squares: float) -> None:
        difference, total = np.float64(mean - self.mean), self.count + count
        with np.errstate(over="ignore", invalid="ignore"):
            self._squares += squares
            self._squares += float(difference**2 * self.count * count / total)
            self.mean += float(difference * count / total)
        self.count = total

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean."""
        return self._squares / self.count

    @property
    def std(self) -> float:
        """Standard deviation, without Bessel's correction."""
        return math.sqrt(self.variance)
