"""Passes over the slices of whole simulations: what a network says of them, and what their scales do to it.

The batches come from one process's own simulations, Newton's slices of a seed before those of its twin, and
every seed fills whole batches. So a slice always meets the same neighbours in its batch, however many
processes there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.saliency import gradient
from analysis.spectra import INTERVENTIONS, Bands, Box, Network, PowerSpectrum, scan

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
POSITIONS = 16  # slices per axis that are filtered: their neighbours look nearly the same
PAIRS_AT_ONCE = 16  # bounds the memory of the interventions


class Batch(Protocol):
    """Predictions with their names."""

    @property
    def ids(self) -> Tensor:
        """Sample ids (b,), on the host."""

    @property
    def images(self) -> Tensor:
        """Predictions (b, C, N, N), on the device."""


def logits(network: Network, batches: Iterable[Batch]) -> tuple[Ids, Floats]:
    """Sample ids and logits (slices,) of all batches."""
    ids, said = [], []
    with torch.no_grad():
        for batch in batches:
            ids.append(batch.ids)
            said.append(network(batch.images).float())  # stays on the device: nothing waits for it
    return torch.cat(ids).numpy(), torch.cat(said).cpu().double().numpy()


def spectra(box: Box, batches: Iterable[Batch]) -> tuple[tuple[Ids, Floats], tuple[Ids, Floats]]:
    """Sample ids and P(k) (slices, shells) of all slices; names and P(k) (cubes, shells) of their cubes.

    Of several channels the first counts. A cube is called 2 * seed + label, and put together again from its
    slices across one axis; which one does not matter to an isotropic spectrum.
    """
    flat, solid = PowerSpectrum(box, 2), PowerSpectrum(box, 3)
    ids, planes, names, solids = [], [], [], []
    for (cube, _), part in groupby(batches, key=lambda batch: divmod(int(batch.ids[0]) // box.size, 3)):
        stack = list(part)
        field = torch.cat([batch.images[:, 0] for batch in stack])
        ids += [batch.ids for batch in stack]
        planes.append(flat(field))
        if cube not in names:
            names.append(cube)
            solids.append(solid(field[None]))
    return (torch.cat(ids).numpy(), torch.cat(planes).numpy()), (np.array(names), torch.cat(solids).numpy())


def find(batches: Iterable[Batch], name: int) -> Tensor:
    """The slice (1, C, N, N) of this sample id."""
    return next(batch.images[batch.ids == name] for batch in batches if name in batch.ids)


def columns(bands: Bands, shells: int) -> dict[str, slice]:
    """What the columns of `scales` hold."""
    widths = {
        "none": 1,
        "low_pass": len(bands) - 1,
        "high_pass": len(bands) - 1,
        "exchange": len(bands),
        "power": shells,
        "saliency": shells,
    }
    ends = np.cumsum(list(widths.values()))
    return {name: slice(int(end - widths[name]), int(end)) for name, end in zip(widths, ends, strict=True)}


def scales(network: Network, batches: Iterable[Batch], bands: Bands, box: Box) -> tuple[Ids, Floats]:
    """Of every `stride`-th slice: logits unchanged and after each intervention, P(k) and that of the
    gradient.

    Returns sample ids (slices,) and a table (slices, columns) whose columns are named by `columns`.
    """
    names, rows = [], []
    spectrum = PowerSpectrum(box, 2)
    for ids, twins in _twins(batches, max(1, box.size // POSITIONS)):
        both = twins.flatten(0, 1)
        with torch.no_grad():
            changed = scan(network, twins[0], twins[1], bands)
            said = [network(both)[:, None], *(changed[kind] for kind in INTERVENTIONS)]
        table = [part.cpu().double() for part in said]
        table += [spectrum(both[:, 0]), spectrum(gradient(network, both)[:, 0])]
        names.append(ids.flatten())
        rows.append(torch.cat(table, dim=1))
    return torch.cat(names).numpy(), torch.cat(rows).numpy()


def _twins(batches: Iterable[Batch], stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids (2, b) and slices (2, b, C, N, N) of twins, Newton first, of every `stride`-th slice of a cube."""
    for _, simulation in groupby(
        batches, key=lambda batch: int(batch.ids[0]) // (6 * batch.images.shape[-1])
    ):
        ids, images = [], []
        for batch in simulation:
            chosen = batch.ids % batch.images.shape[-1] % stride == stride // 2
            ids.append(batch.ids[chosen])
            images.append(batch.images[chosen.to(batch.images.device)])
        # ids ascend, so the first half is Newton's and the second the same slices of its twin
        pairs = torch.cat(ids).view(2, -1), torch.cat(images).unflatten(0, (2, -1))
        for start in range(0, pairs[0].shape[1], PAIRS_AT_ONCE):
            yield tuple(part[:, start : start + PAIRS_AT_ONCE] for part in pairs)  # type: ignore[misc]
