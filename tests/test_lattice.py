"""Lattice diagnostics on universes whose anisotropy is known."""

from functools import cache

import numpy as np
import pytest
import simulated_universe
import torch

from analysis.lattice import Lattice, measure
from analysis.planning import Convergence, PowerRatio, describe_lattice, pairs_for_cubes, pairs_for_slices
from analysis.power_spectrum import (
    ALONG_AXIS,
    ALONG_DIAGONAL,
    Box,
    Floats,
    ModeBins,
    directions,
    mu4,
    planes,
    wave_vectors,
    wavenumber,
)

TWIN_NOISE = 0.02  # of the power of single modes, relative; P_GR/P_N of all modes at 64^3: 1e-4


@cache
def partition(size: int) -> ModeBins:
    return directions(Box(size, None), 3)


@cache
def plane_partition(size: int) -> ModeBins:
    return planes(Box(size, None))


def universe(size: int, ratio: Floats, seeds: int, seed: int = 0, noise: float = TWIN_NOISE) -> Floats:
    """P(k) (seeds, 2, bins) of Gaussian twins with P_GR/P_N = `ratio` (bins,)."""
    bins, random = partition(size), np.random.default_rng(seed)
    shape = (seeds, len(bins))
    newton = bins.n**-3.0 * random.chisquare(bins.modes, shape) / bins.modes
    gr = newton * ratio * (1 + noise * random.normal(size=shape) * np.sqrt(2 / bins.modes))
    return np.stack([newton, gr], axis=1)


def lattice_term(mu4: Floats) -> Floats:
    """P_GR/P_N of gevolution at 64^3, fitted at n = 12 to 16."""
    return 1.0425 - 0.054 * mu4


def lattice(size: int, power: Floats, means: Floats | None = None) -> Lattice:
    means = np.zeros((len(power), 2)) if means is None else means
    bins = plane_partition(size)
    planes_power, coherence = np.ones((len(power), 2, len(bins))), np.zeros((len(power), 3))
    return Lattice(partition(size), power, bins, planes_power, means, coherence)


@pytest.mark.parametrize("seeds", [2, 3, 24])
def test_isotropic_universes_are_not_warned_about(seeds: int) -> None:
    n = partition(64).n
    for ratio in (np.ones_like(n), 1 + 0.072 / n, 0.72 + 0.28 * np.tanh(n / 8), 1 + 0.02 * np.sin(n)):
        for seed in range(25):
            assert lattice(64, universe(64, ratio, seeds, seed)).warnings() == []


@pytest.mark.parametrize("seeds", [2, 3, 24])
def test_the_lattice_term_is_found_and_sized_right(seeds: int) -> None:
    bins = partition(64)
    truth = np.log(lattice_term(bins.mu4))
    found = lattice(64, universe(64, np.exp(truth), seeds))
    (warning,) = found.warnings()
    assert warning.startswith("P_GR/P_N depends on direction: 0.99")
    assert " along grid axes, 1.02" in warning
    value, error = found.contrast
    small = bins.inside_nyquist & (bins.n > 4.5)
    axis, diagonal = small & (bins.mu4 > ALONG_AXIS), small & (bins.mu4 <= ALONG_DIAGONAL)
    expected = np.average(truth[axis], weights=bins.modes[axis]) - np.average(
        truth[diagonal], weights=bins.modes[diagonal]
    )
    assert value[0] == pytest.approx(expected, abs=5 * error[0] + 5e-4)
    assert error[0] < 5e-4
    assert found.d_prime == pytest.approx(
        np.sqrt(
            bins.modes[small] @ (truth[small] - np.average(truth[small], weights=bins.modes[small])) ** 2 / 2
        ),
        rel=0.03,
    )


def test_noise_of_the_ratio_does_not_count_as_information() -> None:
    """Independent twins: noise alone would give d'^2 = 2 per seed and bin."""
    bins = partition(32)
    information = []
    for seed in range(50):
        power = universe(32, np.ones(len(bins)), 16, seed)[:, 0]
        information.append(lattice(32, power.reshape(8, 2, -1)).d_prime ** 2)
    assert np.mean(information) < 0.2 * len(bins) * 2 / 8


