"""Universes whose twins differ by a known ratio of power, and a network that knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import classifiers, fields, interventions, simulation_spectra, statistics
from analysis.fields import FieldSpectra
from analysis.interventions import Bands
from analysis.lattice import Lattice
from analysis.power_spectrum import Box, mu4, wave_vectors, wavenumber
from analysis.simulation_spectra import Partitions, SimulationSpectra
from datasets.preparation.cosmology import linear_theory_ratio
from training.metrics import Predictions

SIZE = 64
BOX = Box(SIZE, 5120.0, linear_theory=True)
BAND = (8.5, 13.5)
TRAIN, TEST = range(4), range(4, 10)
Ratio = Callable[[Tensor, Tensor], Tensor]
"""Wavenumber n and direction mu4 of modes of a cube -> P_GR/P_N."""


def linear(n: Tensor, direction: Tensor) -> Tensor:
    """Linear theory, exaggerated."""
    return torch.from_numpy(linear_theory_ratio((n * BOX.fundamental).numpy())) ** 4


def lattice(n: Tensor, direction: Tensor) -> Tensor:
    """The lattice term of the real simulations."""
    return 1.0425 - 0.054 * direction


def band(n: Tensor, direction: Tensor) -> Tensor:
    """One isotropic band."""
    return 1 + 0.1 * ((n >= BAND[0]) & (n < BAND[1]))


def resolution(n: Tensor, direction: Tensor) -> Tensor:
    """An isotropic excess that rises towards the Nyquist wavenumber, as numerical errors do."""
    return 1 + 0.007 * (n / (SIZE / 2)) ** 2


def everything(n: Tensor, direction: Tensor) -> Tensor:
    """Linear physics, lattice and resolution together."""
    return linear(n, direction) * lattice(n, direction) * resolution(n, direction)


def equal(n: Tensor, direction: Tensor) -> Tensor:
    """No difference."""
    return torch.ones_like(n)


def twins(seed: int, ratio: Ratio) -> tuple[Tensor, Tensor]:
    """The Newtonian and the GR cube (N, N, N) of a seed; P is proportional to n^-2."""
    vectors = wave_vectors(SIZE, 3)
    n = wavenumber(vectors)
    noise = torch.randn(SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    modes = torch.fft.rfftn(noise.double()) / n.clamp(min=1)
    cubes = torch.fft.irfftn(torch.stack([modes, modes * ratio(n, mu4(vectors)).sqrt()]), s=(SIZE,) * 3)
    newton, gr = (cubes / cubes[0].std()).float()
    return newton, gr


@dataclass(frozen=True)
class Batch:
    """Slices with their sample ids."""

    ids: Tensor
    images: Tensor

    @property
    def axes(self) -> Tensor:
        """Axes perpendicular to the slices."""
        return self.ids // SIZE % 3


def batches(cubes: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    """All slices of cubes by seed, as the dataset gives them."""
    for seed, pair in cubes.items():
        for label, cube in enumerate(pair):
            for axis in range(3):
                ids = ((seed * 2 + label) * 3 + axis) * SIZE + torch.arange(SIZE)
                yield Batch(ids, cube.movedim(axis, 0)[:, None].contiguous())


def label_predictions(ids: Any, logits: Any) -> Predictions:
    """Predictions from sample ids and logits."""
    decoded = ids // (6 * SIZE), ids // (3 * SIZE) % 2, ids // SIZE % 3, ids % SIZE
    return Predictions(ids, *decoded, logits)


def spectra_of(
    cubes: dict[int, tuple[Tensor, Tensor]], partitions: Partitions, ratios: Any
) -> SimulationSpectra:
    """What one process measures of these cubes."""
    solids = ((2 * seed + label, cube) for seed, pair in cubes.items() for label, cube in enumerate(pair))
    rows = simulation_spectra.measure(partitions, batches(cubes), solids, ratios)
    return SimulationSpectra.from_rows(partitions, *rows, ratios)


class MatchedFilter(torch.nn.Module):
    """The Gaussian likelihood ratio of slices with known spectra, as a network."""

    def __init__(self, spectra: SimulationSpectra, partitions: Partitions) -> None:
        super().__init__()
        bins = partitions.slices["symmetry"]
        newton, gr = spectra.slice_means["symmetry"].mean((0, 2))
        vectors = wave_vectors(SIZE, 2).abs().long()
        name = (vectors.amax(0) * SIZE + vectors.amin(0)).flatten()
        index = torch.unique(name, return_inverse=True)[1].view(SIZE, -1)  # bins in the order of their names
        mirrored = torch.full((SIZE // 2 + 1,), 2.0)
        mirrored[0] = mirrored[-1] = 1
        scale = BOX.side**2 / SIZE**4 / 2
        gr = np.where(bins.inside_nyquist, gr, newton)
        self.weight = (torch.from_numpy(scale * (1 / newton - 1 / gr)).float()[index]) * mirrored
        self.offset = float(bins.modes @ np.log(gr / newton) / 2)

    def forward(self, slices: Tensor, axes: object = None) -> Tensor:
        """Slices (b, 1, N, N) -> logits (b,)."""
        modes = torch.view_as_real(torch.fft.rfft2(slices[:, 0]))
        return (modes.square().sum(-1) * self.weight).sum((1, 2)) - self.offset


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation of a universe gives."""

    predictions: Predictions
    results: dict[str, Any]


