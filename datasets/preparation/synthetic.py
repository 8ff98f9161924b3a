"""A synthetic universe: Gaussian potentials whose twins differ by a known ratio of power.

The Newtonian twin is a Gaussian random field phi(x) in a periodic box of L = 5120 Mpc/h at redshift 1, with
the linear power spectrum of `Cosmology.potential_power`: white noise w(x), one unit normal per cell of volume
V_c = (L/N)^3, whose Fourier modes are multiplied by sqrt(P(k) / V_c). The mode k = 0 is zero. The GR twin has
the same phases. There is no non-linear growth. `physics` sets how the twins differ, and `strength` s by how
much; for `linear` the physical value is s = 1, and larger values are for demonstrations.

`linear`: what linear theory predicts for gevolution twins, and what they show on large scales: P_GR is 7 %
above P_Newton for the longest wave of the box and equal to it from the fifth harmonic on. The relativistic
Poisson equation for the growing mode in the Poisson gauge (Ma & Bertschinger 1995, ApJ 455, 7, eq. 23a),

    (k^2 + 3 H^2 f) Phi = -4 pi G a^2 rho_m delta,    H = (da/dtau)/a,    f = dlnD/dlna (0.875 at z = 1),

makes no difference: delta in this gauge exceeds that of a Newtonian simulation by the same factor,
1 + 3 H^2 f/k^2 (Chisari & Zaldarriaga 2011, PRD 83, 123505). What remains is how the two simulations treat
radiation when they start (`cosmology.linear_theory_ratio`):

    P_GR(k) = P_Newton(k) linear_theory_ratio(k)^s

These are simulations without radiation treatment (attribute `radiation treatment`). `late` imitates those
with `radiation treatment = CLASS`, whose gravities part late, at the horizon: P_GR is 0.25 % below P_Newton
for the longest wave (`cosmology.late_ratio`, likewise to the power s).

`toy`: a larger difference, with the opposite sign. If the potential were constant (f = 1) and the same delta
entered both equations, GR would reduce the potential of waves that are not small compared to the horizon:

    Phi_GR(k) = Phi_Newton(k) k^2 / (k^2 + 3 s H^2)

Phi_GR is then 15 % below Phi_Newton for the longest wave of the box and 1 % for its fourth harmonic. Networks
trained on it test the pipeline and say nothing about simulations.

`grid` g adds the effect of the lattice on which N-body codes start and evolve: it multiplies P_GR by

    1 + g (0.0425 - 0.054 sum_i mu_i^4),    mu_i = k_i / |k|,

which for g = 1 mimics gevolution twins (Adamek et al. 2016, JCAP 07, 053) of 64^3 cells and one particle per
cell: P_GR/P_Newton is 0.99 along the axes of the grid and 1.02 along its diagonals. `resolution` r adds what
such codes show equally in all directions near the Nyquist wavenumber n_Ny = N/2, with any cell:

    1 + 0.007 r (n / n_Ny)^2
"""

from system import UserError

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..cube_file import GRAVITIES, SIZE_UNIT, CubeFile
from .cosmology import Cosmology, late_ratio, linear_theory_ratio
from .writer import new_cube, new_file

log = logging.getLogger(__name__)

