"""Logistic regressions on power spectra: what they can see, and what they cannot."""

from system import UserError

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from analysis.classifiers import STRENGTHS, Baseline
from analysis.power_spectrum import Box, ModeBins, directions, mu4, shells, wave_vectors, wavenumber

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BOX = Box(32, None)
VECTORS = wave_vectors(32, 2)
SPECTRUM = wavenumber(VECTORS).clamp(min=1) ** -3


def twins(
    seeds: int, slices: int, ratio: torch.Tensor, keep: torch.Tensor | None = None, seed: int = 0
) -> tuple[torch.Tensor, Integers, Integers]:
    """Gaussian slices of both gravities, in float32; twins share their phases. With labels and seeds."""
    random = torch.Generator().manual_seed(seed)
    white = torch.fft.rfft2(torch.randn(seeds, 1, slices, 32, 32, generator=random))
    amplitude = torch.stack([SPECTRUM, SPECTRUM * ratio]).sqrt()[:, None].float()
    if keep is not None:
        amplitude *= keep
    fields = torch.fft.irfft2(white * amplitude).flatten(0, 2)
    labels = np.tile(np.repeat([0, 1], slices), seeds)
    return fields, labels, np.repeat(np.arange(seeds), 2 * slices)


def held_out_auc(bins: ModeBins, ratio: torch.Tensor) -> float:
    fields, labels, seeds = twins(8, 24, ratio)
    baseline = Baseline.fit(bins.power(fields), bins.modes, labels, seeds)
    fields, labels, _ = twins(8, 24, ratio, seed=1)
    logits = baseline.logits(bins.power(fields))
    return float(mannwhitneyu(logits[labels == 1], logits[labels == 0]).statistic / (8 * 24) ** 2)


def test_an_isotropic_difference_is_seen_by_both() -> None:
    ratio = torch.where(wavenumber(VECTORS) > 8, 1.12, 1.0)
    assert held_out_auc(shells(BOX, 2), ratio) > 0.8
    assert held_out_auc(directions(BOX, 2), ratio) > 0.8


def test_only_the_directional_baseline_sees_directions() -> None:
    along_axis = torch.where(wavenumber(VECTORS) > 4, 1.25 - mu4(VECTORS) / 3, 1.0)  # 1 on average
    assert held_out_auc(shells(BOX, 2), along_axis) < 0.6
    assert held_out_auc(directions(BOX, 2), along_axis) > 0.75


def test_removed_modes_are_left_out() -> None:
    keep = wavenumber(VECTORS) <= 10
    bins = directions(BOX, 2)
    fields, labels, seeds = twins(4, 16, torch.full_like(SPECTRUM, 1.1), keep)
    baseline = Baseline.fit(bins.power(fields), bins.modes, labels, seeds)
    assert baseline.used[bins.n < 9].all()
    assert not baseline.used[bins.n > 10.5].any()
    # rounding errors in the removed modes change nothing, nor does a slice without any power fail
    power = bins.power(fields)
    power[:, ~baseline.used] *= 100
    np.testing.assert_array_equal(baseline.logits(power), baseline.logits(bins.power(fields)))
    assert np.isfinite(baseline.logits(np.zeros_like(power))).all()


def test_constant_fields_are_rejected() -> None:
    bins = shells(BOX, 2)
    with pytest.raises(UserError, match="cubes are constant"):
        Baseline.fit(bins.power(torch.ones(4, 32, 32)), bins.modes, np.array([0, 1, 0, 1]), np.arange(4) // 2)


def test_seeds_are_not_split_by_the_cross_validation() -> None:
    """Slices that repeat within a cube and hold no signal: memorising them pays unless seeds are split."""
    random = np.random.default_rng(0)
    cubes = np.exp(random.normal(size=(20, 60)))
    power = cubes.repeat(10, axis=0)
    labels = np.tile([0, 1], 10).repeat(10)
    order = random.permutation(200)
    seeds = np.arange(200) // 20
    baseline = Baseline.fit(power[order], np.ones(60), labels[order], seeds[order])
    assert baseline.strength == STRENGTHS[0]