def evaluate(ratio: Ratio, bands: Bands | None = None) -> Evaluated:
    """The results of the matched filter of a universe, without the sections that describe a run."""
    bands = bands or Bands.logarithmic(SIZE, 6)
    partitions = Partitions(BOX)
    train, test = ({seed: twins(seed, ratio) for seed in seeds} for seeds in (TRAIN, TEST))
    known = spectra_of(train, partitions, {})
    ceilings = classifiers.fit_ceilings(partitions, known)
    network = MatchedFilter(known, partitions)
    with torch.no_grad():
        parts = [(batch.ids, network(batch.images)) for batch in batches(test)]
    ids, logits = (torch.cat(column) for column in zip(*parts, strict=True))
    predictions = label_predictions(ids.numpy(), logits.double().numpy())
    columns = interventions.measure(network, batches(test), bands, BOX)
    order = np.argsort(columns[0])
    ids, unchanged, *changed = (column[order] for column in columns)
    results = DESCRIPTION | statistics.summarize(predictions)
    results |= interventions.summarize(label_predictions(ids, unchanged), changed, bands, BOX)
    by_scale = classifiers.restrict_to_scales(ceilings["directional"], partitions, bands.edges)
    ratios = {name: ceiling.slices for name, ceiling in ceilings.items()} | by_scale
    measured = spectra_of(test, partitions, ratios)
    lattice = Lattice.from_spectra(partitions, [measured, known], 1.0)
    spectra = FieldSpectra(partitions, lattice, ceilings, by_scale, measured, known)
    results |= fields.summarize(predictions, spectra, results["interventions"])
    return Evaluated(predictions, results)


DESCRIPTION: dict[str, Any] = {
    "run": "a <run>",
    "config": {"train_params": {"seed": 1}, "model_params": {"name": "a"}},
    "model": {"architecture": "RACOON", "layer_param": 2},
    "data": {
        "file": "z1.h5",
        "seeds": [4, 10],
        "train_seeds": 4,
        "box_size": 5120.0,
        "newton_augmentation": 1.0,
        "max_wavenumber": None,
        "reference": "linear",
    },
    "selection": {
        "criteria": [],
        "by_hand": [],
        "set": "test",
        "seeds": [4, 10],
        "evaluated": False,
        "validation_seeds": 0,
        "finished": True,
    },
    "environment": {"torch": "2"},
}
