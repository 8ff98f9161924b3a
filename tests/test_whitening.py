"""Whitening and the isotropic power spectrum, against direct computations with NumPy."""

from system import UserError

import numpy as np
import pytest
import torch

from models.whitening import Whitening, isotropic_power

SIZE = 64


def red_slices(count: int = 6, channels: int = 2) -> torch.Tensor:
    """Gaussian slices with a steep spectrum, P ~ n^-3, and a mean."""
    generator = np.random.default_rng(0)
    modes = np.fft.fft2(generator.standard_normal((count, channels, SIZE, SIZE)))
    k = np.fft.fftfreq(SIZE, 1 / SIZE)
    amplitude = np.maximum(np.hypot(k[:, None], k), 1) ** -1.5
    return torch.from_numpy(np.fft.ifft2(modes * amplitude).real.astype(np.float32)) + 0.5


def direct_power(slices: torch.Tensor) -> np.ndarray:
    squares = np.abs(np.fft.fft2(slices.double().numpy())) ** 2 / SIZE**2
    k = np.fft.fftfreq(SIZE, 1 / SIZE)
    shells = np.rint(np.hypot(k[:, None], k)).astype(int)
    return np.array([squares[..., shells == n].mean() for n in range(SIZE // 2)])


def test_isotropic_power_is_the_mean_over_shells() -> None:
    slices = red_slices()
    np.testing.assert_allclose(isotropic_power(slices), direct_power(slices), rtol=1e-4)


def test_whitening_divides_every_mode_by_the_square_root_of_its_shell() -> None:
    slices = red_slices()
    power = direct_power(slices)
    modes = np.fft.fft2(slices.double().numpy())
    expected = np.zeros_like(modes)
    for i, y in enumerate(np.fft.fftfreq(SIZE, 1 / SIZE)):
        for j, x in enumerate(np.fft.fftfreq(SIZE, 1 / SIZE)):
            n = round(np.hypot(x, y))
            if 0 < n < SIZE // 2:
                expected[..., i, j] = modes[..., i, j] / np.sqrt(power[n])
    whitened = Whitening(isotropic_power(slices))(slices)
    np.testing.assert_allclose(whitened, np.fft.ifft2(expected).real, atol=1e-4)


def test_every_slice_is_whitened_by_the_spectrum_of_its_axis() -> None:
    slices, power = red_slices(), isotropic_power(red_slices())
    whitening = Whitening([power.tolist(), None, (4 * power).tolist()])
    by_axis = [Whitening(factor * power)(slices) for factor in (1, 2.5, 4)]  # 2.5: the mean of the known
    for axis in range(3):
        torch.testing.assert_close(whitening(slices, axis), by_axis[axis])
    axes = torch.tensor([2, 0, 1, 1, 2, 0])
    expected = torch.stack([by_axis[axis][row] for row, axis in enumerate(axes.tolist())])
    torch.testing.assert_close(whitening(slices, axes), expected)


def test_autocast_memory_format_and_the_type_of_the_spectrum_do_not_change_it() -> None:
    slices = red_slices()
    power = isotropic_power(slices)
    with torch.autocast("cpu", torch.bfloat16):
        whitened = Whitening(power.tolist())(slices.contiguous(memory_format=torch.channels_last))
    assert whitened.dtype == torch.float32
    torch.testing.assert_close(whitened, Whitening(power)(slices))
    assert Whitening(power).state_dict() == {}


def test_a_removed_mode_stays_removed_and_noise_is_not_amplified() -> None:
    modes = torch.fft.rfft2(red_slices().double())
    k = torch.fft.fftfreq(SIZE, 1 / SIZE).double()
    removed = torch.hypot(k[:, None], k[: SIZE // 2 + 1].abs()) > 4
    filtered = torch.fft.irfft2(modes.masked_fill(removed, 0)).float()
    whitened = Whitening(isotropic_power(filtered))(filtered)
    power = torch.fft.rfft2(whitened).abs().square()
    assert power[..., removed].sum() < 1e-9 * power.sum()
    np.testing.assert_allclose(isotropic_power(whitened)[1:5], 1.0, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_slices_without_power_are_rejected(value: float) -> None:
    with pytest.raises(UserError, match="have no power"):
        Whitening(torch.full((32,), value))
