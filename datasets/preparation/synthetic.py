"""A synthetic universe: Gaussian potentials whose twins differ by a relativistic term on horizon scales.

The Newtonian twin is a Gaussian random field phi(x) in a periodic box of L = 5120 Mpc/h at redshift 1, with
the linear power spectrum of `Cosmology.potential_power`: white noise w(x), one unit normal per cell of volume
V_c = (L/N)^3, whose Fourier modes are multiplied by sqrt(P(k) / V_c). The mode k = 0 is zero.

The GR twin has the same phases and obeys the relativistic Poisson equation instead of the Newtonian one. In
the longitudinal (Poisson) gauge, for Psi = Phi (Ma & Bertschinger 1995, ApJ 455, 7, eq. 23a, with delta T^0_0
= -delta rho),

    k^2 Phi + 3 H (dPhi/dtau + H Phi) = -4 pi G a^2 rho_m delta,    H = (da/dtau)/a, conformal Hubble rate,

and for a constant potential, as in matter domination,

    (k^2 + 3 H^2) Phi_GR = -4 pi G a^2 rho_m delta = k^2 Phi_Newton.

So for the same density contrast, GR reduces the potential of waves that are not small compared to the
horizon:

    Phi_GR(k) = Phi_Newton(k) k^2 / (k^2 + 3 s H^2)

with `strength` s. The physical value is s = 1: Phi_GR is then 15 % below Phi_Newton for the longest wave of
the box and 1 % for its fourth harmonic. A larger strength gives a larger difference, for demonstrations.

This is a toy model. The density contrast of a Newtonian simulation belongs to another gauge, in which the
initial conditions absorb most of this effect (Chisari & Zaldarriaga 2011, PRD 83, 123505), so the twins of
N-body codes such as gevolution (Adamek et al. 2016, JCAP 07, 053) differ less and by another factor. There is
no non-linear growth. Networks trained on it test the pipeline and say nothing about simulations.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..cube_file import GRAVITIES, SIZE_UNIT, CubeFile, DataError
from .cosmology import Cosmology
from .writer import new_cube, new_file

log = logging.getLogger(__name__)

BOX_SIZE = 5120.0  # Mpc/h
REDSHIFT = 1.0


class Universe:
    """The ensemble of all seeds; `strength` is s in the module docstring."""

    def __init__(self, size: int, strength: float):
        cosmology = Cosmology()
        self.size = size
        # Amplitudes are tables over |n|^2, where k = 2 pi n / L with three integers n.
        whole = np.fft.fftfreq(size, 1 / size).astype(np.int32) ** 2
        half = np.arange(size // 2 + 1, dtype=np.int32) ** 2  # half of the modes determine a real field
        self._n2 = whole[:, None, None] + whole[None, :, None] + half
        k = 2 * np.pi / BOX_SIZE * np.sqrt(np.arange(1, self._n2.max() + 1))
        horizon = 3 * strength * cosmology.conformal_hubble(REDSHIFT) ** 2
        power = {"newton": cosmology.potential_power(k, REDSHIFT)}
        power["gr"] = power["newton"] * (k**2 / (k**2 + horizon)) ** 2
        modes = self._modes()
        variances = [float(modes[1:] @ power[gravity]) / BOX_SIZE**3 for gravity in GRAVITIES]
        self.variance = sum(variances) / len(
            variances
        )  # of the potential in units of c^4, expected over seeds
        scale = (size / BOX_SIZE) ** 3 / self.variance
        self._amplitude = {
            gravity: np.concatenate([[0], np.sqrt(power[gravity] * scale)]).astype(np.float32)
            for gravity in GRAVITIES
        }

    def _modes(self) -> NDArray[np.float64]:
        """The number of Fourier modes of the cube for each |n|^2."""
        weights = np.full(self.size // 2 + 1, 2.0)  # a mode and its conjugate
        weights[[0, -1]] = 1.0  # on these two planes both are in the half
        counts = np.zeros(int(self._n2.max()) + 1)
        for plane in self._n2:
            counts += np.bincount(plane.ravel(), np.broadcast_to(weights, plane.shape).ravel(), len(counts))
        return counts

    def twins(self, seed: int, index: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The two cubes of one seed, (N, N, N), in units of the standard deviation of the ensemble.

        `seed` is the random seed of the universe, `index` the number of the seed in it. A cube depends on
        nothing else, so it does not change when a file gets more seeds.
        """
        from scipy import fft  # takes a second, which training need not wait

        noise = np.random.default_rng([seed, index]).standard_normal((self.size,) * 3, dtype=np.float32)
        modes = fft.rfftn(noise, workers=-1)
        del noise
        for gravity in GRAVITIES:
            shaped = modes * self._amplitude[gravity][self._n2]
            yield gravity, fft.irfftn(shaped, (self.size,) * 3, overwrite_x=True, workers=-1)


def check_synthetic(cubes: CubeFile, *, size: int, strength: float, seed: int) -> None:
    """Raise DataError unless `cubes` are the synthetic universe of these settings. Logs the strength."""
    expected = {"size": size, "strength": strength, "seed": seed}
    found = {"size": cubes.size} | {key: cubes.attributes.get(key) for key in ("strength", "seed")}
    if found != expected:
        raise DataError(
            f"{cubes.path}: data_params.synthetic is {expected}, but the file has {found}.\n"
            "Remove the file, choose another data_params.datafile, or remove data_params.synthetic."
        )
    if strength != 1:
        log.info("%s: synthetic, its relativistic term is %g times the physical one", cubes.path, strength)


def write_synthetic(
    path: str | Path, *, seeds: int, size: int, strength: float = 1.0, seed: int = 0, overwrite: bool = False
) -> None:
    """Write a packed file of `seeds` pairs of twins, each cube (size, size, size) float32.

    The values are the potential divided by its standard deviation over the ensemble of both gravities
    (attribute `std`, in c^2; the mean is 0), so a cube is bit-identical in files with more seeds. The same
    arguments give the same file. One pair of twins is in memory at a time: about 24 bytes per cell.

    Raises DataError if an argument is out of range, or if the file exists or cannot be written.
    """
    if seeds < 1 or size < SIZE_UNIT or size % SIZE_UNIT or seed < 0 or not 0 <= strength < np.inf:
        raise DataError(
            f"{path}: found seeds = {seeds}, size = {size}, strength = {strength}, seed = {seed}; "
            f"allowed: seeds >= 1, size a multiple of {SIZE_UNIT}, strength >= 0, seed >= 0"
        )
    with new_file(Path(path), bytes_needed=seeds * 2 * size**3 * 4, overwrite=overwrite) as file:
        universe = Universe(size, strength)
        file.attrs.update(_attributes(universe, strength, seed))
        title = f"synthetic universe, strength {strength:g}"
        for index in tqdm(range(seeds), desc=title, unit="pair", disable=None):
            for gravity, cube in universe.twins(seed, index):
                new_cube(file, index, gravity, size).write_direct(cube)


def _attributes(universe: Universe, strength: float, seed: int) -> dict[str, Any]:
    return {
        "field": "phi",
        "mean": 0.0,
        "std": float(np.sqrt(universe.variance)),
        "variance": universe.variance,
        "box_size": BOX_SIZE,
        "box_size_unit": "Mpc/h",
        "redshift": REDSHIFT,
        "gravities": list(GRAVITIES),
        "source": f"python -m datasets synthesize, strength {strength:g}, seed {seed}",
        "synthetic": True,
        "strength": strength,
        "seed": seed,
        **asdict(Cosmology()),
    }