def test_a_contrast_of_a_twentieth_of_a_per_cent_is_found_at_256() -> None:
    bins = partition(256)
    slope = 5e-4 / (bins.mu4[bins.mu4 > ALONG_AXIS].mean() - bins.mu4[bins.mu4 <= ALONG_DIAGONAL].mean())
    (warning,) = lattice(256, universe(256, 1 - slope * (bins.mu4 - 0.6), 8)).warnings()
    assert "direction" in warning
    assert lattice(256, universe(256, np.ones(len(bins)), 8)).warnings() == []


@pytest.mark.parametrize("ratio", ["isotropic", "lattice"])
def test_gaussian_cubes(ratio: str) -> None:
    """From fields to the report: the ratio by direction within its errors, the power in the corners."""
    vectors = wave_vectors(32, 3)
    spectrum = wavenumber(vectors).clamp(min=1) ** -3
    excess = lattice_term(mu4(vectors)) if ratio == "lattice" else torch.full_like(spectrum, 1.01)
    power = []
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        white = torch.fft.rfftn(torch.randn(32, 32, 32, generator=random))
        cubes = [torch.fft.irfftn(white * kept.sqrt().float()) for kept in (spectrum, spectrum * excess)]
        power.append(partition(32).power(torch.stack(cubes)))
    report = lattice(32, np.stack(power)).report()
    assert len(report["warnings"]) == (ratio == "lattice")
    assert report["ratio"]["edges"][-2:] == pytest.approx([16.5, np.sqrt(3) * 16])
    axis, between, diagonal = report["ratio"]["value"][:, 4:-1]
    if ratio == "lattice":
        np.testing.assert_allclose(axis, 1.0425 - 0.054 * 0.96, atol=2e-3)
        np.testing.assert_allclose(between, 1.0425 - 0.054 * 0.61, atol=2e-3)
        np.testing.assert_allclose(diagonal, 1.0425 - 0.054 * 0.39, atol=2e-3)
        assert (report["ratio"]["high"] > report["ratio"]["low"])[:, 4:-1].all()
    else:
        np.testing.assert_allclose([axis, between, diagonal], 1.01, rtol=1e-4)
    assert np.isnan(report["ratio"]["value"][2, 0])  # no diagonal has n = 1


@pytest.mark.parametrize("edges", [(11.5, 15.5), (12, 16), (12.25, 16.25), (4, 6), (20, 24)])
def test_steps_of_an_isotropic_ratio_are_no_lattice(edges: tuple[float, float]) -> None:
    """A step within a shell moves axes and diagonals apart, since their n differ."""
    vectors = wave_vectors(64, 3)
    n = wavenumber(vectors)
    every = partition(64)
    cubes = torch.fft.irfftn(
        torch.fft.rfftn(torch.randn(64, 64, 64, generator=torch.Generator())) * n.clamp(min=1) ** -1.5
    )
    excess = torch.where((n >= edges[0]) & (n < edges[1]), 1.06, 1.0).sqrt()
    gr = torch.fft.irfftn(torch.fft.rfftn(cubes) * excess)
    power = every.power(torch.stack([cubes, gr]))
    found = lattice(64, np.stack([power, power * 1.0001, power * 0.9999]))
    assert found.warnings() == []
    bands = np.array([0, 4.5, *edges, 46.0]) if edges[0] > 4.5 else np.array([0, *edges, 46.0])
    shares = np.zeros(len(bands) - 1)
    shares[-2] = 1
    by_direction = found.direction_dependence(shares, bands)
    contrast = abs(by_direction["contrast"]["value"])
    assert contrast < max(0.2 * abs(by_direction["isotropic"]["value"]), 2 * by_direction["width_error"])


