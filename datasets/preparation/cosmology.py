"""Linear theory: expansion, growth of the potential, and its power spectrum.

Wavenumbers are in h/Mpc, lengths in Mpc/h, the potential is in units of c^2, and c = 299792.458 km/s. The
universe is flat: matter (m), radiation (r: photons and massless neutrinos), a fluid with equation of state
w = w0_fld + wa_fld (1 - a) and a cosmological constant.

Sources: Meszaros 1974 (A&A 37, 225); Eisenstein & Hu 1998 (ApJ 496, 605); Dodelson & Schmidt 2020, Modern
Cosmology, 2nd ed., chapter 8.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

HUBBLE_LENGTH = 2997.92458  # c / (100 km/s/Mpc), in Mpc/h
PHOTONS = 2.4728e-5  # omega of photons at T_cmb = 2.7255 K

_BOX = 5120.0  # Mpc/h: the unit of n in the tables below is 2 pi / _BOX

# P_GR/P_N of linear theory for simulations that start at z = 100 without radiation treatment: GR in the
# Poisson gauge with the radiation perturbations of a Boltzmann code in its initial conditions, Newton in the
# N-body gauge, and both evolved without radiation perturbations. The excess is frozen from z = 10 to z = 1.
# Measured in gevolution twins: 1.067, 1.061, 1.056, 1.035, 1.026, 0.996.
_LINEAR_N = np.array([1, 2**0.5, 3**0.5, 2, 3, 4, 5])
_LINEAR_RATIO = np.array([1.072, 1.059, 1.049, 1.041, 1.019, 1.006, 1.0])

# With `radiation treatment = CLASS` they agree at early times and part late, at the horizon. Measured at
# z = 1 in 31 pairs of 256^3 cells.
_LATE_N = np.array([1, 2, 3, 3.5, 5, 6])
_LATE_RATIO = np.array([0.9975, 0.9991, 0.9991, 0.9998, 0.9998, 1.0])


def linear_theory_ratio(k: NDArray[np.float64]) -> NDArray[np.float64]:
    """P_GR/P_N of linear theory at wavenumbers `k` in h/Mpc, for simulations without radiation treatment.

    Interpolated in a table for 0.0012 < k < 0.0049 h/Mpc; 1 above 0.0061 h/Mpc, and constant below the table.
    """
    return np.exp(np.interp(k * _BOX / (2 * np.pi), _LINEAR_N, np.log(_LINEAR_RATIO)))


def late_ratio(k: NDArray[np.float64]) -> NDArray[np.float64]:
    """P_GR/P_N at wavenumbers `k` in h/Mpc and z = 1, measured in simulations with radiation treatment."""
    return np.exp(np.interp(k * _BOX / (2 * np.pi), _LATE_N, np.log(_LATE_RATIO)))


def linear_theory_reference(attributes: Mapping[str, Any]) -> Literal["linear", "none", "unknown"]:
    """What linear theory predicts for the twins of a cube file with these `attributes`.

    `linear`: `linear_theory_ratio`, for gevolution runs with radiation as a background, and for synthetic
    universes that imitate them. `none`: no difference, to 0.1 % at n >= 3 and z >= 1, with `radiation
    treatment = CLASS`, which adds radiation perturbations to both gravities. `unknown`: for any other file,
    such as those of earlier versions of `pack`, which did not keep this setting.

    The default of gevolution counts for files that state its version as their source.
    """
    by_default = re.match(r"gevolution \d", str(attributes.get("source", "")))
    default = "background" if by_default else "unknown"
    treatment = str(attributes.get("radiation treatment", default)).lower()
    if treatment in ("background", "none"):
        return "linear"
    return "none" if treatment == "class" else "unknown"


@dataclass(frozen=True)
class Cosmology:
    """A flat universe. The defaults are those of the gevolution simulations of this project."""

    h: float = 0.67556
    omega_b: float = 0.022032  # physical densities: omega = Omega h^2
    omega_cdm: float = 0.12038
    A_s: float = 2.215e-9  # of the primordial curvature, at k_pivot
    n_s: float = 0.9619
    k_pivot: float = 0.05  # 1/Mpc, not h/Mpc
    T_cmb: float = 2.7255  # K
    N_ur: float = 3.046  # massless neutrinos
    Omega_fld: float = 0.0  # dark energy that is not a cosmological constant
    w0_fld: float = -1.0
    wa_fld: float = 0.0

    @property
    def Omega_m(self) -> float:
        """Matter today, over the critical density."""
        return (self.omega_b + self.omega_cdm) / self.h**2

    @property
    def Omega_r(self) -> float:
        """Photons and massless neutrinos today, over the critical density."""
        neutrinos = 7 / 8 * (4 / 11) ** (4 / 3) * self.N_ur
        return PHOTONS * (self.T_cmb / 2.7255) ** 4 * (1 + neutrinos) / self.h**2

    @property
    def Omega_Lambda(self) -> float:
        """The cosmological constant today, over the critical density."""
        return 1 - self.Omega_m - self.Omega_r - self.Omega_fld

    def fluid(self, a: float) -> float:
        """Density of the fluid at scale factor `a`, over the critical density today."""
        exponent = -3 * (1 + self.w0_fld + self.wa_fld)
        return float(self.Omega_fld * a**exponent * np.exp(3 * self.wa_fld * (a - 1)))

    def expansion(self, a: float) -> float:
        """H(a) / H_0 at scale factor `a`."""
        matter, radiation = self.Omega_m * a**-3, self.Omega_r * a**-4
        return float(np.sqrt(matter + radiation + self.fluid(a) + self.Omega_Lambda))

    def conformal_hubble(self, redshift: float) -> float:
        """The conformal Hubble rate aH/c in h/Mpc, the wavenumber of the horizon."""
        a = 1 / (1 + redshift)
        return a * self.expansion(a) / HUBBLE_LENGTH

    def potential_growth(self, redshift: float) -> float:
        """The linear growth g(z) = D(z)/a of the Newtonian potential, 1 in pure matter domination.

        By the Poisson equation, k^2 phi = -4 pi G a^2 rho_m delta, phi grows as D/a. D is the growing
        solution of (Dodelson & Schmidt 2020, chapter 8)

            D'' + (2 + dlnH/dlna) D' = (3/2) Omega_m(a) D,      ' = d/dlna,

        in which radiation drives the expansion but does not cluster, as in the simulations. It starts as the
        growing solution for a negligible cosmological constant, D = a + (2/3) a_eq (Meszaros 1974). Radiation
        adds 0.2 % to g at z = 10 and 0.05 % at z = 1, the size of the relativistic effects in question.
        """
        from scipy.integrate import solve_ivp  # takes a second, which training need not wait

        matter, radiation, constant = self.Omega_m, self.Omega_r, self.Omega_Lambda

        def derivative(ln_a: float, state: NDArray[np.float64]) -> list[float]:
            a, fluid = np.exp(ln_a), self.fluid(np.exp(ln_a))
            squared = matter * a**-3 + radiation * a**-4 + fluid + constant
            fluid *= 1.5 * (1 + self.w0_fld + self.wa_fld * (1 - a))
            slope = -(1.5 * matter * a**-3 + 2 * radiation * a**-4 + fluid) / squared  # dlnH/dlna
            return [state[1], 1.5 * matter * a**-3 / squared * state[0] - (2 + slope) * state[1]]

        start, end = 1e-7, 1 / (1 + redshift)
        state = [start + 2 / 3 * radiation / matter, start]
        interval = (np.log(start), np.log(end))
        solution = solve_ivp(derivative, interval, state, rtol=1e-9, atol=0, method="DOP853")
        return float(solution.y[0, -1] / end)

    def transfer(self, k: NDArray[np.float64]) -> NDArray[np.float64]:
        """The matter transfer function at wavenumbers `k` in h/Mpc, without acoustic oscillations.

        Eisenstein & Hu 1998, eqs. 26 and 28-31: the spectrum of cold dark matter, with its turnover changed
        by the pressure of the baryons within the sound horizon s.
        """
        omega_m, share = self.omega_b + self.omega_cdm, self.omega_b / (self.omega_b + self.omega_cdm)
        s = 44.5 * np.log(9.83 / omega_m) / np.sqrt(1 + 10 * self.omega_b**0.75)  # Mpc
        alpha = 1 - 0.328 * np.log(431 * omega_m) * share + 0.38 * np.log(22.3 * omega_m) * share**2
        gamma = self.Omega_m * self.h * (alpha + (1 - alpha) / (1 + (0.43 * k * self.h * s) ** 4))
        q = k * (self.T_cmb / 2.7) ** 2 / gamma
        bend = np.log(2 * np.e + 1.8 * q)
        return np.asarray(bend / (bend + (14.2 + 731 / (1 + 62.5 * q)) * q**2))

    def potential_power(self, k: NDArray[np.float64], redshift: float) -> NDArray[np.float64]:
        """Power spectrum of the Newtonian potential, in (Mpc/h)^3, at wavenumbers `k` > 0 in h/Mpc.

        The primordial curvature has k^3 P / 2 pi^2 = A_s (k/k_pivot)^(n_s - 1). After the radiation era the
        potential is 3/5 of it on large scales. With T(k) and g(z) (Dodelson & Schmidt 2020, chapter 8):

            k^3 P(k, z) / 2 pi^2 = (9/25) A_s (k/k_pivot)^(n_s - 1) T(k)^2 g(z)^2
        """
        primordial = self.A_s * (k * self.h / self.k_pivot) ** (self.n_s - 1)
        growth = self.potential_growth(redshift)
        return np.asarray(2 * np.pi**2 / k**3 * 9 / 25 * primordial * (self.transfer(k) * growth) ** 2)


def reference_ratio(k: NDArray[np.float64], attributes: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """P_GR/P_N that theory predicts at `k` in h/Mpc for the cubes of a file with these attributes.

    None where no theory is known. NaN for the longest waves (n < 3) where the gravities part late.
    """
    match linear_theory_reference(attributes):
        case "linear":
            return linear_theory_ratio(k)
        case "none":
            return np.where(k * _BOX / (2 * np.pi) < 2.5, np.nan, 1.0)
    return None