BOX_SIZE = 5120.0  # Mpc/h
REDSHIFT = 1.0
PHYSICS = {
    "toy": "a toy difference with the opposite sign of gevolution twins",
    "linear": "the linear-theory difference of gevolution twins without radiation treatment",
    "late": "the late difference of gevolution twins with radiation treatment",
}
RADIATION = {"linear": "background", "late": "CLASS"}  # gevolution's setting that they imitate
RATIOS = {"linear": linear_theory_ratio, "late": late_ratio}
RESOLUTION_EXCESS = 0.007  # of P_GR at the Nyquist wavenumber of gevolution twins of 128^3 and 256^3 cells
LATTICE_OFFSET, LATTICE_SLOPE = 0.0425, 0.054  # fitted to gevolution twins at n = 12 to 16
MAX_LINEAR_STRENGTH = 100.0  # an exponent: the ratio of powers is then 1,000
MAX_GRID = 50.0  # keeps the power of every mode positive; also of `resolution`


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What determines a universe; the module docstring explains. Raises UserError."""

    size: int = SIZE_UNIT
    """Cells along each side of a cube."""
    physics: str = "toy"
    strength: float = 1.0
    grid: float = 0.0
    resolution: float = 0.0
    seed: int = 0
    """Random seed of the universe."""

    def __post_init__(self) -> None:
        strongest = MAX_LINEAR_STRENGTH if self.physics in RATIOS else np.inf
        if (
            self.size < SIZE_UNIT
            or self.size % SIZE_UNIT
            or self.physics not in PHYSICS
            or not 0 <= self.strength < strongest
            or not 0 <= self.grid <= MAX_GRID
            or not 0 <= self.resolution <= MAX_GRID
            or self.seed < 0
        ):
            raise UserError(
                f"synthetic universe: found {self}; allowed: size a multiple of {SIZE_UNIT}, physics "
                f"{' or '.join(PHYSICS)}, strength >= 0 (linear, late: below {MAX_LINEAR_STRENGTH:g}), "
                f"grid and resolution from 0 to {MAX_GRID:g}, seed >= 0"
            )

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items())


class Universe:
    """The ensemble of all seeds."""

    def __init__(self, settings: Settings):
        self.settings, size = settings, settings.size
        cosmology = Cosmology()
        # Amplitudes are tables over |n|^2, where k = 2 pi n / L with three integers n.
        whole = np.fft.fftfreq(size, 1 / size).astype(np.int32) ** 2
        half = np.arange(size // 2 + 1, dtype=np.int32) ** 2  # half of the modes determine a real field
        self._n2 = whole[:, None, None] + whole[None, :, None] + half
        k = 2 * np.pi / BOX_SIZE * np.sqrt(np.arange(1, self._n2.max() + 1))
        power = {"newton": cosmology.potential_power(k, REDSHIFT)}
        if settings.physics in RATIOS:
            power["gr"] = power["newton"] * RATIOS[settings.physics](k) ** settings.strength
        else:
            horizon = 3 * settings.strength * cosmology.conformal_hubble(REDSHIFT) ** 2
            power["gr"] = power["newton"] * (k**2 / (k**2 + horizon)) ** 2
        power["gr"] *= 1 + settings.resolution * RESOLUTION_EXCESS * (k * BOX_SIZE / (np.pi * size)) ** 2
        lattice = lattice_ratio(size, settings.grid)
        self._lattice_amplitude = np.sqrt(lattice)
        modes = {"newton": self._count_modes(np.ones_like(lattice)), "gr": self._count_modes(lattice)}
        variances = [float(modes[gravity][1:] @ power[gravity]) / BOX_SIZE**3 for gravity in GRAVITIES]
        self.variance = sum(variances) / len(variances)  # of the potential in c^4, expected over seeds
        scale = (size / BOX_SIZE) ** 3 / self.variance
        self._amplitude = {
            gravity: np.concatenate([[0], np.sqrt(power[gravity] * scale)]).astype(np.float32)
            for gravity in GRAVITIES
        }

    def _count_modes(self, factor: NDArray[np.float32]) -> NDArray[np.float64]:
        """The Fourier modes of the cube by |n|^2, each counted `factor` (N, N, N/2 + 1) times."""
        weights = np.full(self.settings.size // 2 + 1, 2.0)  # a mode and its conjugate
        weights[[0, -1]] = 1.0  # on these two planes both are in the half
        counts = np.zeros(int(self._n2.max()) + 1)
        for index, plane in enumerate(self._n2):
            counts += np.bincount(plane.ravel(), (weights * factor[index]).ravel(), len(counts))
        return counts

    def twins(self, index: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The two cubes (N, N, N) of seed `index`, in units of the standard deviation of the ensemble.

        A cube depends on the settings and `index` alone, so it does not change when a file gets more seeds.
        """
        from scipy import fft  # takes a second, which training need not wait

        shape, generator = (self.settings.size,) * 3, np.random.default_rng([self.settings.seed, index])
        modes = fft.rfftn(generator.standard_normal(shape, dtype=np.float32), workers=-1)
        for gravity in GRAVITIES:
            shaped = modes * self._amplitude[gravity][self._n2]
            if gravity == "gr":
                shaped *= self._lattice_amplitude
            yield gravity, fft.irfftn(shaped, shape, overwrite_x=True, workers=-1)


