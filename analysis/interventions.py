"""Interventions on the modes of slices, what they do to the logits of a network, and what drives these.

Three kinds: `low_pass` keeps the modes below a wavenumber, `high_pass` those above it, `exchange` gives each
twin a set of modes of the other. Twins share their initial conditions, so an exchange leaves every slice a
plausible one; a filter does not. An exchange is therefore the basis of the attribution:

Delta is the mean logit of GR slices minus that of their Newtonian twins. Exchanging the modes of a group
between twins turns it into Delta'. A network whose logit is a sum over groups has Delta' = Delta - 2 Delta_b,
where Delta_b is the part of the group, so Delta_b = (Delta - Delta') / 2. The shares Delta_b / Delta of
groups that partition all modes then sum to one. An interaction of two groups counts half for each of them;
the remainder comes from interactions of three or more.
"""

from __future__ import annotations

from system import UserError

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import statistics
from analysis.power_spectrum import Box, mu4, wave_vectors, wavenumber
from analysis.saliency import Batch, Network
from analysis.statistics import Estimate
from training.metrics import Floats, Integers, Predictions

POSITIONS = 16  # slices per axis of a cube that are changed; neighboring slices look nearly the same
PAIRS_PER_BATCH = 16  # bounds the memory
KINDS = ("low_pass", "high_pass", "exchange")
AXES, DIAGONALS = 0.9, 0.6  # mu4 of a slice's mode: above, along a grid axis; below, along a diagonal
DIRECTED = ("axes", "between", "diagonals")
GROUPS = ("mean", "large_scales", *DIRECTED)
DRIVERS = ("mean", "large_scales", "small_scales")
HYBRIDS = (*GROUPS, "small_scales")
DEGRADATIONS = ("smoothed", "large_scales", "mean_removed", "random_phases", "noisy")