def test_directions_are_compared_where_the_network_uses_them() -> None:
    """The lattice at n >= 16 and an isotropic excess below: each is found by a network that uses it."""
    bins = partition(64)
    ratio = np.where(bins.n > 15.5, lattice_term(bins.mu4), 1.01)
    found = lattice(64, universe(64, ratio, 8, noise=1e-3))
    edges = np.array([0, 4.5, 12.5, 17.5, 46.0])
    small = found.direction_dependence(np.array([0, 0, 0, 1.0]), edges)
    assert small["axes"]["value"] == pytest.approx(lattice_term(np.array(0.96)), abs=2e-3)
    assert small["diagonals"]["value"] == pytest.approx(lattice_term(np.array(0.39)), abs=2e-3)
    assert small["contrast"]["value"] > 10 * small["width_error"]
    large = found.direction_dependence(np.array([0, 1.0, -0.2, 0]), edges)
    for direction in ("axes", "diagonals"):
        assert large[direction]["value"] == pytest.approx(1.01, abs=1e-3)
    assert found.direction_dependence(np.array([1.0, 0, 0, 0]), edges) == {}


@pytest.mark.parametrize("seeds", [2, 8])
def test_axes_of_unequal_power(seeds: int) -> None:
    """Half the power where n_2 = 0 is found and sized right; equal axes are not warned about."""
    bins, random = plane_partition(64), np.random.default_rng(0)
    axis = np.repeat([0, 1, 2], len(bins) // 3)
    for power, expected in ((np.ones(len(bins)), None), (np.where(axis == 2, 0.5, 1.0), 2)):
        for _ in range(50):
            planes_power = (
                power * bins.n**-4.0 * random.chisquare(bins.modes, (seeds, 1, len(bins))) / bins.modes
            )
            equal = universe(64, np.ones(len(partition(64))), seeds)
            twins_power = np.repeat(planes_power, 2, axis=1)
            none, coherence = np.zeros((seeds, 2)), np.zeros((seeds, 3))
            found = Lattice(partition(64), equal, bins, twins_power, none, coherence)
            if expected is None:
                assert found.warnings() == []
            else:
                (warning,) = found.warnings()
                assert "modes with n_2 = 0 have 0." in warning
                np.testing.assert_allclose(np.exp(found.axis_power[0][2]), 0.5, rtol=0.15)


def test_means_that_separate_the_gravities() -> None:
    power = universe(16, np.ones(len(partition(16))), 8)
    random = np.random.default_rng(0)
    gr = 8.4e-4 + 2e-5 * random.normal(size=8)
    found = lattice(16, power, np.stack([4e-11 * random.normal(size=8), gr], axis=1))
    assert found.mean_auc == 1
    (warning,) = found.warnings()
    assert warning.startswith("The mean of a cube separates the labels (AUC 1.000): ")


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3])
def test_means_that_do_not_separate_the_gravities(scale: float) -> None:
    power = universe(16, np.ones(len(partition(16))), 8)
    for seed in range(50):
        random = np.random.default_rng(seed)
        assert lattice(16, power, scale * random.normal(size=(8, 2))).warnings() == []
    assert lattice(16, power, 1e-9 * np.tile([0, 1], (8, 1))).warnings() == []  # not seen in float32
    assert lattice(16, power).mean_auc == 0.5


def test_removed_modes() -> None:
    bins = partition(32)
    power = universe(32, lattice_term(bins.mu4), 4) * (bins.n < 12)
    report = lattice(32, power).report()
    assert "along grid axes" in report["warnings"][0]
    assert np.isnan(report["ratio"]["value"][:, -1]).all()


def test_one_seed_has_a_ratio_without_errors() -> None:
    report = lattice(32, universe(32, lattice_term(partition(32).mu4), 1)).report()
    assert report["ratio"]["value"][0, 4] == pytest.approx(lattice_term(np.array(0.96)), abs=5e-3)
    assert np.isnan(report["ratio"]["low"]).all()
    assert report["warnings"] == []


