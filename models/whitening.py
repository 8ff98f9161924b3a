"""Whitening of slices by an isotropic power spectrum."""

from __future__ import annotations

from system import UserError

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Whitening(nn.Module):
    """Divides the modes of a slice by sqrt P(n), so that all scales have the same variance.

    The potential has a steep spectrum: its variance lies at n <= 3, most of its modes at high n. `power` is
    P(n) at n = 0, ..., N/2 - 1 as `isotropic_power` measures it; n is the wavenumber in units of the
    fundamental mode, rounded to an integer. The mean of a slice (n = 0) is removed, and so are modes with
    n >= N/2, where not all directions are sampled.

    Raises UserError if a shell n >= 1 has no positive, finite power.
    """

    gain: Tensor

    def __init__(self, power: Tensor | Sequence[float]) -> None:
        super().__init__()
        power = torch.as_tensor(power, dtype=torch.float64)
        invalid = [n for n, p in enumerate(power.tolist()) if n > 0 and not 0 < p < float("inf")]
        if invalid:
            raise UserError(
                f"whitening: the power spectrum is {power[invalid[0]]:g} at n = {invalid[0]} "
                f"({len(invalid)} of {len(power)} shells are not positive and finite).\n"
                "Set data_params.whiten to none, or use data with structure on all scales."
            )
        size = 2 * len(power)
        shells = _shells(size)
        kept = (shells > 0) & (shells < len(power))
        gain = torch.where(kept, power[shells.clamp(max=len(power) - 1)].rsqrt(), 0.0)
        self.register_buffer("gain", gain.float(), persistent=False)

    def forward(self, slices: Tensor) -> Tensor:
        """Slices (b, C, N, N) -> whitened slices of the same shape in float32."""
        modes = torch.fft.rfft2(slices.float())  # there is no FFT in bfloat16
        return torch.fft.irfft2(modes * self.gain, s=slices.shape[-2:])


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
