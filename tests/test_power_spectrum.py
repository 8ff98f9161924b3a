"""Power spectra against sums over single modes, symmetries and closed forms."""

from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch

from analysis.power_spectrum import (
    Box,
    ModeBins,
    cube_partitions,
    directions,
    equal_wavenumbers,
    measurable,
    planes,
    shell_edges,
    shells,
    slice_partitions,
    symmetry_classes,
    wave_vectors,
    wavenumber,
)

BOX = Box(8, 100.0)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_mode(field: np.ndarray, length: float) -> dict[tuple[int, ...], float]:
    """P(k) of every single mode, from a complex transform."""
    size, dimensions = len(field), field.ndim
    power = np.abs(np.fft.fftn(field)) ** 2 * length**dimensions / size ** (2 * dimensions)
    signed = np.fft.fftfreq(size, 1 / size).round().astype(int)
    modes = product(range(size), repeat=dimensions)
    return {tuple(int(abs(signed[i])) for i in mode) + mode: power[mode] for mode in modes}


def oracle(field: np.ndarray, box: Box, name: str) -> list[tuple[float, float, float, float]]:
    """(modes, n, mu4, P) of each bin, by a loop over modes."""
    bins = defaultdict(list)
    dimensions = field.ndim
    bounds = {
        2: [(3 + np.cos(np.radians(4 * angle))) / 4 for angle in (36, 27, 18, 9)],
        3: [0.38, 0.45, 0.54, 0.63, 0.75, 0.9],
    }[dimensions]
    with_mean = dimensions == 2 and name in ("symmetry", "wavenumbers")
    for mode, power in by_mode(field, box.side).items():
        vector = np.array(mode[:dimensions], float)
        squared = (vector**2).sum()
        if squared == 0 and not with_mean:
            continue
        n, direction = np.sqrt(squared), (vector**4).sum() / squared**2 if squared else 1.0
        shell = int(np.floor(n + 0.5))
        key = {
            "isotropic": shell,
            "directional": (shell, sum(direction > bound for bound in bounds)),
            "symmetry": tuple(sorted(mode[:dimensions])[::-1]),
            "wavenumbers": round(squared),
        }[name]
        if name != "isotropic" or shell <= box.size // 2:
            bins[key].append((n, direction, power))
    return [(len(bins[key]), *np.mean(bins[key], axis=0)) for key in sorted(bins)]


@pytest.mark.parametrize("name", ["isotropic", "directional", "symmetry", "wavenumbers"])
def test_slices_agree_with_a_sum_over_modes(name: str) -> None:
    field = noise(8, 8)
    bins = slice_partitions(BOX)[name]
    found = np.stack([bins.modes, bins.n, bins.mu4, bins.power(field[None])[0]], axis=1)
    np.testing.assert_allclose(found, oracle(field.numpy(), BOX, name), rtol=1e-12)


@pytest.mark.parametrize("name", ["isotropic", "directional", "wavenumbers"])
def test_cubes_agree_with_a_sum_over_modes(name: str) -> None:
    field = noise(8, 8, 8)
    bins = cube_partitions(BOX)[name]
    found = np.stack([bins.modes, bins.n, bins.mu4, bins.power(field[None])[0]], axis=1)
    np.testing.assert_allclose(found, oracle(field.numpy(), BOX, name), rtol=1e-12)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_power_sums_to_the_variance(dimensions: int) -> None:
    box = Box(16, 5120.0)
    field = noise(*[16] * dimensions) + 3
    bins = directions(box, dimensions)
    assert bins.modes.sum() == 16**dimensions - 1
    variance = bins.power(field[None])[0] @ bins.modes / box.side**dimensions
    assert variance == pytest.approx(float(field.var(correction=0)), rel=1e-12)