@pytest.mark.parametrize(("seeds", "named"), [(3, False), (32, True)])
def test_few_modes_of_filtered_cubes_do_not_show_the_defect(seeds: int, named: bool) -> None:
    bins, power = plane_partition(64), universe(64, np.ones(len(partition(64))), seeds)
    coherence = np.tile([0.0, 0.0, 0.5], (seeds, 1))
    filtered = power * (partition(64).n < 4.2)
    planes_power, means = np.zeros((seeds, 2, len(bins))), np.zeros((seeds, 2))
    warnings = Lattice(partition(64), filtered, bins, planes_power, means, coherence).warnings()
    assert [line.startswith("The initial conditions have the defect") for line in warnings] == [True] * named


@pytest.mark.parametrize("axis", [0, 2, None])
def test_the_defect_of_the_initial_conditions_is_named(axis: int | None) -> None:
    """One plane of modes has half the power, three quarters of it symmetric under a reflection."""
    twins = []
    for seed in range(3):
        newton, gr = simulated_universe.twins(seed, simulated_universe.equal)
        if axis is not None:
            mean = newton.mean(axis)
            mirrored = mean.flip(1).roll(1, 1)
            plane = (mean + mirrored) / 2 * 0.75**0.5 + (mean - mirrored) / 2 * 0.5
            shift = (plane - mean).unsqueeze(axis)
            newton, gr = newton + shift, gr + shift
        twins.append(torch.stack([newton, gr]).numpy())
    warnings = measure(twins, simulated_universe.BOX).warnings()
    if axis is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert ("`basic` generator of gevolution 1.0 to 1.3" in warning) == (axis == 2)
        assert ("axes of the cubes are not equivalent" in warning) == (axis == 0)


@pytest.mark.parametrize(
    ("excess", "follows"), [("n", "n"), ("cell", "cell"), ("both", "neither"), ("no", "n")]
)
def test_the_ratio_follows_n_or_the_cell(excess: str, follows: str) -> None:
    ratios = []
    for cells in (32, 64):
        n = np.arange(1.0, cells // 2 + 1)
        at = {"n": 1, "cell": 32 / cells, "both": 0.7 + cells / 100, "no": 0}[excess] * n / 16
        ratios.append(PowerRatio(cells, n, 1 + 0.01 * at**2, np.full(len(n), 1e-4), n**2))
    convergence = Convergence(*ratios)
    assert convergence.follows == follows
    assert convergence.converged == {"n": 16, "cell": 3, "both": 4, "no": 16}[excess]


def test_pairs_that_find_a_difference() -> None:
    assert pairs_for_slices(0.5385) == 5
    assert pairs_for_slices(0.5) == np.inf
    assert pairs_for_slices(0.503) == np.ceil((2.4865 * 0.0062 / 0.003) ** 2)
    assert pairs_for_cubes(0.307) == 54
    assert pairs_for_cubes(10) == 5
    assert pairs_for_cubes(0) == np.inf


def test_the_table_of_a_lattice_universe_has_ratios_and_a_warning() -> None:
    twins = (
        torch.stack(simulated_universe.twins(seed, simulated_universe.lattice)).numpy() for seed in range(4)
    )
    lines = describe_lattice(measure(twins, simulated_universe.BOX)).splitlines()
    assert lines[0].split()[:6] == ["P_GR/P_N", "by", "n", "axis", "between", "diagonal"]
    assert any("all modes" in line and "5 pairs" in line for line in lines)
    row = next(line.split() for line in lines if line.startswith("   17.5"))
    vectors = wave_vectors(64, 3)
    n, direction = wavenumber(vectors), mu4(vectors)
    band = (n > 17.5) & (n < 24.5)
    axis, diagonal = direction > ALONG_AXIS, direction <= ALONG_DIAGONAL
    expected = [
        1.0425 - 0.054 * float(direction[band & mask].mean()) for mask in (axis, ~axis & ~diagonal, diagonal)
    ]
    assert [float(value) for value in row[3:6]] == pytest.approx(expected, abs=5e-4)
    assert any(line.startswith("warning: P_GR/P_N depends on direction") for line in lines)