def lattice_ratio(size: int, grid: float) -> NDArray[np.float32]:
    """The factor of the lattice on the power of GR, for each mode of rfftn: (N, N, N/2 + 1)."""
    whole, half = np.fft.fftfreq(size).astype(np.float32), np.fft.rfftfreq(size).astype(np.float32)
    squares, fourth_powers = (
        whole[:, None, None] ** power + whole[None, :, None] ** power + half**power for power in (2, 4)
    )
    squares[0, 0, 0] = 1  # the mean has no direction, and is zero
    ratio = 1 + grid * (LATTICE_OFFSET - LATTICE_SLOPE * fourth_powers / squares**2)
    return np.asarray(ratio, dtype=np.float32)


def check_synthetic(cubes: CubeFile, **settings: Any) -> None:
    """Raise UserError unless `cubes` are the synthetic universe of these `Settings`. Logs what it is."""
    expected = asdict(Settings(**settings))
    older = {"physics": "toy", "grid": 0.0, "resolution": 0.0}
    attributes = older | cubes.attributes | {"size": cubes.size}
    written = {key: attributes.get(key) for key in expected}
    if written != expected:
        raise UserError(
            f"{cubes.path}: data_params.synthetic is {expected}, but the file has {written}.\n"
            "Remove the file, choose another data_params.datafile, or remove data_params.synthetic."
        )
    log.info("%s: synthetic universe, %s: %s", cubes.path, Settings(**settings), PHYSICS[expected["physics"]])


def write_synthetic(path: str | Path, *, seeds: int, overwrite: bool = False, **settings: Any) -> None:
    """Write a packed file of `seeds` pairs of twins of the universe of these `Settings`.

    The values are the potential divided by its standard deviation over the ensemble of both gravities
    (attribute `std`, in c^2; the mean is 0), so a cube is bit-identical in files with more seeds. The same
    arguments give the same file. One pair of twins is in memory at a time: about 26 bytes per cell.

    Raises UserError if an argument is out of range, or if the file exists or cannot be written.
    """
    if seeds < 1:
        raise UserError(f"{path}: found seeds = {seeds}, allowed: seeds >= 1")
    chosen = Settings(**settings)
    with new_file(Path(path), bytes_needed=seeds * 2 * chosen.size**3 * 4, overwrite=overwrite) as file:
        universe = Universe(chosen)
        file.attrs.update({key: value for key, value in asdict(chosen).items() if key != "size"})
        file.attrs.update(asdict(Cosmology()))
        file.attrs.update(field="phi", redshift=REDSHIFT, box_size=BOX_SIZE, box_size_unit="Mpc/h")
        file.attrs.update(mean=0.0, std=float(np.sqrt(universe.variance)), variance=universe.variance)
        file.attrs.update(source=f"python -m datasets synthesize, {chosen}", synthetic=True)
        file.attrs["gravities"] = list(GRAVITIES)
        if chosen.physics in RADIATION and chosen.strength == 1:
            file.attrs["radiation treatment"] = RADIATION[chosen.physics]
        for index in tqdm(range(seeds), desc="synthetic universe", unit="pair", disable=None):
            for gravity, cube in universe.twins(index):
                new_cube(file, index, gravity, chosen.size).write_direct(cube)