@dataclass(frozen=True)
class Bands:
    """Bands of n that partition the modes of a slice: [edges[i], edges[i + 1]); the first is the mean."""

    size: int
    edges: tuple[float, ...]  # in units of the fundamental mode

    @classmethod
    def logarithmic(cls, size: int, bands: int = 12, max_wavenumber: float = np.inf) -> Bands:
        """About `bands` bands of equal width in log k, whole rings each; the last includes the corners.

        It begins at `max_wavenumber` at the latest.
        """
        rings = np.unique(np.geomspace(1, min(size // 2, max_wavenumber) + 1, bands + 1).round())
        return cls(size, (0.0, *(rings - 0.5)[:-1].tolist(), float(np.ceil(size / np.sqrt(2)) + 1)))

    @cached_property
    def masks(self) -> Tensor:
        """Which modes of a real transform each band holds: (bands, N, N // 2 + 1)."""
        n = wavenumber(wave_vectors(self.size, 2))
        edges = torch.tensor(self.edges, dtype=n.dtype)[:, None, None]
        return (n >= edges[:-1]) & (n < edges[1:])


def group_masks(n: Tensor, direction: Tensor, large_scales: int) -> Tensor:
    """Which modes with wavenumber `n` and direction mu4 (...) belong to each of HYBRIDS: (groups, ...).

    GROUPS partition the modes: those with n > `large_scales` by their direction to the grid axes.
    """
    small = n > large_scales
    axes, diagonals = small & (direction > AXES), small & (direction < DIAGONALS)
    return torch.stack([n == 0, (n > 0) & ~small, axes, small & ~axes & ~diagonals, diagonals, small])


def components(slices: Tensor, masks: Tensor) -> Iterator[Tensor]:
    """What the modes of each mask contribute to slices (..., N, N); if the masks partition, they add up."""
    modes = torch.fft.rfft2(slices)
    for mask in masks.to(slices.device):
        yield torch.fft.irfft2(modes * mask, s=slices.shape[-2:])


def exchange(newton: Tensor, gr: Tensor, masks: Tensor) -> Iterator[Tensor]:
    """Twin slices (2 b, C, N, N) that exchanged the modes of one mask at a time, Newtonian ones first."""
    for difference in components(gr - newton, masks):
        yield torch.cat([newton + difference, gr - difference])


def filter_bands(slices: Tensor, masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices (b, C, N, N) below and above each edge between bands."""
    low = torch.zeros_like(slices)
    for part in components(slices, masks[:-1]):
        low = low + part
        yield low, slices - low


def measure(network: Network, batches: Iterable[Batch], bands: Bands, box: Box) -> list[Any]:
    """Logits of POSITIONS slices per axis of each cube, unchanged and after each intervention.

    `batches` come seed by seed, Newtonian cube first. Returns columns with a row per slice: sample id; the
    logit unchanged; logits (edges or bands) of each of KINDS; logits (groups) after exchange of each of
    HYBRIDS.
    """
    rows = []
    vectors = wave_vectors(box.size, 2)
    groups = group_masks(wavenumber(vectors), mu4(vectors), box.large_scales)
    for ids, (newton, gr) in _twins(batches, max(1, box.size // POSITIONS)):
        both = torch.cat([newton, gr])
        logits_of = partial(network, axes=ids.flatten() // box.size % 3)
        with torch.no_grad():
            filtered = [list(map(logits_of, pair)) for pair in filter_bands(both, bands.masks)]
            exchanged, grouped = (
                [logits_of(slices) for slices in exchange(newton, gr, masks)]
                for masks in (bands.masks, groups)
            )
            logits = [[logits_of(both)], *zip(*filtered, strict=True), exchanged, grouped]
        unchanged, *columns = (torch.stack(list(column), dim=1).cpu().double().numpy() for column in logits)
        rows.append([ids.flatten().numpy(), unchanged[:, 0], *columns])
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


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


def summarize(
    unchanged: Predictions, columns: Sequence[Floats], bands: Bands, box: Box
) -> dict[str, dict[str, Any]]:
    """Metrics by wavenumber after each of KINDS (`interventions`), `attribution` and `hybrids`.

    `columns` are those of `measure` after the unchanged logits. Wavenumbers are in h/Mpc, or in units of the
    fundamental mode where the box is not known: `edges` of the bands; `cuts` between them, of which a low
    pass keeps what is below; `centres`, of the last band up to the Nyquist wavenumber; `shares` are those of
    bands in the mean twin difference.
    """
    *filtered, grouped = columns
    logits = dict(zip(KINDS, filtered, strict=True))
    ends = np.minimum(bands.edges[1:], box.size / 2 + 0.5)
    results: dict[str, Any] = {
        "unit": box.unit,
        "large_scales": box.large_scales,
        "slices": len(unchanged),
        "edges": np.array(bands.edges) * box.fundamental,
        "cuts": np.array(bands.edges[1:-1]) * box.fundamental,
        "centres": np.sqrt(ends[:-1] * ends[1:]) * box.fundamental,
        "none": statistics.headline(unchanged),
    }
    for kind in KINDS:
        rows = [statistics.headline(unchanged.with_logits(column)) for column in logits[kind].T]
        results[kind] = {key: [row[key] for row in rows] for key in rows[0]}
    results["shares"] = shares(*twin_differences(unchanged, logits["exchange"]))[:-1]
    return {
        "interventions": results,
        "attribution": attribute(unchanged, grouped[:, : len(GROUPS)]),
        "hybrids": hybrids(unchanged, grouped),
    }


def hybrids(unchanged: Predictions, exchanged: Floats) -> dict[str, Any]:
    """AUC of Newtonian slices against the same slices with one group of modes from the GR twin: of HYBRIDS.

    What the network would attain within one axis if the twins differed only there. `exchanged`
    (slices, groups) are the logits after the exchange of each group: those of Newtonian slices are those of
    the hybrids.
    """
    pairs = unchanged.logit.reshape(len(unchanged.seeds), 2, -1)
    hybrid = exchanged.reshape(*pairs.shape, -1)[:, 0]
    logits = (np.stack([pairs[:, 0], hybrid[..., group]], axis=1).ravel() for group in range(len(HYBRIDS)))
    areas = [statistics.within_axis_estimate(unchanged.with_logits(values)) for values in logits]
    return dict(zip(HYBRIDS, areas, strict=True))


def twin_differences(unchanged: Predictions, exchanged: Floats) -> tuple[Floats, Floats]:
    """Delta (seeds,) and Delta_b (seeds, groups) from logits (slices, groups) after each exchange."""
    sets = [unchanged, *(unchanged.with_logits(logits) for logits in exchanged.T)]
    whole, *after = (np.subtract(*predictions.cube_logits.T[::-1]) for predictions in sets)
    return whole, (whole[:, None] - np.stack(after, axis=1)) / 2


def shares(whole: Floats, parts: Floats) -> list[Estimate]:
    """Delta_b / Delta of each group, with paired jackknife intervals, and last the remainder."""
    parts = np.column_stack([parts, whole - parts.sum(1)])
    return [statistics.ratio_estimate(part, whole, "real") for part in parts.T]


def attribute(unchanged: Predictions, exchanged: Floats) -> dict[str, Any]:
    """Shares of GROUPS and the `remainder`, and the mean twin `difference` Delta in logits.

    `drivers` are the shares of the parts that the first finding compares: `mean`, `large_scales` and
    `small_scales`, the sum of the three directions. `lead` is the largest of them less the second.
    `exchanged` (slices, groups) are the logits after the exchange of each group.
    """
    whole, parts = twin_differences(unchanged, exchanged)
    drivers = np.column_stack([parts[:, 0], parts[:, 1], parts[:, 2:].sum(1)])
    second, first = np.argsort(drivers.sum(0) * np.sign(whole.sum()))[-2:]
    return dict(zip((*GROUPS, "remainder"), shares(whole, parts), strict=True)) | {
        "difference": statistics.mean_estimate(whole),
        "drivers": dict(zip(DRIVERS, shares(whole, drivers), strict=False)),
        "lead": statistics.ratio_estimate(drivers[:, first] - drivers[:, second], whole, "real"),
    }


# Degradations


CELLS = 2.0  # default width of the smoothing, in cells
NOISE = 0.1  # default white noise, in standard deviations of the field


@dataclass(frozen=True)
class Degradations:
    """Ways to degrade slices, by Gaussian `smoothing` in Mpc/h or cells, by white `noise` and others."""

    box: Box
    smoothing: float
    noise: float

    @classmethod
    def parse(cls, settings: Iterable[str], box: Box) -> Degradations:
        """From `smoothing=R`, in Mpc/h, or cells where the box is not known, and `noise=LEVEL`.

        Raises UserError for other settings.
        """
        cell = box.length / box.size if box.length else 1.0
        values = {"smoothing": CELLS * cell, "noise": NOISE}
        for setting in settings:
            name, _, text = setting.partition("=")
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if name not in values or not 0 < value < float("inf"):
                raise UserError(
                    f"--degrade: found '{setting}', allowed: smoothing=R in Mpc/h and noise=LEVEL in "
                    "standard deviations, both positive numbers"
                )
            values[name] = value
        return cls(box, **values)

    def apply(self, slices: Tensor, seed: int) -> dict[str, Tensor]:
        """Slices (b, C, N, N) under each degradation by name. Filters act in the plane of a slice.

        `smoothed`: modes times exp(-k^2 R^2 / 2). `large_scales`: only n <= N/4. `mean_removed`: each slice
        without its mean. `noisy`: white noise in every pixel, independent between twins. `random_phases`: the
        modes of a slice keep their absolute values, and so its power spectrum and mean, and get the phases of
        white noise (surrogates, Theiler et al. 1992, Physica D 58, 77), the same for all channels of a slice.
        """
        n = wavenumber(wave_vectors(self.box.size, 2)).float().to(slices.device)
        side = self.box.length or self.box.size
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(slices.shape, generator=generator).to(slices.device)
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(len(slices), 1, *slices.shape[2:], generator=generator).to(slices.device)
        phases = torch.fft.rfft2(white)
        phases[..., 0, 0] = 1  # the mean of a slice is no two-point statistic
        modes = torch.fft.rfft2(slices)
        changed = {
            "smoothed": modes * torch.exp(-((2 * np.pi * n / side * self.smoothing) ** 2) / 2),
            "large_scales": modes * (n <= self.box.size / 4),
            "mean_removed": modes * (n > 0),
            "random_phases": modes * (phases / phases.abs()),
        }
        degraded = {name: torch.fft.irfft2(some, s=slices.shape[-2:]) for name, some in changed.items()}
        return degraded | {"noisy": slices + self.noise * noise}

    def measure(self, network: Network, batches: Iterable[Batch]) -> tuple[Integers, Floats]:
        """Sample ids (slices,) and logits (slices, degradations) of all slices."""
        ids, rows = [], []
        with torch.inference_mode():
            for batch in batches:
                degraded = self.apply(batch.images, int(batch.ids[0]))  # the same on any number of ranks
                ids.append(batch.ids)
                rows.append(
                    torch.stack([network(some, axes=batch.axes).float() for some in degraded.values()], 1)
                )
        return torch.cat(ids).numpy(), torch.cat(rows).double().cpu().numpy()

    def summarize(self, predictions: Predictions, logits: Floats) -> dict[str, Any]:
        """Metrics under each degradation, and the AUC it costs (`change`, with paired intervals)."""
        none = statistics.headline(predictions)
        results: dict[str, Any] = {"smoothing": self.smoothing, "noise": self.noise, "none": none}
        for kind, column in zip(DEGRADATIONS, logits.T, strict=True):
            degraded = predictions.with_logits(column)
            change = statistics.auc_difference(degraded.wins, predictions.wins)
            results[kind] = statistics.headline(degraded) | {"change": change}
        return results
