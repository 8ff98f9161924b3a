"""Whitening of slices by an isotropic power spectrum."""

from __future__ import annotations

from system import UserError

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Relative to the mean power. Single precision leaves 1e-7 in amplitude on modes that a filter removed.
NEGLIGIBLE = 1e-12


class Whitening(nn.Module):
    """Divides the modes of a slice by sqrt P(n), so that all scales have the same variance.

    The potential has a steep spectrum: its variance lies at n <= 3, most of its modes at high n. `power` has
    the spectra of slices perpendicular to array axes 0, 1 and 2, None for an axis without one (the mean of
    the others is used), or is one spectrum for all axes. A spectrum, or one for each field, is P(n) at
    n = 0, ..., N/2 - 1 as `isotropic_power` measures it; n is the wavenumber in units of the fundamental
    mode, rounded to an integer. The mean of a slice (n = 0) is removed, and so are modes with n >= N/2,
    where not all directions are sampled, and modes that hold nothing but rounding errors.

    Raises UserError if no mode is left.
    """

    gain: Tensor
    """1 / sqrt P for each mode of `rfft2`, by axis: (3, fields, N, N/2 + 1)."""

    def __init__(self, power: Tensor | Sequence[Any]) -> None:
        super().__init__()
        known = [spectrum for spectrum in power if isinstance(spectrum, Sequence)]
        self.by_axis = bool(known)
        mean = torch.as_tensor(known, dtype=torch.float64).mean(0) if known else power
        spectra = [mean if spectrum is None else spectrum for spectrum in power] if known else [mean] * 3
        self.register_buffer("gain", torch.stack([_gain(p) for p in spectra]), persistent=False)

    def forward(self, slices: Tensor, axes: Tensor | int = 0) -> Tensor:
        """Slices (b, C, N, N) perpendicular to `axes`, (b,) or the same for all -> whitened, in float32."""
        modes = torch.fft.rfft2(slices.float())  # there is no FFT in bfloat16
        fields = modes.unflatten(1, (self.gain.shape[1], -1)) * self.gain[axes].unsqueeze(-3)
        return torch.fft.irfft2(fields.flatten(1, 2), s=slices.shape[-2:])


def _gain(power: Tensor | Sequence[Any]) -> Tensor:
    spectra = torch.atleast_2d(torch.as_tensor(power, dtype=torch.float64))
    half = spectra.shape[1]
    shells = _shells(2 * half)
    inside = (shells > 0) & (shells < half)
    of_modes = spectra[:, shells.clamp(max=half - 1)]
    negligible = NEGLIGIBLE * of_modes.mean((1, 2), keepdim=True)
    gain = torch.where(inside & (of_modes > negligible), of_modes.rsqrt(), 0.0)
    if not gain.flatten(1).any(1).all():
        raise UserError(
            "whitening: the training slices have no power. Set data_params.whiten to none, or use other data."
        )
    return gain.float()


def isotropic_power(slices: Tensor) -> Tensor:
    """Isotropic power spectrum of slices (b, C, N, N): P(n) at n = 0, ..., N/2 - 1, float64.

    P(n) is the mean of |x_k|^2 / N^2 over slices, channels and all modes with round(|k|) = n, in units of the
    fundamental mode. White noise of variance 1 has P = 1.
    """
    size = slices.shape[-1]
    modes = torch.fft.rfft2(slices.float())
    power = (modes.real.square() + modes.imag.square()).mean((0, 1), dtype=torch.float64) / size**2
    # rfft2 returns one mode of each conjugate pair, except in the columns 0 and N/2, which hold both.
    multiplicity = torch.full_like(power, 2.0)
    multiplicity[:, [0, -1]] = 1.0
    shells = _shells(size).to(slices.device).flatten()
    total = torch.bincount(shells, (multiplicity * power).flatten())
    return (total / torch.bincount(shells, multiplicity.flatten()))[: size // 2]


def _shells(size: int) -> Tensor:
    """Wavenumber of each mode of `rfft2`, rounded to an integer: (size, size/2 + 1)."""
    rows, columns = torch.fft.fftfreq(size, 1 / size), torch.fft.rfftfreq(size, 1 / size)
    return torch.hypot(rows[:, None], columns).round().long()
