"""Slices with what a network said of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Slices:
    """Logits of slices with where each comes from; all arrays (slices,), in the order of sample ids."""

    id: Integers
    seed: Integers
    label: Integers  # 1 = GR
    axis: Integers
    position: Integers
    logit: Floats

    def __len__(self) -> int:
        return len(self.logit)

    def where(self, mask: NDArray[np.bool_]) -> Slices:
        """Some of the slices."""
        return Slices(*(getattr(self, column.name)[mask] for column in fields(self)))

    def saying(self, logit: Floats) -> Slices:
        """The same slices with other logits."""
        return replace(self, logit=logit)

    @cached_property
    def probability(self) -> Floats:
        """The probability of General Relativity that the logit states."""
        return expit(self.logit)

    @property
    def extremes(self) -> dict[str, int]:
        """Places of the slices of which the network is most and least certain."""
        doubt = np.argsort(np.abs(self.logit), kind="stable")
        return {
            "most certain of GR": int(np.argmax(self.logit)),
            "most certain of Newton": int(np.argmin(self.logit)),
            "least certain": int(doubt[0]),
            "second least certain": int(doubt[1]),
        }

    def name(self, place: int) -> dict[str, Any]:
        """What one slice is, in words and numbers."""
        return {
            "seed": int(self.seed[place]),
            "gravity": "GR" if self.label[place] else "Newton",
            "axis": int(self.axis[place]),
            "position": int(self.position[place]),
            "logit": float(self.logit[place]),
        }

    @cached_property
    def seeds(self) -> Integers:
        """The seeds, ascending, each once."""
        return np.unique(self.seed)

    @cached_property
    def seed_index(self) -> Integers:
        """Place of each slice's seed among the seeds: (slices,)."""
        return np.searchsorted(self.seeds, self.seed)

    @cached_property
    def cube_logits(self) -> Floats:
        """Mean logit of each cube: (seeds, 2), Newton first."""
        cube = 2 * self.seed_index + self.label
        count = np.bincount(cube, minlength=2 * len(self.seeds))
        return (np.bincount(cube, self.logit, 2 * len(self.seeds)) / count).reshape(-1, 2)
