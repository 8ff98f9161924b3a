"""LYNX: a linear classifier on the log powers of learned filters."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from models.layers import NetworkSettings

KERNEL = 9  # cells along the side of a filter


class Lynx(nn.Module):
    """For width L: (C, N, N) -> power of each of L filters of 9 x 9 -> logarithm, normalized -> 1 logit.

    The power of a filter w is the mean over the slice of (w * x)^2, the square of their convolution.

    For Gaussian fields the log likelihood ratio of General Relativity to Newtonian gravity,

        Lambda = sum over modes k of 1/2 [ |x_k|^2 (1/P_N - 1/P_GR) - ln(P_GR / P_N) ],

    is the optimal statistic (Tegmark, Taylor & Heavens 1997, ApJ 480, 22). It is linear in the |x_k|^2. So is
    the power of a filter: with periodic boundaries it is sum_k |w_k|^2 |x_k|^2 / N^4 (Parseval's theorem),
    the power in a learned band of wavenumber and direction. The logarithm turns an amplitude that a whole
    slice shares into a constant, which the linear layer can cancel. Bruna & Mallat (2013, IEEE TPAMI 35,
    1872) average moduli of wavelet responses in the same way, with fixed filters.

    Filters of 9 cells do not resolve waves much longer than that. So the same filters act at every octave
    from N down to 64 cells per side: on the slice, on its modes with |n_i| < N/4 sampled at N/2 cells, and so
    on. The largest covers the same part of the box at every N; at N = 64 there is one octave.

    `dropout` acts on the log powers. The square is the only nonlinearity: every `activation` gives the same
    network. With `circular` padding the logit does not change under periodic shifts of the slice, and
    the powers are computed in Fourier space, which costs one FFT per channel. With `zeros` they are computed
    by convolution, of averages over 2, 4, ... cells at further octaves, which takes far longer and L times
    the memory of the slices.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        width, mode, self.octaves = settings.layer_param, settings.padding, settings.octaves
        self.filters = nn.Conv2d(
            settings.channels, width, KERNEL, padding=KERNEL // 2, padding_mode=mode, bias=False
        )
        powers = self.octaves * width
        # The variance of a log power is about 2 / modes: at N = 256 the default eps of 1e-5 would matter.
        self.normalization = nn.BatchNorm1d(powers, eps=1e-8, affine=False)
        self.classifier = nn.Sequential(nn.Dropout(settings.dropout), nn.Linear(powers, 1))

    def forward(self, slices: Tensor) -> Tensor:
        """Slices (b, C, N, N) -> logits (b,); positive means General Relativity."""
        # Twins differ by a percent in power: bfloat16 resolves 0.4 %, and its FFT does not exist.
        with torch.autocast(slices.device.type, enabled=False):
            power = self.filter_power(slices.float())
            # A constant slice may have no power at all.
            log_power = power.clamp(min=torch.finfo(power.dtype).tiny).log()
            return self.classifier(self.normalization(log_power)).squeeze(1)

    def filter_power(self, slices: Tensor) -> Tensor:
        """Mean of the squared response of each filter at each octave: (b, C, N, N) -> (b, octaves L)."""
        if self.filters.padding_mode == "circular":
            return fourier_power(slices, self.filters.weight, self.octaves)
        averages = [slices, *(nn.functional.avg_pool2d(slices, 2**j) for j in range(1, self.octaves))]
        return torch.cat([self.filters(average).square().mean((2, 3)) for average in averages], dim=1)


def fourier_power(slices: Tensor, filters: Tensor, octaves: int = 1) -> Tensor:
    """Mean square of the circular convolution of slices with filters, by Parseval's theorem.

    Slices (b, C, N, N) and filters (L, C, K, K), K <= N, give powers (b, octaves L). At octave j the slices
    are reduced to the modes with |n_i| < M/2 and sampled at M = N / 2^j cells per side.
    """
    size, modes, powers = slices.shape[-1], torch.fft.rfft2(slices), []
    for octave in range(octaves):
        cells = size >> octave
        kept = None if octave == 0 else cells // 2
        column = torch.arange(cells // 2 + 1, device=slices.device)[:kept]
        # rfft2 returns one mode of each conjugate pair, except in the columns 0 and N/2, which hold both.
        multiplicity = torch.where((column == 0) | (2 * column == cells), 1.0, 2.0)
        weighted = _cross_spectra(modes, kept) * (multiplicity / size**4)
        responses = _cross_spectra(torch.fft.rfft2(filters, s=(cells, cells)), kept)
        powers.append(weighted.flatten(1) @ responses.flatten(1).T)
    return torch.cat(powers, dim=1)


def _cross_spectra(modes: Tensor, kept: int | None) -> Tensor:
    """|x_c|^2 of each channel and sqrt(2) x_c conj(x_d), real and imaginary, of each pair c < d of channels.

    Modes (b, C, N, N/2 + 1) give (b, C^2, N, N/2 + 1), or only those with |n_i| < `kept`. The sum over
    dimension 1 of the products of two such arrays, x and w, is |sum_c w_c x_c|^2, the squared response of a
    filter.
    """
    real, imag = modes.real, modes.imag  # torch.compile and ONNX support little complex arithmetic
    if kept is not None:
        real, imag = (
            torch.cat([part[..., :kept, :kept], part[..., 1 - kept :, :kept]], dim=2) for part in (real, imag)
        )
    spectra = [real.square() + imag.square()]
    for c, d in combinations(range(modes.shape[1]), 2):
        cross_real = real[:, c] * real[:, d] + imag[:, c] * imag[:, d]
        cross_imag = imag[:, c] * real[:, d] - real[:, c] * imag[:, d]
        spectra.append(2**0.5 * torch.stack([cross_real, cross_imag], dim=1))
    return torch.cat(spectra, dim=1)
