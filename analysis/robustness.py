"""How the network does on degraded slices: smoothed, filtered, noisy, or with random phases."""

from __future__ import annotations

from system import UserError

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis import statistics
from analysis.power_spectrum import Box, wave_vectors, wavenumber
from analysis.saliency import Batch, Network
from training.metrics import Floats, Integers, Predictions

Degradation = Callable[[Tensor, int], Tensor]
"""Slices (b, C, N, N) and a seed -> degraded slices."""

CELLS = 2.0  # default width of the smoothing, in cells
NOISE = 0.1  # default white noise, in standard deviations of the field


def parse(settings: Iterable[str], box: Box) -> tuple[float, float]:
    """Smoothing in Mpc/h (cells where the box is not known) and noise of `smoothing=R` and `noise=LEVEL`.

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
                f"--degrade: found '{setting}', allowed: smoothing=R in Mpc/h and noise=LEVEL in standard "
                "deviations, both positive numbers"
            )
        values[name] = value
    return values["smoothing"], values["noise"]


def degradations(box: Box, smoothing: float, noise: float) -> dict[str, Degradation]:
    """Each degradation by name. Filters act in the plane of a slice.

    `smoothed`: Gaussian of width `smoothing` R, modes times exp(-k^2 R^2 / 2). `large_scales`: only n <= N/4.
    `mean_removed`: each slice without its mean. `noisy`: white noise of standard deviation `noise` in every
    pixel, independent between twins. `random_phases`: the modes of a slice keep their absolute values, and so
    its power spectrum and mean, and get the phases of white noise (surrogates, Theiler et al. 1992, Physica
    D 58, 77).
    """
    n = wavenumber(wave_vectors(box.size, 2)).float()
    side = box.length or box.size
    gaussian = torch.exp(-((2 * np.pi * n / side * smoothing) ** 2) / 2)

    def filtered(weights: Tensor) -> Degradation:
        def apply(slices: Tensor, seed: int) -> Tensor:
            return torch.fft.irfft2(torch.fft.rfft2(slices) * weights.to(slices.device), s=slices.shape[-2:])

        return apply

    def noisy(slices: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return slices + noise * torch.randn(slices.shape, generator=generator).to(slices.device)

    def random_phases(slices: Tensor, seed: int) -> Tensor:
        # the same for all channels of a slice, whose correlations they keep
        white = torch.randn(
            len(slices), 1, *slices.shape[2:], generator=torch.Generator().manual_seed(seed)
        ).to(slices.device)
        phases = torch.fft.rfft2(white)
        phases[..., 0, 0] = 1  # the mean of a slice is no two-point statistic
        modes = torch.fft.rfft2(slices) * (phases / phases.abs())
        return torch.fft.irfft2(modes, s=slices.shape[-2:])

    return {
        "smoothed": filtered(gaussian),
        "large_scales": filtered((n <= box.size / 4).float()),
        "mean_removed": filtered((n > 0).float()),
        "noisy": noisy,
        "random_phases": random_phases,
    }


def measure(
    network: Network, batches: Iterable[Batch], kinds: dict[str, Degradation]
) -> tuple[Integers, Floats]:
    """Sample ids (slices,) and logits (slices, degradations) of all slices."""
    ids, rows = [], []
    with torch.inference_mode():
        for batch in batches:
            seed = int(batch.ids[0])  # the same noise on any number of ranks
            logits = [
                network(degrade(batch.images, seed), axes=batch.axes).float() for degrade in kinds.values()
            ]
            ids.append(batch.ids)
            rows.append(torch.stack(logits, dim=1))
    return torch.cat(ids).numpy(), torch.cat(rows).double().cpu().numpy()


def summarize(
    predictions: Predictions, logits: Floats, kinds: Iterable[str], smoothing: float, noise: float
) -> dict[str, Any]:
    """Metrics under each degradation, and the AUC it costs (`change`, with paired intervals)."""
    none = statistics.headline(predictions)
    results: dict[str, Any] = {"smoothing": smoothing, "noise": noise, "none": none}
    for kind, column in zip(kinds, logits.T, strict=True):
        degraded = predictions.with_logits(column)
        change = statistics.auc_difference(degraded.wins, predictions.wins)
        results[kind] = statistics.headline(degraded) | {"change": change}
    return results