@pytest.mark.parametrize("name", slice_partitions(BOX))
def test_the_symmetries_of_the_square_change_nothing(name: str) -> None:
    field = noise(8, 8)
    turned = torch.stack([image.rot90(turns) for image in (field, field.T) for turns in range(4)])
    power = slice_partitions(BOX)[name].power(turned)
    np.testing.assert_allclose(power, power[:1].repeat(8, 0), rtol=1e-12)


def test_corners_lie_beyond_the_nyquist_sphere() -> None:
    bins = directions(Box(64, None), 3)
    wave = torch.ones(64, 64, 64)
    wave[1::2] *= -1
    assert bins.inside_nyquist[bins.power(wave[None])[0].argmax()]
    wave[:, 1::2] *= -1
    assert not bins.inside_nyquist[bins.power(wave[None])[0].argmax()]
    # the sphere n < N/2 fills pi/6 of the cube
    inside = bins.modes[bins.inside_nyquist].sum() / 64**3
    assert inside == pytest.approx(np.pi / 6 * (65 / 64) ** 3, abs=3e-3)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_shell_edges_contain_the_nyquist_wavenumber(size: int, dimensions: int) -> None:
    edges = shell_edges(size, dimensions)
    assert size / 2 + 0.5 in edges
    assert (np.diff(edges) >= 1).all()
    assert edges[-1] >= np.sqrt(dimensions) * size / 2
    assert (np.diff(edges) <= np.maximum(2, np.array(edges[:-1]) / 16 + 1)).all()


def test_the_first_bin_of_the_finest_partitions_is_the_mean_of_a_slice() -> None:
    slices, cubes = noise(3, 8, 8) + 2, noise(3, 16, 16, 16) + 2
    for bins in (symmetry_classes(BOX), equal_wavenumbers(BOX, 2)):
        expected = BOX.side**2 * slices.mean((1, 2)) ** 2
        np.testing.assert_allclose(bins.power(slices)[:, 0], expected, rtol=1e-12)
    for name, bins in {**cube_partitions(Box(16, None)), "2D": directions(BOX, 2)}.items():
        assert bins.n[0] > 0, name
        if bins.dimensions == 3:
            np.testing.assert_allclose(bins.power(cubes + 5), bins.power(cubes), rtol=1e-9)


def test_planes_hold_the_same_modes_of_each_axis() -> None:
    bins, cube = planes(Box(16, None)), noise(16, 16, 16)
    power = bins.power(cube[None])[0].reshape(3, -1)
    for axis in range(1, 3):
        turned = bins.power(cube.transpose(0, axis)[None])[0].reshape(3, -1)
        np.testing.assert_allclose(turned[0], power[axis], rtol=1e-12)
    assert list(bins.n.round()) == 3 * [5, 6, 7, 8]
    wave = torch.cos(2 * np.pi * torch.arange(16) / 16 * 5)[None, :, None].expand(16, 16, 16)
    assert bins.power(wave.double()[None]).max() < 1e-20, "two components are zero"


def test_projection_is_the_mean_spectrum_of_a_cubes_slices() -> None:
    cube = noise(8, 8, 8).cumsum(0)
    every_mode = ModeBins(BOX, 3, torch.arange(5**3).view(5, 5, 5))
    for name, bins in slice_partitions(BOX).items():
        projected = every_mode.project(every_mode.power(cube[None]), bins)
        direct = bins.power(cube.movedim(2, 0)).mean(0)
        np.testing.assert_allclose(projected[0], direct, rtol=1e-12, err_msg=name)


def test_removed_modes_are_not_measurable() -> None:
    field = noise(4, 64, 64).float()
    vectors = wave_vectors(64, 2)
    low_pass = torch.fft.irfft2(torch.fft.rfft2(field) * (wavenumber(vectors) <= 20))
    bins = shells(Box(64, None), 2)
    np.testing.assert_array_equal(measurable(bins.power(low_pass), bins.modes), bins.n < 20.4)
    assert measurable(bins.power(field), bins.modes).all()
    assert not measurable(bins.power(torch.zeros(2, 64, 64)), bins.modes).any()
