"""Degraded slices: what each degradation does to known modes, and bad settings."""

from system import UserError

import numpy as np
import pytest
import simulated_universe as universe
import torch

from analysis import robustness

BOX = universe.BOX
SIZE = universe.SIZE


def wave(n: int) -> torch.Tensor:
    x = torch.arange(SIZE) / SIZE * 2 * torch.pi
    return torch.cos(n * x).expand(1, 1, SIZE, SIZE) + 0.5


def test_filters_act_on_the_modes_they_name() -> None:
    kinds = robustness.degradations(BOX, 160.0, 0.1)
    k = 2 * np.pi * 5 / 5120
    smoothed = kinds["smoothed"](wave(5), 0)
    expected = (wave(5) - 0.5) * np.exp(-((k * 160) ** 2) / 2) + 0.5
    torch.testing.assert_close(smoothed, expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kinds["large_scales"](wave(16), 0), wave(16), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        kinds["large_scales"](wave(17), 0), torch.full((1, 1, SIZE, SIZE), 0.5), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(kinds["mean_removed"](wave(5), 0), wave(5) - 0.5, atol=1e-5, rtol=1e-4)


def test_noise_has_its_level_and_depends_on_the_seed_alone() -> None:
    noisy = robustness.degradations(BOX, 160.0, 0.3)["noisy"]
    clean = torch.zeros(8, 1, SIZE, SIZE)
    assert float(noisy(clean, 1).std()) == pytest.approx(0.3, rel=0.02)
    torch.testing.assert_close(noisy(clean, 1), noisy(clean, 1), atol=0, rtol=0)
    assert not torch.equal(noisy(clean, 1), noisy(clean, 2))


def test_random_phases_keep_every_power_spectrum_and_the_mean() -> None:
    random_phases = robustness.degradations(BOX, 160.0, 0.1)["random_phases"]
    slices = torch.randn(4, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).exp()
    changed = random_phases(slices, 1)
    before, after = torch.fft.rfft2(slices), torch.fft.rfft2(changed)
    torch.testing.assert_close(after.abs(), before.abs(), atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(changed.mean((2, 3)), slices.mean((2, 3)), atol=1e-5, rtol=1e-5)
    cross = [modes[:, 0] * modes[:, 1].conj() for modes in (before, after)]
    torch.testing.assert_close(*cross, atol=1, rtol=1e-3)
    turned = (after / before)[:, 0, 1:5, 1:5].angle().flatten()
    assert -3 < turned.mean() / (np.pi / np.sqrt(3 * len(turned))) < 3, "uniform"
    assert turned.std() == pytest.approx(np.pi / np.sqrt(3), rel=0.15)
    skewness = [((f - f.mean()) ** 3).mean() / f.std() ** 3 for f in (slices, changed)]
    assert skewness[0] > 3
    assert abs(skewness[1]) < 0.5
    torch.testing.assert_close(random_phases(slices, 1), changed, atol=0, rtol=0)
    assert not torch.equal(random_phases(slices, 2), changed)


def test_settings_have_defaults_of_two_cells_and_a_tenth() -> None:
    assert robustness.parse([], BOX) == (160.0, 0.1)
    assert robustness.parse(["smoothing=50", "noise=0.5"], BOX) == (50.0, 0.5)


@pytest.mark.parametrize("setting", ["blur=3", "noise=-1", "noise=much", "smoothing", "smoothing=inf"])
def test_bad_settings_are_rejected(setting: str) -> None:
    with pytest.raises(UserError, match="allowed: smoothing=R in Mpc/h and noise=LEVEL") as error:
        robustness.parse([setting], BOX)
    assert f"'{setting}'" in str(error.value)


def test_the_table_shows_what_each_degradation_costs() -> None:
    cubes = {seed: universe.twins(seed, universe.band) for seed in range(3)}
    kinds = robustness.degradations(BOX, 160.0, 0.1)

    def network(slices: torch.Tensor, axes: object = None) -> torch.Tensor:
        """The variance of the modes beyond N/4, which the second degradation removes."""
        return (slices - kinds["large_scales"](slices, 0)).square().mean((1, 2, 3)).round(decimals=6)

    ids, logits = robustness.measure(network, universe.batches(cubes), kinds)
    with torch.no_grad():
        unchanged = torch.cat([network(batch.images) for batch in universe.batches(cubes)]).double().numpy()
    predictions = universe.label_predictions(ids, unchanged)
    found = robustness.summarize(predictions, logits, kinds, 160.0, 0.1)
    assert found["mean_removed"]["change"]["value"] == pytest.approx(0, abs=1e-3)
    assert found["large_scales"]["auc"]["value"] == 0.5
    change = found["large_scales"]["auc"]["value"] - found["none"]["auc"]["value"]
    assert found["large_scales"]["change"]["value"] == pytest.approx(change)
