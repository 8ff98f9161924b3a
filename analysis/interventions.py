"""Interventions on the modes of slices, and what they do to the logits of a network.

Three kinds: `low_pass` keeps the modes below a wavenumber, `high_pass` those above it, `exchange` gives each
twin a set of modes of the other. Twins share their initial conditions, so an exchange leaves every slice a
plausible one; a filter does not. An exchange is therefore the basis of the attribution (attribution.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis import summary
from analysis.power_spectrum import Box, mu4, shells, wave_vectors, wavenumber
from analysis.saliency import Batch, gradient
from training.metrics import Predictions

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Network = Callable[..., Tensor]

POSITIONS = 16  # slices per axis of a cube that are changed; neighbouring slices look nearly the same
PAIRS_PER_BATCH = 16  # bounds the memory
KINDS = ("low_pass", "high_pass", "exchange")
LARGE_SCALES = 4  # modes with n up to this are called large scales
AXES, DIAGONALS = 0.9, 0.6  # mu4 of a slice's mode: above, along a grid axis; below, along a diagonal
GROUPS = ("mean", "large_scales", "axes", "between", "diagonals")


@dataclass(frozen=True)
class Bands:
    """Bands of n that partition the modes of a slice: [edges[i], edges[i + 1]); the first is the mean."""

    size: int
    edges: tuple[float, ...]  # in units of the fundamental mode

    @classmethod
    def logarithmic(cls, size: int, bands: int = 12) -> Bands:
        """About `bands` bands of equal width in log k, whole rings each; the last includes the corners."""
        rings = np.unique(np.geomspace(1, size // 2 + 1, bands + 1).round())
        return cls(size, (0.0, *(rings - 0.5)[:-1].tolist(), float(np.ceil(size / np.sqrt(2)) + 1)))

    def __len__(self) -> int:
        return len(self.edges) - 1

    @cached_property
    def masks(self) -> Tensor:
        """Which modes of a real transform each band holds: (bands, N, N // 2 + 1)."""
        n = wavenumber(wave_vectors(self.size, 2))
        edges = torch.tensor(self.edges, dtype=n.dtype)[:, None, None]
        return (n >= edges[:-1]) & (n < edges[1:])

    def centres(self, box: Box) -> Floats:
        """Wavenumbers in the middle of the bands; of the last, up to the Nyquist frequency."""
        ends = np.minimum(self.edges[1:], box.size / 2 + 0.5)
        return np.sqrt(ends[:-1] * ends[1:]) * box.fundamental

    def cuts(self, box: Box) -> Floats:
        """Wavenumbers of the edges between bands: a low pass keeps what is below, a high pass the rest."""
        return np.array(self.edges[1:-1]) * box.fundamental


def group_masks(size: int) -> Tensor:
    """Which modes of a real transform of a slice belong to each of GROUPS: (groups, N, N // 2 + 1).

    Modes with n > LARGE_SCALES are divided by their direction to the grid axes.
    """
    vectors = wave_vectors(size, 2)
    n, direction = wavenumber(vectors), mu4(vectors)
    small = n > LARGE_SCALES
    axes, diagonals = small & (direction > AXES), small & (direction < DIAGONALS)
    return torch.stack([n == 0, (n > 0) & ~small, axes, small & ~axes & ~diagonals, diagonals])


def components(slices: Tensor, masks: Tensor) -> Iterator[Tensor]:
    """What the modes of each mask contribute to slices (..., N, N); if the masks partition, they add up."""
    modes = torch.fft.rfft2(slices)
    for mask in masks.to(slices.device):
        yield torch.fft.irfft2(modes * mask, s=slices.shape[-2:])


def exchange(newton: Tensor, gr: Tensor, masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Twin slices (b, C, N, N) that exchanged the modes of one mask at a time."""
    for difference in components(gr - newton, masks):
        yield newton + difference, gr - difference


def filter_bands(newton: Tensor, gr: Tensor, masks: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Twin slices (b, C, N, N) below and above each edge between bands: (kind, newton, gr)."""
    low, low_gr = torch.zeros_like(newton), torch.zeros_like(gr)
    for part, part_gr in zip(components(newton, masks[:-1]), components(gr, masks[:-1]), strict=True):
        low, low_gr = low + part, low_gr + part_gr
        yield "low_pass", low, low_gr
        yield "high_pass", newton - low, gr - low_gr


def columns(bands: Bands) -> dict[str, slice]:
    """The columns of the table that `measure` returns."""
    widths = {"none": 1, "low_pass": len(bands) - 1, "high_pass": len(bands) - 1, "exchange": len(bands)}
    widths |= {"groups": len(GROUPS), "saliency": bands.size // 2}
    ends = np.cumsum(list(widths.values()))
    return {name: slice(int(end - widths[name]), int(end)) for name, end in zip(widths, ends, strict=True)}


def measure(network: Network, batches: Iterable[Batch], bands: Bands, box: Box) -> tuple[Integers, Floats]:
    """Logits of POSITIONS slices per axis of each cube, unchanged and after each intervention.

    `batches` come seed by seed, Newtonian cube first. Returns sample ids (slices,) and a table (slices,
    columns), whose columns `columns` names. The last ones are the power spectrum of d logit / d pixel.
    """
    ids, rows = [], []
    groups = group_masks(box.size)
    for pair_ids, (newton, gr) in _twins(batches, max(1, box.size // POSITIONS)):
        changed: dict[str, list[Tensor]] = {name: [] for name in columns(bands)}
        both = torch.cat([newton, gr])
        logits_of = partial(network, axes=pair_ids.flatten() // box.size % 3)
        with torch.no_grad():
            changed["none"].append(logits_of(both))
            for kind, low, high in filter_bands(newton, gr, bands.masks):
                changed[kind].append(logits_of(torch.cat([low, high])))
            for kind, masks in (("exchange", bands.masks), ("groups", groups)):
                changed[kind] += [logits_of(torch.cat(pair)) for pair in exchange(newton, gr, masks)]
        slopes = shells(box, 2).power(gradient(logits_of, both)[:, 0])
        logits = torch.stack([column for kind in changed.values() for column in kind], dim=1)
        ids.append(pair_ids.flatten())
        rows.append(np.hstack([logits.cpu().double().numpy(), slopes]))
    return torch.cat(ids).numpy(), np.concatenate(rows)


def _twins(batches: Iterable[Batch], stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids (2, b) and every `stride`-th slice (2, b, C, N, N) of twins, Newtonian first."""
    for _, simulation in groupby(
        batches, key=lambda batch: int(batch.ids[0]) // (6 * batch.images.shape[-1])
    ):
        ids, images = [], []
        for batch in simulation:
            chosen = batch.ids % batch.images.shape[-1] % stride == stride // 2
            ids.append(batch.ids[chosen])
            images.append(batch.images[chosen.to(batch.images.device)])
        # ids ascend, so the first half is the Newtonian cube's and the second the same slices of its twin
        pairs = torch.cat(ids).view(2, -1), torch.cat(images).unflatten(0, (2, -1))
        for start in range(0, pairs[0].shape[1], PAIRS_PER_BATCH):
            yield tuple(part[:, start : start + PAIRS_PER_BATCH] for part in pairs)  # type: ignore[misc]


def summarize(predictions: Predictions, table: Floats, bands: Bands, box: Box) -> dict[str, Any]:
    """Metrics by wavenumber of the slices in `table` (slices, columns), unchanged and after each
    intervention.

    Wavenumbers are in h/Mpc, or in units of the fundamental mode where the box is not known. `saliency` is
    the share of each ring |n| = 1, ..., N/2 in the power of d logit / d pixel.
    """
    places = columns(bands)
    results: dict[str, Any] = {
        "unit": box.unit,
        "slices": len(predictions),
        "edges": np.array(bands.edges) * box.fundamental,
        "cuts": bands.cuts(box),
        "centres": bands.centres(box),
        "none": summary.headline(predictions.with_logits(table[:, 0])),
    }
    for kind in KINDS:
        found = [summary.headline(predictions.with_logits(column)) for column in table[:, places[kind]].T]
        results[kind] = {key: [estimates[key] for estimates in found] for key in found[0]}
    slopes = table[:, places["saliency"]].mean(0) * np.arange(1, box.size // 2 + 1)  # modes grow as n
    results["saliency"] = slopes / (slopes.sum() or 1.0)  # a network with dead units has no gradient
    return results
