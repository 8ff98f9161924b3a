"""Linear theory against closed forms and published numbers."""

import numpy as np
import pytest
from scipy.integrate import quad

from datasets.preparation.cosmology import HUBBLE_LENGTH, Cosmology

UNIVERSE = Cosmology()


def test_the_universe_is_flat_and_of_the_simulations() -> None:
    assert pytest.approx(0.31204608) == UNIVERSE.Omega_m
    assert pytest.approx(9.166e-5, rel=1e-3) == UNIVERSE.Omega_r
    assert UNIVERSE.expansion(1) == pytest.approx(1)


def test_conformal_hubble() -> None:
    assert UNIVERSE.conformal_hubble(0) == pytest.approx(1 / HUBBLE_LENGTH)
    matter = Cosmology(omega_b=0.0, omega_cdm=0.67556**2, T_cmb=0.0)  # aH = sqrt(1 + z) H_0
    assert matter.conformal_hubble(3) == pytest.approx(2 / HUBBLE_LENGTH)


@pytest.mark.parametrize("redshift", [0, 1, 10])
def test_growth_without_radiation_is_the_integral(redshift: float) -> None:
    universe = Cosmology(T_cmb=0.0)
    a = 1 / (1 + redshift)
    integral = quad(lambda x: (x * universe.expansion(x)) ** -3, 0, a)[0]
    expected = 2.5 * universe.Omega_m * universe.expansion(a) * integral / a
    assert universe.potential_growth(redshift) == pytest.approx(expected, rel=1e-7)


def test_growth_in_matter_domination_is_one() -> None:
    matter = Cosmology(omega_b=0.0, omega_cdm=0.67556**2, T_cmb=0.0)
    assert matter.potential_growth(5) == pytest.approx(1, rel=1e-7)


def test_growth_with_radiation_and_no_constant_is_that_of_meszaros() -> None:
    early = 2000.0
    equality = UNIVERSE.Omega_r / UNIVERSE.Omega_m
    expected = 1 + 2 / 3 * equality * (1 + early)
    assert UNIVERSE.potential_growth(early) == pytest.approx(expected, rel=1e-6)


def test_transfer() -> None:
    k = np.geomspace(1e-6, 1e6, 400)
    transfer = UNIVERSE.transfer(k)
    assert transfer[0] == pytest.approx(1, abs=1e-4)
    assert (np.diff(transfer) < 0).all()
    tail = np.diff(np.log(transfer)) / np.diff(np.log(k))
    assert tail[-1] == pytest.approx(-2, abs=0.1)  # ln(k) / k^2


def test_the_spectrum_has_the_known_sigma_8() -> None:
    """This cosmology has sigma_8 = 0.83 to 0.85 in Boltzmann codes; the fit is good to a few per cent."""
    k = np.geomspace(1e-5, 50, 20_000)
    density = k**2 * 2 / 3 / UNIVERSE.Omega_m * HUBBLE_LENGTH**2  # delta / phi today
    x = 8 * k
    window = 3 * (np.sin(x) - x * np.cos(x)) / x**3
    variance = k**3 / (2 * np.pi**2) * UNIVERSE.potential_power(k, 0) * (density * window) ** 2
    assert np.sqrt(np.trapezoid(variance, np.log(k))) == pytest.approx(0.84, abs=0.03)


def test_the_spectrum_on_large_scales_is_the_primordial_one() -> None:
    k = np.array([UNIVERSE.k_pivot / UNIVERSE.h * 1e-4])
    expected = 9 / 25 * UNIVERSE.A_s * 1e-4 ** (UNIVERSE.n_s - 1) * UNIVERSE.potential_growth(1) ** 2
    assert k**3 * UNIVERSE.potential_power(k, 1) / (2 * np.pi**2) == pytest.approx(expected, rel=1e-3)
