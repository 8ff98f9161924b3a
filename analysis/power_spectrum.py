"""Power spectra of slices and cubes: isotropic, and resolved by the direction to the grid axes.

A field of N cells per side in a periodic box of side L has the modes k = 2 pi n / L with integer vectors n.
With delta_k the discrete Fourier transform of the field, the power spectrum is

    P(k) = L^d / N^(2d) * <|delta_k|^2>

in (Mpc/h)^d for L in Mpc/h and a field without units, so that the sum of P(k) / L^d over all modes but k = 0
is the variance (Peacock 1999, Cosmological Physics, section 16.2). Where the box is not known, L = 2 pi and
wavenumbers are in units of the fundamental mode.

The modes of a field reach beyond the Nyquist sphere n = N/2 into the corners of Fourier space, up to
n = sqrt(d) N/2. Directions are measured by

    mu4 = sum_i n_i^4 / n^4,

which is 1 along a grid axis and 1/d along the diagonal of all axes; it is the lowest-order polynomial that
has the symmetry of the grid and is not isotropic.

Several spectra of the same fields share one Fourier transform:

    power = spectra(slices, slice_partitions(box))
    power["isotropic"], power["directional"]  # each (slices, bins)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from analysis.statistics import Bools
from training.metrics import Floats

ALONG_AXIS = 0.9  # mu4 above this: along a grid axis
ALONG_DIAGONAL = 0.45  # mu4 of cube modes up to this: along a diagonal

# Upper bounds in mu4 of the direction bins but the last, by number of dimensions. Slices: mu4 is
# (3 + cos 4 angle) / 4, so these are sectors of 9 degrees between a grid axis and the diagonal.
_DIRECTIONS = {
    2: [(3 + np.cos(np.radians(4 * angle))) / 4 for angle in (36, 27, 18, 9)],
    3: [0.38, ALONG_DIAGONAL, 0.54, 0.63, 0.75, ALONG_AXIS],
}

# Single precision leaves a relative error of some 1e-7 in amplitude, 1e-14 in power, on every mode.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Box:
    """A periodic box: `size` cells per side, `length` of a side in Mpc/h, or None where it is not known."""

    size: int
    length: float | None
    linear_theory: bool = False
    """Whether `linear_theory_ratio` holds for simulations like these."""
    max_wavenumber: float = np.inf
    """The cubes were filtered: modes of larger n hold rounding errors alone, and belong to no bin."""

    @property
    def side(self) -> float:
        """Length of a side in Mpc/h, or 2 pi where it is not known."""
        return self.length or 2 * np.pi

    @property
    def fundamental(self) -> float:
        """The smallest wavenumber, in h/Mpc, or 1 where the length is not known."""
        return 2 * np.pi / self.side

    @property
    def large_scales(self) -> int:
        """The largest n, but at least 4, at which linear theory predicts a difference: k < 0.0049 h/Mpc."""
        return max(4, int(0.00491 / self.fundamental)) if self.linear_theory and self.length else 4

    @property
    def unit(self) -> str:
        """Unit of a wavenumber."""
        return "h/Mpc" if self.length else "waves per box"


def wave_vectors(size: int, dimensions: int) -> Tensor:
    """Integer wave vectors n of a real transform over `dimensions` axes: (dimensions, N, ..., N // 2 + 1)."""
    components = [torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)] * (dimensions - 1)
    components.append(torch.arange(size // 2 + 1, dtype=torch.float64))
    return torch.stack(torch.meshgrid(*components, indexing="ij"))


def wavenumber(vectors: Tensor) -> Tensor:
    """|n| of wave vectors (dimensions, ...): (...)."""
    return vectors.square().sum(0).sqrt()


def mu4(vectors: Tensor) -> Tensor:
    """The direction sum_i n_i^4 / n^4 of wave vectors (dimensions, ...): (...), and 1 for n = 0."""
    squares = vectors.square()
    total = squares.sum(0)
    return torch.where(total > 0, squares.square().sum(0) / total.clamp(min=1).square(), 1.0)


def mirror_coherence(field: Tensor) -> Floats:
    """Coherence of the mirror modes (n_1, n_2) and (n_1, -n_2) in each plane n_i = 0 of a cube: (3,).

    For axis i, the mean of Re delta(n_1, n_2) delta*(n_1, -n_2) over n_1, n_2 > 0 and n <= N/2, with delta
    divided by its root mean square at the same n: 0 for a homogeneous random field, 1 for one symmetric under
    the reflection of its second axis.
    """
    size = field.shape[-1]
    n = wavenumber(wave_vectors(size, 2)[:, : size // 2 + 1])[1 : size // 2, 1 : size // 2]
    shell = n.round().long()
    inside = shell <= size // 2
    coherence = []
    for axis in range(3):
        modes = torch.fft.fft2(field.double().mean(axis)).cpu()
        # delta(-n_1, n_2) is the complex conjugate of delta(n_1, -n_2)
        here, mirror = modes[1 : size // 2, 1 : size // 2], modes.flip(0)[: size // 2 - 1, 1 : size // 2]
        power = (here.abs().square() + mirror.abs().square())[inside] / 2
        count = torch.bincount(shell[inside])
        mean = (torch.bincount(shell[inside], power) / count.clamp(min=1))[shell[inside]]
        product = (here * mirror).real[inside]
        known = mean > NEGLIGIBLE * mean.mean()
        coherence.append(float((product[known] / mean[known]).mean()) if known.any() else 0.0)
    return np.array(coherence)


def fold_power(fields: Tensor, dimensions: int) -> Tensor:
    """|delta_k|^2 of real fields, summed over the modes (+-n_1, ..., +-n_d).

    `fields` is (b, N, ..., N) with even N, on any device. The result (b, N // 2 + 1, ..., N // 2 + 1) is
    float64 on the host, where the order of the additions, and so the last bit, is always the same.
    """
    size = fields.shape[-1]
    half = size // 2
    transform = torch.fft.rfftn(fields, dim=tuple(range(-dimensions, 0)))
    power = torch.view_as_real(transform).square().sum(-1).cpu()
    for axis in range(1, dimensions):
        folded = power.narrow(axis, 0, half + 1).double()
        mirrored = power.narrow(axis, half + 1, half - 1).flip(axis)
        folded.narrow(axis, 1, half - 1).add_(mirrored)
        power = folded
    power[..., 1:half] *= 2  # a real transform leaves out the mirror images along the last axis
    return power


class ModeBins:
    """A partition of the modes of a field into bins.

    Attributes, each (bins,): `modes`, the number of modes, and so of independent real numbers; `n`, the mean
    wavenumber over them in units of the fundamental mode; `mu4`, their mean direction.
    """

    def __init__(self, box: Box, dimensions: int, label: Tensor) -> None:
        """`label` (N // 2 + 1, ..., N // 2 + 1) holds an integer for each |n_1|, ..., |n_d|.

        Modes of equal label form a bin, and bins are in ascending order of labels. Negative labels exclude
        modes.
        """
        self.box = box
        self.dimensions = dimensions
        vectors = _absolute_wave_vectors(box.size, dimensions)
        label = torch.where(wavenumber(vectors) <= box.max_wavenumber, label, -1).flatten()
        included = (label >= 0).nonzero()[:, 0].numpy()
        names, index = label[included].unique(return_inverse=True)
        # scipy's sparse product adds in the order of the modes, so that the last bit never changes
        self._members = csr_array(
            (np.ones(len(included)), (index.numpy(), included)), shape=(len(names), len(label))
        )
        count = _mode_count(box.size, dimensions).flatten()
        self.modes = self._sum(count[None])[0]
        self.n = self._sum((count * wavenumber(vectors).flatten())[None])[0] / self.modes
        self.mu4 = self._sum((count * mu4(vectors).flatten())[None])[0] / self.modes

    def __len__(self) -> int:
        return len(self.modes)

    @property
    def inside_nyquist(self) -> Bools:
        """Bins within the Nyquist sphere n = N/2, corners left out: (bins,)."""
        return self.n < self.box.size / 2 + 0.5

    def average(self, folded: Tensor) -> Floats:
        """P(k) (b, bins) from the result of `fold_power`."""
        factor = self.box.side**self.dimensions / self.box.size ** (2 * self.dimensions)
        return self._sum(folded.flatten(1)) * (factor / self.modes)

    def power(self, fields: Tensor) -> Floats:
        """P(k) (b, bins) of fields (b, N, ..., N)."""
        return self.average(fold_power(fields, self.dimensions))

    def project(self, power: Floats, slices: ModeBins) -> Floats:
        """P(k) (b, bins of `slices`) of the slices of cubes that have P(k) (b, bins) in these bins.

        A mode of a slice is a sum over the cube's modes that have its n_1 and n_2, so with L the side

            P_slice(n_1, n_2) = 1/L sum over n_3 of P_cube(n_1, n_2, n_3).
        """
        modes = torch.from_numpy(self._members.T @ power.T).T
        modes = modes.reshape(-1, *[self.box.size // 2 + 1] * 3)
        projected = modes.sum(-1) + modes[..., 1:-1].sum(-1)  # n_3 and -n_3
        # back to the sum over signs that `average` divides by the number of modes
        count = _mode_count(self.box.size, 2) * (self.box.size**4 / self.box.side**3)
        return slices.average(projected * count)

    def _sum(self, values: Tensor) -> Floats:
        return (self._members @ values.numpy().T).T


def shells(box: Box, dimensions: int) -> ModeBins:
    """Isotropic: shells of width one around n = 1, ..., N/2; the corners of Fourier space are left out."""
    shell = wavenumber(_absolute_wave_vectors(box.size, dimensions)).round().long()
    return ModeBins(box, dimensions, torch.where((shell > 0) & (shell <= box.size // 2), shell, -1))


def directions(box: Box, dimensions: int) -> ModeBins:
    """Shells in n, corners included, each in 5 (slices) or 7 (cubes) bins of direction.

    The bins are symmetric under the flips and quarter-turns of the grid. Shells have width one up to n = 32,
    then n/16, and one of them ends at N/2.
    """
    vectors = _absolute_wave_vectors(box.size, dimensions)
    radial = torch.bucketize(wavenumber(vectors), torch.tensor(shell_edges(box.size, dimensions)).double())
    bounds = torch.tensor(_DIRECTIONS[dimensions]).double()
    label = radial * (len(bounds) + 1) + torch.bucketize(mu4(vectors), bounds)
    return ModeBins(box, dimensions, torch.where(radial > 0, label, -1))


def shell_edges(size: int, dimensions: int) -> list[float]:
    """Bounds in n of the shells of `directions`, from 0.5 through N/2 + 0.5 to the end of the corners."""
    edges, nyquist = [0.5], size / 2 + 0.5
    while edges[-1] < np.sqrt(dimensions) * size / 2:
        edge = edges[-1] + max(1, edges[-1] // 16)
        edges.append(nyquist if edges[-1] < nyquist < edge else edge)
    return edges


def symmetry_classes(box: Box) -> ModeBins:
    """Modes of slices that the 8 symmetries of the square map onto each other: the finest such partition.

    The first bin is the mean of a slice, n = 0, which holds the waves of the cube perpendicular to it.
    """
    vectors = _absolute_wave_vectors(box.size, 2).long()
    return ModeBins(box, 2, vectors.amax(0) * box.size + vectors.amin(0))


def equal_wavenumbers(box: Box, dimensions: int) -> ModeBins:
    """Modes of exactly equal n, corners included: the finest isotropic partition.

    The first bin of slices is their mean. The mean of a cube is left out: it identifies the gravity of a
    gevolution run, but it is set by the code and not by the physics.
    """
    squared = _absolute_wave_vectors(box.size, dimensions).square().sum(0).round().long()
    return ModeBins(box, dimensions, squared if dimensions == 2 else torch.where(squared > 0, squared, -1))


def planes(box: Box) -> ModeBins:
    """Modes of cubes with n_i = 0 for one axis i alone, in shells of width one from n = 5 to N/2.

    The bins of axis 0 come first, then those of axes 1 and 2, which hold the same modes with permuted axes.
    """
    vectors = _absolute_wave_vectors(box.size, 3)
    shell = wavenumber(vectors).round().long()
    perpendicular = (vectors == 0).long()
    chosen = (perpendicular.sum(0) == 1) & (shell >= 5) & (shell <= box.size // 2)
    return ModeBins(box, 3, torch.where(chosen, perpendicular.argmax(0) * box.size + shell, -1))


def slice_partitions(box: Box) -> dict[str, ModeBins]:
    """The partitions of a slice's modes that baselines and ceilings use, by name.

    At N = 256 the last two have 8385 and 5924 bins: average them or apply a likelihood ratio batch by batch,
    instead of keeping them for every slice.
    """
    return {
        "isotropic": shells(box, 2),
        "directional": directions(box, 2),
        "symmetry": symmetry_classes(box),
        "wavenumbers": equal_wavenumbers(box, 2),
    }


def cube_partitions(box: Box) -> dict[str, ModeBins]:
    """The partitions of a cube's modes that baselines, ceilings and lattice diagnostics use, by name."""
    return {
        "isotropic": shells(box, 3),
        "directional": directions(box, 3),
        "wavenumbers": equal_wavenumbers(box, 3),
        "planes": planes(box),
    }


def spectra(fields: Tensor, partitions: Mapping[str, ModeBins]) -> dict[str, Floats]:
    """P(k) (b, bins) of fields (b, N, ..., N) in several partitions, by name, from one Fourier transform."""
    dimensions = next(iter(partitions.values())).dimensions
    folded = fold_power(fields, dimensions)
    return {name: bins.average(folded) for name, bins in partitions.items()}


def measurable(power: Floats, modes: Floats) -> Bools:
    """Bins whose power stands out from rounding errors: (bins,).

    `power` (samples, bins) and `modes` (bins,). Removed modes hold no power, or 1e-14 of the mean over all
    modes as the rounding error of single precision; bins below 1e-12 of it are False.
    """
    mean = power.mean(0)
    return mean > NEGLIGIBLE * (mean @ modes) / modes.sum()


def _absolute_wave_vectors(size: int, dimensions: int) -> Tensor:
    """|n_1|, ..., |n_d| in the layout of `fold_power`: (dimensions, N // 2 + 1, ..., N // 2 + 1)."""
    components = [torch.arange(size // 2 + 1, dtype=torch.float64)] * dimensions
    return torch.stack(torch.meshgrid(*components, indexing="ij"))


def _mode_count(size: int, dimensions: int) -> Tensor:
    """Number of modes (+-n_1, ..., +-n_d) in the layout of `fold_power`."""
    vectors = _absolute_wave_vectors(size, dimensions)
    return torch.where((vectors > 0) & (vectors < size // 2), 2.0, 1.0).double().prod(0)
