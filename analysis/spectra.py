"""Power spectra of slices and cubes, and slices whose scales were taken away or exchanged.

A field of N cells per side in a periodic box of side L has the modes k = 2 pi n / L with integer vectors n.
With delta_k the discrete Fourier transform of the field, the power spectrum is

    P(k) = L^d / N^(2d) * <|delta_k|^2>   over the modes with |n| in a ring (d = 2) or shell (d = 3),

in (Mpc/h)^d for L in Mpc/h and a field without units, so that the sum of P(k) / L^d over all modes but k =
0 is the variance (e.g. Peacock 1999, Cosmological Physics, section 16.2). Where the box is not known, L = 2
pi and k counts waves per box.

A slice is cut from a cube: its k is the component in the plane of the slice, and it holds power of all cube
modes whose projection that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Box:
    """A periodic box: `size` cells per side, `length` of a side in Mpc/h, or None where it is not known."""

    size: int
    length: float | None

    @property
    def side(self) -> float:
        """Length of a side in Mpc/h, or 2 pi where it is not known."""
        return self.length or 2 * np.pi

    @property
    def fundamental(self) -> float:
        """The smallest wavenumber, in h/Mpc or waves per box."""
        return 2 * np.pi / self.side

    @property
    def unit(self) -> str:
        """Unit of a wavenumber."""
        return "h/Mpc" if self.length else "waves per box"

    @cached_property
    def shells(self) -> Floats:
        """Wavenumbers in the middle of the shells of `PowerSpectrum`: (N // 2,)."""
        return self.fundamental * np.arange(1.0, self.size // 2 + 1)


def wave_lengths(size: int, dimensions: int) -> Tensor:
    """|n| of every mode of a real transform over the last `dimensions` axes: (N, ..., N, N // 2 + 1)."""
    waves = [torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)] * (dimensions - 1)
    waves.append(torch.arange(size // 2 + 1, dtype=torch.float64))
    grids = torch.meshgrid(*waves, indexing="ij")
    return torch.stack([grid**2 for grid in grids]).sum(0).sqrt()


class PowerSpectrum:
    """P(k) of fields with `dimensions` axes of `box`: shells of width one around |n| = 1, ..., N/2."""

    def __init__(self, box: Box, dimensions: int) -> None:
        self.dimensions = dimensions
        lengths = wave_lengths(box.size, dimensions)
        # modes with 0 < n_last < N/2 stand for themselves and for their mirror image
        mirrored = torch.full((box.size // 2 + 1,), 2.0, dtype=torch.float64)
        mirrored[0] = mirrored[-1] = 1
        weight = mirrored.expand(lengths.shape).flatten()
        shell = lengths.round().long().flatten()
        self._shells = box.size // 2
        # the mean (shell 0) and the corners beyond N/2 go to a last shell that is dropped
        shell = torch.where((shell == 0) | (shell > self._shells), self._shells + 1, shell) - 1
        modes = torch.zeros(self._shells + 1, dtype=torch.float64).index_add_(0, shell, weight)
        factor = box.side**dimensions / box.size ** (2 * dimensions)
        self._shell = shell
        self._weight = weight
        self._scale = (factor / modes)[:-1]

    def __call__(self, fields: Tensor) -> Tensor:
        """Fields (b, N, ..., N) -> P(k) (b, N // 2), float64, on the host."""
        axes = tuple(range(-self.dimensions, 0))
        waves = torch.view_as_real(torch.fft.rfftn(fields, dim=axes)).flatten(1, -2)
        # summed on the host, where the order of the additions, and so the last bit, is always the same
        power = waves.square().sum(-1).cpu() * self._weight
        sums = torch.zeros(len(power), self._shells + 1, dtype=torch.float64)
        return sums.index_add_(1, self._shell, power)[:, :-1] * self._scale


@dataclass(frozen=True)
class Bands:
    """Bands of |n| that share out all modes of a slice: [edges[i], edges[i + 1]), the first only its mean."""

    edges: tuple[float, ...]  # in waves per box

    @classmethod
    def logarithmic(cls, size: int, bands: int = 12) -> Bands:
        """About `bands` bands of equal width in log k, whole rings each; the last takes the corners too."""
        rings = np.unique(np.geomspace(1, size // 2 + 1, bands + 1).round())
        return cls((0.0, *(rings - 0.5)[:-1].tolist(), float(np.ceil(size / np.sqrt(2)) + 1)))

    def __len__(self) -> int:
        return len(self.edges) - 1

    def centres(self, box: Box) -> Floats:
        """Wavenumbers in the middle of the bands, of the last up to the Nyquist frequency."""
        ends = np.minimum(self.edges[1:], box.size / 2 + 0.5)
        return np.sqrt(ends[:-1] * ends[1:]) * box.fundamental

    def cuts(self, box: Box) -> Floats:
        """Wavenumbers of the edges between bands: low pass keeps what is below, high pass the rest."""
        return np.array(self.edges[1:-1]) * box.fundamental

    def parts(self, slices: Tensor) -> Iterator[Tensor]:
        """What each band contributes to slices (..., N, N); the parts add up to the slices."""
        size = slices.shape[-1]
        waves = torch.fft.rfft2(slices)
        lengths = wave_lengths(size, 2)
        for low, high in pairwise(self.edges):
            inside = ((lengths >= low) & (lengths < high)).to(slices.device)  # MPS has no float64
            yield torch.fft.irfft2(waves * inside, s=(size, size))


INTERVENTIONS = ("low_pass", "high_pass", "exchange")


def interventions(newton: Tensor, gr: Tensor, bands: Bands) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Twin slices (b, C, N, N) changed in one way at a time: (kind, newton, gr), by ascending k within a
    kind.

    `low_pass` keeps what is below each edge between bands, `high_pass` the rest, `exchange` gives each twin
    the modes of one band of the other (the first: the mean).
    """
    low, low_gr = torch.zeros_like(newton), torch.zeros_like(gr)
    for band, (part, part_gr) in enumerate(zip(bands.parts(newton), bands.parts(gr), strict=True)):
        yield "exchange", newton - part + part_gr, gr - part_gr + part
        low, low_gr = low + part, low_gr + part_gr
        if band < len(bands) - 1:
            yield "low_pass", low, low_gr
            yield "high_pass", newton - low, gr - low_gr


def scan(network: Network, newton: Tensor, gr: Tensor, bands: Bands) -> dict[str, Tensor]:
    """Logits of twins (b, C, N, N) after each intervention: kind -> (2 b, cuts or bands), Newton first."""
    logits: dict[str, list[Tensor]] = {kind: [] for kind in INTERVENTIONS}
    for kind, *changed in interventions(newton, gr, bands):
        logits[kind].append(network(torch.cat(changed)))
    return {kind: torch.stack(columns, dim=1) for kind, columns in logits.items()}
