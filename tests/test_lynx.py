"""LYNX: the definition of its powers, its invariance, and what it learns."""

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import models
from models import export
from models.lynx import Lynx, fourier_power


def lynx(**options: object) -> Lynx:
    settings = {"architecture": "LYNX", "layer_param": 6, "dropout": 0.0, "size": 64, "padding": "circular"}
    network = models.build_model(**(settings | options))
    assert isinstance(network, Lynx)
    return network


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_fourier_powers_are_those_of_the_convolution(channels: int) -> None:
    convolution = lynx(channels=channels).filters
    slices = randn(4, channels, 64, 64) + 0.3  # the mean of a slice counts too
    expected = convolution(slices).square().mean((2, 3))
    powers = fourier_power(slices, convolution.weight)
    torch.testing.assert_close(powers, expected, rtol=1e-5, atol=0.0)
    gradients = [torch.autograd.grad(p.log().sum(), convolution.weight)[0] for p in (expected, powers)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_octaves_are_the_same_filters_on_slices_with_fewer_cells(size: int) -> None:
    network, coarse = lynx(size=size), randn(4, 1, 64, 64)
    modes = torch.fft.fftshift(torch.fft.fft2(coarse))
    modes[..., 0, :], modes[..., 0] = 0, 0  # 64 cells do not determine the modes |n_i| = 32
    margin = (size - 64) // 2
    padded = nn.functional.pad(modes, (margin, margin, margin, margin))
    fine = torch.fft.ifft2(torch.fft.ifftshift(padded)).real * (size / 64) ** 2
    expected = fourier_power(torch.fft.ifft2(torch.fft.ifftshift(modes)).real, network.filters.weight)
    powers = network.filter_power(fine)
    assert powers.shape == (4, 6 * {64: 1, 128: 2, 256: 3}[size])
    torch.testing.assert_close(powers[:, -6:], expected, rtol=1e-4, atol=1e-6)
    assert lynx(size=size, padding="zeros")(fine).shape == (4,)


def test_zero_padding_does_not_wrap_around() -> None:
    network = lynx(padding="zeros")
    slices = torch.zeros(1, 1, 64, 64)
    slices[..., 0, 0] = 1.0  # in a corner, where a quarter (5 x 5) of each filter lies within the slice
    expected = network.filters.weight[:, 0, :5, :5].square().sum((1, 2)) / 64**2
    torch.testing.assert_close(network.filter_power(slices)[0], expected)


def test_logits_do_not_change_under_periodic_shifts() -> None:
    slices = randn(8, 1, 128, 128)
    network = lynx(size=128)
    logits = network(slices)
    torch.testing.assert_close(network(slices.roll((5, -17), (2, 3))), logits, rtol=1e-3, atol=1e-3)
    assert logits.std() > 0.1


@pytest.mark.parametrize("padding", models.PADDINGS)
def test_autocast_does_not_round_it_and_a_constant_slice_has_a_logit(padding: str) -> None:
    slices = randn(8, 1, 64, 64)
    slices[0] = 0
    network = lynx(padding=padding).eval()
    expected = network(slices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(slices), expected)
    assert expected.isfinite().all()


def anisotropy() -> Tensor:
    """P_GR / P_N (64, 64) of a universe in which it differs by direction alone; its mean over angles is 1."""
    k = torch.fft.fftfreq(64, 1 / 64)
    squared = (k[:, None] ** 2 + k**2).clamp(min=1)
    return 1 + 0.2 * ((k[:, None] ** 4 + k**4) / squared**2 - 0.75)


def twins(pairs: int, seed: int) -> Tensor:
    """White Gaussian slices (2, pairs, 1, 64, 64), of Newton and of GR, that share their phases."""
    modes = torch.fft.fft2(randn(pairs, 1, 64, 64, seed=seed))
    return torch.fft.ifft2(torch.stack([modes, modes * anisotropy().sqrt()])).real


def likelihood_ratio(slices: Tensor) -> Tensor:
    """The optimal statistic of slices (b, 1, 64, 64), up to a constant."""
    return (torch.fft.fft2(slices).abs().square() * (1 - 1 / anisotropy())).sum((1, 2, 3))


def test_it_reaches_the_likelihood_ratio_of_a_planted_anisotropy() -> None:
    torch.manual_seed(0)
    network, slices = lynx(layer_param=8), twins(512, seed=1)
    labels = torch.arange(2.0).repeat_interleave(32)
    steps = 64
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        first = 32 * step % 512
        logits = network(slices[:, first : first + 32].flatten(0, 1))
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    test = twins(512, seed=2).flatten(0, 1)
    labels = torch.arange(2).repeat_interleave(512)
    with torch.inference_mode():
        auc, optimal = (roc_auc_score(labels, f(test)) for f in (network.eval(), likelihood_ratio))
    assert optimal > 0.8
    assert auc > optimal - 0.02


def test_networks_of_earlier_versions_have_one_octave() -> None:
    settings = {"architecture": "LYNX", "layer_param": 4, "size": 256}
    assert export.TrainedNetwork(**settings).network.classifier[1].in_features == 4
    assert models.build_model(**settings).classifier[1].in_features == 12
