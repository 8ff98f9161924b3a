"""Linear theory against closed forms and published numbers."""

import numpy as np
import pytest
from scipy.integrate import quad

from datasets.preparation.cosmology import (
    HUBBLE_LENGTH,
    Cosmology,
    late_ratio,
    linear_theory_ratio,
    linear_theory_reference,
)

COSMOLOGY = Cosmology()


def test_density_parameters() -> None:
    assert pytest.approx(0.31204608) == COSMOLOGY.Omega_m
    assert pytest.approx(9.166e-5, rel=1e-3) == COSMOLOGY.Omega_r
    assert COSMOLOGY.expansion(1) == pytest.approx(1)


def test_conformal_hubble() -> None:
    assert COSMOLOGY.conformal_hubble(0) == pytest.approx(1 / HUBBLE_LENGTH)
    matter = Cosmology(omega_b=0.0, omega_cdm=0.67556**2, T_cmb=0.0)  # aH = sqrt(1 + z) H_0
    assert matter.conformal_hubble(3) == pytest.approx(2 / HUBBLE_LENGTH)


@pytest.mark.parametrize("redshift", [0, 1, 10])
def test_growth_without_radiation_matches_the_integral(redshift: float) -> None:
    cosmology = Cosmology(T_cmb=0.0)
    a = 1 / (1 + redshift)
    integral = quad(lambda x: (x * cosmology.expansion(x)) ** -3, 0, a)[0]
    expected = 2.5 * cosmology.Omega_m * cosmology.expansion(a) * integral / a
    assert cosmology.potential_growth(redshift) == pytest.approx(expected, rel=1e-7)


def test_growth_is_one_in_matter_domination() -> None:
    matter = Cosmology(omega_b=0.0, omega_cdm=0.67556**2, T_cmb=0.0)
    assert matter.potential_growth(5) == pytest.approx(1, rel=1e-7)


def test_early_growth_with_radiation_matches_meszaros() -> None:
    early = 2000.0
    equality = COSMOLOGY.Omega_r / COSMOLOGY.Omega_m
    expected = 1 + 2 / 3 * equality * (1 + early)
    assert COSMOLOGY.potential_growth(early) == pytest.approx(expected, rel=1e-6)


def test_transfer_function_limits() -> None:
    k = np.geomspace(1e-6, 1e6, 400)
    transfer = COSMOLOGY.transfer(k)
    assert transfer[0] == pytest.approx(1, abs=1e-4)
    assert (np.diff(transfer) < 0).all()
    tail = np.diff(np.log(transfer)) / np.diff(np.log(k))
    assert tail[-1] == pytest.approx(-2, abs=0.1)  # ln(k) / k^2


def test_sigma_8() -> None:
    """Boltzmann codes give sigma_8 = 0.83 to 0.85 for this cosmology; the fit is accurate to a few %."""
    k = np.geomspace(1e-5, 50, 20_000)
    density = k**2 * 2 / 3 / COSMOLOGY.Omega_m * HUBBLE_LENGTH**2  # delta / phi today
    x = 8 * k
    window = 3 * (np.sin(x) - x * np.cos(x)) / x**3
    variance = k**3 / (2 * np.pi**2) * COSMOLOGY.potential_power(k, 0) * (density * window) ** 2
    assert np.sqrt(np.trapezoid(variance, np.log(k))) == pytest.approx(0.84, abs=0.03)


def test_large_scale_power_is_primordial() -> None:
    k = np.array([COSMOLOGY.k_pivot / COSMOLOGY.h * 1e-4])
    expected = 9 / 25 * COSMOLOGY.A_s * 1e-4 ** (COSMOLOGY.n_s - 1) * COSMOLOGY.potential_growth(1) ** 2
    assert k**3 * COSMOLOGY.potential_power(k, 1) / (2 * np.pi**2) == pytest.approx(expected, rel=1e-3)


def test_measured_ratios_of_power() -> None:
    fundamental = 2 * np.pi / 5120
    n = np.array([0.1, 1, 2.5, 4, 6, 100])
    np.testing.assert_allclose(late_ratio(n * fundamental), [0.9975, 0.9975, 0.9991, 0.9998, 1, 1])
    expected = [1.072, 1.072, (1.041 * 1.019) ** 0.5, 1.006, 1, 1]
    np.testing.assert_allclose(linear_theory_ratio(n * fundamental), expected)


@pytest.mark.parametrize(
    ("attributes", "reference"),
    [
        ({"source": "gevolution, /raw", "radiation treatment": "background"}, "linear"),
        ({"source": "gevolution, /raw", "radiation treatment": "CLASS"}, "none"),
        ({"source": "gevolution, /raw"}, "unknown"),  # packed when the setting was not kept
        ({"source": "gevolution 1.2"}, "linear"),
        ({}, "unknown"),
    ],
)
def test_the_reference_follows_the_settings(attributes: dict[str, str], reference: str) -> None:
    assert linear_theory_reference(attributes) == reference
