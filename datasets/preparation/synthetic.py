"""A synthetic universe: Gaussian potentials, whose twins differ by a relativistic term at horizon scale.

The Newtonian twin is a Gaussian random field phi(x) in a periodic box of L = 5120 Mpc/h at redshift 1, with
the linear power spectrum of `Cosmology.potential_power`. It is made from white noise w(x), one unit normal
per cell of volume V_c = (L/N)^3, by multiplying the noise's Fourier modes with sqrt(P(k) / V_c); the mode k =
0 is empty.

The GR twin has the same phases and obeys the Poisson equation of a perturbed universe instead of Newton's. In
the longitudinal (Poisson) gauge, for Psi = Phi (Ma & Bertschinger 1995, ApJ 455, 7, eq. 23a, with delta T^0_0
= -delta rho),

    k^2 Phi + 3 H (dPhi/dtau + H Phi) = -4 pi G a^2 rho_m delta,    H = (da/dtau)/a, conformal Hubble rate,

and for a potential at rest, as it is in the matter era,

    (k^2 + 3 H^2) Phi_GR = -4 pi G a^2 rho_m delta = k^2 Phi_Newton.

So with the same density contrast, GR weakens the potential where a wave is not small against the horizon:

    Phi_GR(k) = Phi_Newton(k) k^2 / (k^2 + 3 s H^2)

The `strength` s is 1 in nature: Phi_GR is then 15 % below Phi_Newton in the longest wave of the box and 1 %
in its fourth harmonic. A larger strength makes a toy universe with a larger difference, for demonstrations.

What is left out: the density contrast of Newtonian simulations belongs to another gauge, in which most of
this effect is absorbed by the initial conditions (Chisari & Zaldarriaga 2011, PRD 83, 123505), so the twins
of N-body codes such as gevolution (Adamek et al. 2016, JCAP 07, 053) differ less, and not by this factor; and
there is no non-linear growth. Networks trained here prove that the pipeline works and say nothing about
simulations.
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
    """The ensemble that all seeds belong to; `strength` is the s of this module's first lines."""

    def __init__(self, size: int, strength: float):
        cosmology = Cosmology()
        self.size = size
        # Amplitudes are tables over |n|^2, where k = 2 pi n / L and n holds three integers.
        whole = np.fft.fftfreq(size, 1 / size).astype(np.int32) ** 2
        half = np.arange(size // 2 + 1, dtype=np.int32) ** 2  # a real field needs half of its modes
        self._n2 = whole[:, None, None] + whole[None, :, None] + half
        k = 2 * np.pi / BOX_SIZE * np.sqrt(np.arange(1, self._n2.max() + 1))
        horizon = 3 * strength * cosmology.conformal_hubble(REDSHIFT) ** 2
        power = {"newton": cosmology.potential_power(k, REDSHIFT)}
        power["gr"] = power["newton"] * (k**2 / (k**2 + horizon)) ** 2
        modes = self._modes()
        variances = [float(modes[1:] @ power[gravity]) / BOX_SIZE**3 for gravity in GRAVITIES]
        self.variance = sum(variances) / len(variances)  # of the potential, in c^4, expected over all seeds
        scale = (size / BOX_SIZE) ** 3 / self.variance
        self._amplitude = {
            gravity: np.concatenate([[0], np.sqrt(power[gravity] * scale)]).astype(np.float32)
            for gravity in GRAVITIES
        }

    def _modes(self) -> NDArray[np.float64]:
        """How many Fourier modes of the cube have each |n|^2."""
        weights = np.full(self.size // 2 + 1, 2.0)  # a mode and its conjugate ...
        weights[[0, -1]] = 1.0  # ... which on these two planes are both in the half that is kept
        counts = np.zeros(int(self._n2.max()) + 1)
        for plane in self._n2:
            counts += np.bincount(plane.ravel(), np.broadcast_to(weights, plane.shape).ravel(), len(counts))
        return counts

    def twins(self, seed: int, index: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The two cubes of one seed, (N, N, N), in units of the ensemble's standard deviation.

        `index` numbers the seeds of the universe that `seed` chooses. A cube depends on nothing else, least
        of all on how many seeds are made.
        """
        from scipy import fft  # here, because a run that trains should not wait for it

        noise = np.random.default_rng([seed, index]).standard_normal((self.size,) * 3, dtype=np.float32)
        modes = fft.rfftn(noise, workers=-1)
        del noise
        for gravity in GRAVITIES:
            shaped = modes * self._amplitude[gravity][self._n2]
            yield gravity, fft.irfftn(shaped, (self.size,) * 3, overwrite_x=True, workers=-1)


def check_synthetic(cubes: CubeFile, *, size: int, strength: float, seed: int) -> None:
    """Raises DataError unless `cubes` are the synthetic universe of these settings; says how strong it is."""
    asked = {"size": size, "strength": strength, "seed": seed}
    found = {"size": cubes.size} | {key: cubes.attributes.get(key) for key in ("strength", "seed")}
    if found != asked:
        raise DataError(
            f"{cubes.path}: data_params.synthetic asks for {asked}, the file there holds {found}.\n"
            "Remove it, choose another data_params.datafile, or leave data_params.synthetic out."
        )
    if strength != 1:
        log.info("%s: synthetic, its relativistic term is %g times the physical one", cubes.path, strength)


def write_synthetic(
    path: str | Path, *, seeds: int, size: int, strength: float = 1.0, seed: int = 0, overwrite: bool = False
) -> None:
    """Writes a packed file of `seeds` pairs of twins, each (size, size, size) float32.

    The values are the potential divided by its standard deviation over the ensemble of both gravities
    (attribute `std`, in c^2; the mean is 0), so a cube stays the same to the bit when more seeds are made.
    The same arguments give the same file. One pair is in memory at a time: about 24 bytes per cell.

    Raises DataError if an argument is out of range, or if the file exists or cannot be written.
    """
    if seeds < 1 or size < SIZE_UNIT or size % SIZE_UNIT or seed < 0 or not 0 <= strength < np.inf:
        raise DataError(
            f"{path}: a synthetic universe cannot have seeds = {seeds}, size = {size}, "
            f"strength = {strength}, seed = {seed}.\n"
            f"Allowed are seeds >= 1, a size that is a multiple of {SIZE_UNIT}, strength >= 0, seed >= 0."
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
