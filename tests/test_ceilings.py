"""Gaussian likelihood ratios against densities, draws and closed forms."""

from system import UserError

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import mannwhitneyu, multivariate_normal

from analysis.classifiers import Ceiling, LikelihoodRatio, attained_share, detectability, fit_ceilings
from analysis.power_spectrum import (
    ALONG_AXIS,
    Box,
    mu4,
    symmetry_classes,
    wave_vectors,
    wavenumber,
)
from analysis.simulation_spectra import Partitions, SimulationSpectra
from datasets.preparation.cosmology import linear_theory_ratio
from training.metrics import Floats


def likelihood_ratio(modes: Floats, newton: Floats, gr: Floats) -> LikelihoodRatio:
    return LikelihoodRatio("", np.ones(len(modes), bool), modes, newton, gr)


def gaussian(spectrum: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Fields (count, N, ..., N) with <|delta_k|^2> = N^d times `spectrum`, the layout of a real transform."""
    size, dimensions = spectrum.shape[0], spectrum.ndim
    random = torch.Generator().manual_seed(seed)
    white = torch.randn(count, *[size] * dimensions, dtype=torch.float64, generator=random)
    axes = tuple(range(1, dimensions + 1))
    return torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) * spectrum.sqrt(), dim=axes)


def test_it_is_the_ratio_of_gaussian_densities() -> None:
    """Field values are jointly normal; their covariance is the transform of the spectrum."""
    box, size = Box(4, 4.0), 4
    vectors = wave_vectors(size, 2)
    bins = symmetry_classes(box)
    fields = gaussian(1 + wavenumber(vectors), 3, seed=0)
    densities, spectra = [], []
    for spectrum in (1 + wavenumber(vectors), 1 + wavenumber(vectors) * (1 + mu4(vectors))):
        correlation = torch.fft.irfft2(spectrum.cdouble()).numpy()
        i = np.arange(size**2)
        covariance = correlation[
            (i[:, None] // size - i // size) % size, (i[:, None] % size - i % size) % size
        ]
        densities.append(multivariate_normal(cov=covariance).logpdf(fields.flatten(1).numpy()))
        spectra.append(bins.power(torch.fft.irfft2(spectrum.sqrt().cdouble())[None])[0] * size**2)
    found = likelihood_ratio(bins.modes, *spectra)({"": bins.power(fields)})
    np.testing.assert_allclose(found, densities[1] - densities[0], rtol=1e-10)


@pytest.mark.parametrize(
    ("modes", "ratio"),
    [
        ([4, 4, 8, 16], [1.5, 0.6, 1.2, 0.9]),
        ([1, 2], [3.0, 0.5]),
        ([100, 1000, 1000], [1.1, 1.02, 0.97]),
        ([300] * 30, np.linspace(0.9, 1.15, 30)),
    ],
)
def test_expectations_agree_with_draws(modes: list[int], ratio: list[float]) -> None:
    count, degrees, draws = np.array(modes, float), np.array(ratio), 100_000
    lambda_ratio = likelihood_ratio(count, np.full(len(count), 7.0), 7 * degrees)
    random = np.random.default_rng(0)
    newton = lambda_ratio({"": 7.0 * random.chisquare(count, (draws, len(count))) / count})
    gr = lambda_ratio({"": 7.0 * degrees * random.chisquare(count, (draws, len(count))) / count})
    expected = lambda_ratio.expected()
    assert expected["accuracy"] == pytest.approx((np.mean(gr > 0) + np.mean(newton < 0)) / 2, abs=0.005)
    assert expected["auc"] == pytest.approx(mannwhitneyu(gr, newton).statistic / draws**2, abs=0.005)


def test_certain_and_absent_signals() -> None:
    certain = likelihood_ratio(np.full(100, 1000.0), np.ones(100), np.full(100, 1.3)).expected()
    assert certain["accuracy"] == pytest.approx(1, abs=1e-9)
    assert certain["auc"] == pytest.approx(1, abs=1e-9)
    absent = likelihood_ratio(np.ones(3), np.ones(3), np.ones(3)).expected()
    assert (absent["d_prime"], absent["accuracy"], absent["auc"]) == (0, 0.5, 0.5)


BOX = Box(16, 5120.0, linear_theory=True)
PARTITIONS = Partitions(BOX)
SLICES, CUBES = PARTITIONS.slices, PARTITIONS.cubes


def fit(slices: dict[str, Floats], cubes: dict[str, Floats], box: Box = BOX) -> dict[str, Ceiling]:
    """The ceilings from mean spectra of slices and spectra of cubes."""
    nothing: Any = None
    slices = {name: power[:, :, None] for name, power in slices.items()}  # of one axis, 0
    spectra = SimulationSpectra(np.zeros(1, int), {}, {}, slices, cubes, nothing, nothing)
    return fit_ceilings(Partitions(box), spectra)


def measured(ratio: torch.Tensor, seeds: int = 6, keep: float = 100) -> tuple[dict, dict]:
    """Mean spectra of slices and spectra of cubes of Gaussian twins with P_GR/P_N = `ratio` of cubes."""
    vectors = wave_vectors(16, 3)
    newton = wavenumber(vectors).clamp(min=1) ** -3 * (wavenumber(vectors) <= keep)
    slices, cubes = {name: [] for name in SLICES}, {name: [] for name in CUBES}
    for spectrum in (newton, newton * ratio):
        fields = gaussian(spectrum, seeds, seed=0)  # the same phases
        for name, bins in CUBES.items():
            cubes[name].append(bins.power(fields))
        for name, bins in SLICES.items():
            of_cubes = [
                bins.power(torch.cat([field.movedim(axis, 0) for axis in range(3)])) for field in fields
            ]
            slices[name].append(np.stack([power.mean(0) for power in of_cubes]))
    return tuple(
        {name: np.stack(power, axis=1) for name, power in spectra.items()} for spectra in (slices, cubes)
    )


def test_an_isotropic_ceiling_counts_scales_and_a_directional_one_both() -> None:
    vectors = wave_vectors(16, 3)
    isotropic = fit(*measured(torch.full_like(wavenumber(vectors), 1.1)))
    modes = CUBES["directional"].modes[CUBES["directional"].inside_nyquist].sum()
    attainable = np.sqrt(modes / 2) * np.log(1.1)
    assert isotropic["directional"].expected()["cube_d_prime"] == pytest.approx(attainable, rel=1e-6)
    # the mean power of a shell holds less than its modes one by one
    assert 0.97 * attainable < isotropic["isotropic"].expected()["cube_d_prime"] < attainable

    anisotropic = fit(*measured(1 + 0.3 * (0.6 - mu4(vectors))))
    assert anisotropic["isotropic"].expected()["cube_auc"] < 0.6
    assert anisotropic["directional"].expected()["cube_auc"] > 0.8


@pytest.mark.parametrize("slope", [0, 2, 6])
def test_the_isotropic_ceiling_is_that_of_the_power_in_shells(slope: float) -> None:
    """Draws of every mode, with P(n) = n^-slope and twice that along the axes, averaged in shells."""
    classes, shells, draws = SLICES["symmetry"], SLICES["isotropic"], 20_000
    newton = np.maximum(classes.n, 1) ** -slope * np.where(classes.mu4 > ALONG_AXIS, 2, 1)
    ratio = np.where(classes.n < 5, 1.25, 1.0)
    shell = np.floor(classes.n + 0.5).astype(int)

    def average(power: Floats) -> Floats:
        """P(k) (b, classes) -> (b, shells)."""
        modes = np.eye(shell.max() + 1)[shell] * classes.modes[:, None]
        return ((power @ modes) / modes.sum(0))[:, 1 : len(shells) + 1]

    slices = {"symmetry": np.stack([newton, newton * ratio])}
    slices["isotropic"] = average(slices["symmetry"])
    slices["wavenumbers"] = np.ones((2, len(SLICES["wavenumbers"])))
    slices = {name: power[None] for name, power in slices.items()}
    limit = fit(slices, measured(torch.ones(16, 16, 9))[1])["isotropic"].slices[0]
    random = np.random.default_rng(0)
    white = random.chisquare(classes.modes, (2, draws, len(classes))) / classes.modes
    lambda_ratio = [
        limit({"isotropic": average(power)}) for power in (white[0] * newton, white[1] * newton * ratio)
    ]
    found = mannwhitneyu(lambda_ratio[1], lambda_ratio[0]).statistic / draws**2
    assert limit.expected()["auc"] == pytest.approx(found, abs=0.01)


def test_the_linear_ceiling_does_not_depend_on_the_measured_difference() -> None:
    vectors = wave_vectors(16, 3)
    ratio = torch.full_like(wavenumber(vectors), 1.3)
    slices, cubes = measured(ratio)
    linear = fit(slices, cubes)["linear"]
    # cubes: modes times the square of the table's logarithm
    bins = CUBES["wavenumbers"]
    log_ratio = np.log(linear_theory_ratio(bins.n * BOX.fundamental))
    assert linear.cubes.expected()["d_prime"] == pytest.approx(np.sqrt(bins.modes @ log_ratio**2 / 2))
    # slices: the excess of a mode is diluted by the cube modes of higher n that project onto it
    of_slices = linear.slices[0]
    excess = of_slices.gr / of_slices.newton
    n = SLICES["wavenumbers"].n[of_slices.used]
    assert 1 < excess[0] < 1.072
    np.testing.assert_allclose(excess[n >= 5], 1, rtol=1e-12)
    assert "linear" not in fit(slices, cubes, Box(16, None))


def test_the_projected_excess_is_that_of_slices() -> None:
    """Slices of cubes with the excess of linear theory have the excess that the ceiling of slices assumes."""
    ratio = torch.from_numpy(linear_theory_ratio(wavenumber(wave_vectors(16, 3)).numpy() * BOX.fundamental))
    slices, cubes = measured(ratio, seeds=40)
    linear = fit(slices, cubes)["linear"].slices[0]
    power = slices["wavenumbers"][..., linear.used].mean(0)
    np.testing.assert_allclose(linear.gr / linear.newton, power[1] / power[0], atol=2e-3)


def test_removed_modes_are_left_out() -> None:
    vectors = wave_vectors(16, 3)
    slices, cubes = measured(torch.full_like(wavenumber(vectors), 1.1), seeds=2, keep=6)
    for ceiling in fit(slices, cubes).values():
        for part, partitions in ((ceiling.slices[0], SLICES), (ceiling.cubes, CUBES)):
            bins = partitions[part.partition]
            assert not part.used[bins.n > 6.5].any()
            assert part.used[bins.n < 5].all()
            assert np.isfinite(part({part.partition: np.ones((1, len(bins)))})).all()


def test_constant_fields_are_rejected() -> None:
    nothing = ({name: np.zeros((2, 2, len(bins))) for name, bins in bins.items()} for bins in (SLICES, CUBES))
    with pytest.raises(UserError, match="cubes are constant"):
        fit(*nothing)


def test_shares_of_the_attainable() -> None:
    assert detectability(0.5) == 0
    assert detectability(float(ndtr(0.55 / np.sqrt(2)))) == pytest.approx(0.55)
    assert attained_share(0.65, 0.65) == 1
    assert attained_share(0.5, 0.65) == 0
    assert np.isnan(attained_share(0.6, 0.5))
