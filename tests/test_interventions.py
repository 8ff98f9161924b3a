"""Interventions on modes, the attribution of the twin difference to them, and degraded slices."""

from system import UserError

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import simulated_universe as universe
import torch

from analysis import interventions
from analysis.interventions import Bands, Degradations
from analysis.power_spectrum import mu4, wave_vectors, wavenumber

SIZE = universe.SIZE
BANDS = Bands(SIZE, (0.0, 0.5, *universe.BAND, 64.0))
VECTORS = wave_vectors(SIZE, 2)
MASKS = interventions.group_masks(wavenumber(VECTORS), mu4(VECTORS), 4)[:-1]


def noise(seed: int) -> torch.Tensor:
    return torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_bands_partition_all_modes(size: int) -> None:
    bands = Bands.logarithmic(size)
    assert bool((bands.masks.sum(0) == 1).all())
    assert 8 <= len(bands.masks) <= 14


def test_groups_partition_all_modes_by_scale_and_direction() -> None:
    masks = MASKS
    assert bool((masks.sum(0) == 1).all())
    vectors = wave_vectors(SIZE, 2)
    n, direction = wavenumber(vectors), mu4(vectors)
    mean, large, axes, between, diagonals = masks
    assert n[mean].tolist() == [0]
    assert n[large].max() == 4
    assert direction[axes].min() > 0.9
    assert direction[diagonals].max() < 0.6
    assert n[axes | between | diagonals].min() > 4
    # as many modes along axes as along diagonals, apart from the edges of the square
    assert axes.sum() / diagonals.sum() == pytest.approx(1, abs=0.35)


def test_components_add_up_and_an_exchange_swaps_one_of_them() -> None:
    newton, gr = noise(0), noise(1)
    parts = list(interventions.components(newton, BANDS.masks))
    torch.testing.assert_close(sum(parts), newton, atol=1e-5, rtol=1e-4)
    other = list(interventions.components(gr, BANDS.masks))
    for band, slices in enumerate(interventions.exchange(newton, gr, BANDS.masks)):
        changed, changed_gr = slices.chunk(2)
        torch.testing.assert_close(changed, newton - parts[band] + other[band], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(changed_gr, gr - other[band] + parts[band], atol=1e-5, rtol=1e-4)


def test_low_and_high_pass_add_up_and_begin_with_the_mean() -> None:
    slices = noise(0)
    changed = list(interventions.filter_bands(slices, BANDS.masks))
    assert len(changed) == len(BANDS.masks) - 1
    for low, high in changed:
        torch.testing.assert_close(low + high, slices)
    mean = slices.mean((2, 3), keepdim=True).expand_as(slices)
    torch.testing.assert_close(changed[0][0], mean, atol=1e-6, rtol=1e-3)


class GroupPower(torch.nn.Module):
    """The weighted variance of a slice in each group of modes."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, slices: torch.Tensor, axes: object = None) -> torch.Tensor:
        """Slices (b, 1, N, N) -> logits (b,)."""
        parts = interventions.components(slices[:, 0], MASKS)
        power = torch.stack([part.square().mean((1, 2)) for part in parts], dim=1)
        return (power * self.weights).sum(1)


def summarize(network: torch.nn.Module, batches: Iterable[universe.Batch]) -> dict[str, dict[str, Any]]:
    columns = interventions.measure(network, batches, BANDS, universe.BOX)
    order = np.argsort(columns[0])
    ids, unchanged, *changed = (column[order] for column in columns)
    predictions = universe.label_predictions(ids, unchanged)
    return interventions.summarize(predictions, changed, BANDS, universe.BOX)


def measure(network: torch.nn.Module) -> tuple[dict[str, Any], list[float]]:
    """Attribution of `network`, and the share of each group in the difference of the twins' variance."""
    cubes = {seed: universe.twins(seed, universe.lattice) for seed in range(3)}
    found = summarize(network, universe.batches(cubes))
    assert found["interventions"]["slices"] == 3 * 2 * 3 * interventions.POSITIONS
    chosen = torch.cat(
        [batch.images[batch.ids % SIZE % 4 == 2] for batch in universe.batches(cubes)]
    ).unflatten(0, (3, 2, -1))[..., 0, :, :]
    parts = [part.square().mean((2, 3, 4)) for part in interventions.components(chosen, MASKS)]
    return found["attribution"], [float((part[:, 1] - part[:, 0]).mean()) for part in parts]


def test_shares_of_an_additive_network_are_its_parts_and_sum_to_one() -> None:
    weights = [0.0, 1.0, -30.0, 5.0, 20.0]
    found, differences = measure(GroupPower(weights))
    parts = np.multiply(weights, differences)
    for name, part in zip(interventions.GROUPS, parts, strict=True):
        assert found[name]["value"] == pytest.approx(part / parts.sum(), abs=2e-3), name
    assert found["remainder"]["value"] == pytest.approx(0, abs=1e-3)
    assert found["difference"]["value"] == pytest.approx(parts.sum(), rel=2e-3)
    assert sum(found[name]["value"] for name in (*interventions.GROUPS, "remainder")) == pytest.approx(1)


def test_the_remainder_measures_interactions() -> None:
    ids = np.array([seed * 6 * SIZE + label * 3 * SIZE for seed in range(4) for label in (0, 1)])
    newton, gr = np.zeros(4), np.array([3.0, 4, 5, 4])
    predictions = universe.label_predictions(ids, np.stack([newton, gr], axis=1).ravel())
    exchanged = np.stack([np.stack([newton, gr * factor], axis=1).ravel() for factor in (0.5, -1)], axis=1)
    first, second, remainder = interventions.shares(*interventions.twin_differences(predictions, exchanged))
    assert first["value"] == pytest.approx(0.25)
    assert second["value"] == pytest.approx(1)
    assert remainder["value"] == pytest.approx(-0.25)


def test_the_band_in_which_the_twins_differ_is_found() -> None:
    def plane_band(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cubes of independent slices of white noise; GR has more power in one band of the slices."""
        newton = torch.randn(SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        return newton, newton + 0.1 * next(interventions.components(newton, BANDS.masks[2:3]))

    class BandPower(torch.nn.Module):
        def forward(self, slices: torch.Tensor, axes: object = None) -> torch.Tensor:
            parts = list(interventions.components(slices[:, 0], BANDS.masks))
            return sum((part.square().mean((1, 2)) for part in parts), torch.zeros(len(slices)))

    cubes = {seed: plane_band(seed) for seed in range(3)}
    batches = [batch for batch in universe.batches(cubes) if int(batch.ids[0]) // SIZE % 3 == 0]
    found = summarize(BandPower(), batches)["interventions"]
    whole = found["none"]["auc"]["value"]
    exchanged = [estimate["value"] for estimate in found["exchange"]["auc"]]
    assert whole > 0.6
    assert exchanged[2] == pytest.approx(1 - whole, abs=0.01)
    assert [exchanged[band] for band in (0, 1, 3)] == pytest.approx([whole] * 3, abs=1e-3)
    assert found["low_pass"]["auc"][1]["value"] == pytest.approx(0.5, abs=0.01)
    assert [share["value"] for share in found["shares"]] == pytest.approx([0, 0, 1, 0], abs=1e-3)
    assert np.all(found["cuts"] < found["centres"])


def wave(n: int) -> torch.Tensor:
    x = torch.arange(SIZE) / SIZE * 2 * torch.pi
    return torch.cos(n * x).expand(1, 1, SIZE, SIZE) + 0.5


def test_filters_act_on_the_modes_they_name() -> None:
    degradations = Degradations(universe.BOX, 160.0, 0.1)
    degraded = degradations.apply(wave(5), 0)
    k = 2 * np.pi * 5 / 5120
    expected = (wave(5) - 0.5) * np.exp(-((k * 160) ** 2) / 2) + 0.5
    torch.testing.assert_close(degraded["smoothed"], expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(degraded["mean_removed"], wave(5) - 0.5, atol=1e-5, rtol=1e-4)
    for n, kept in ((16, wave(16)), (17, torch.full((1, 1, SIZE, SIZE), 0.5))):
        torch.testing.assert_close(degradations.apply(wave(n), 0)["large_scales"], kept, atol=1e-5, rtol=1e-4)


def test_noise_has_its_level_and_depends_on_the_seed_alone() -> None:
    clean = torch.zeros(8, 1, SIZE, SIZE)
    first, again, other = (
        Degradations(universe.BOX, 160.0, 0.3).apply(clean, seed)["noisy"] for seed in (1, 1, 2)
    )
    assert float(first.std()) == pytest.approx(0.3, rel=0.02)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_phases_keep_every_power_spectrum_and_the_mean() -> None:
    slices = torch.randn(4, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).exp()
    changed, other = (
        Degradations(universe.BOX, 160.0, 0.1).apply(slices, seed)["random_phases"] for seed in (1, 2)
    )
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
    assert not torch.equal(other, changed)


@pytest.mark.parametrize("setting", ["blur=3", "noise=-1", "noise=much", "smoothing", "smoothing=inf"])
def test_bad_degradations_are_rejected(setting: str) -> None:
    assert Degradations.parse([], universe.BOX) == Degradations(universe.BOX, 160.0, 0.1)
    assert Degradations.parse(["smoothing=50", "noise=0.5"], universe.BOX).smoothing == 50
    with pytest.raises(UserError, match=f"'{setting}', allowed: smoothing=R in Mpc/h and noise=LEVEL"):
        Degradations.parse([setting], universe.BOX)


def test_the_table_shows_what_each_degradation_costs() -> None:
    cubes = {seed: universe.twins(seed, universe.band) for seed in range(3)}
    degradations = Degradations(universe.BOX, 160.0, 0.1)

    def network(slices: torch.Tensor, axes: object = None) -> torch.Tensor:
        """The variance of the modes beyond N/4, which the second degradation removes."""
        low = degradations.apply(slices, 0)["large_scales"]
        return (slices - low).square().mean((1, 2, 3)).round(decimals=6)

    ids, logits = degradations.measure(network, universe.batches(cubes))
    with torch.no_grad():
        unchanged = torch.cat([network(batch.images) for batch in universe.batches(cubes)]).double().numpy()
    summary = degradations.summarize(universe.label_predictions(ids, unchanged), logits)
    assert summary["mean_removed"]["change"]["value"] == pytest.approx(0, abs=1e-3)
    assert summary["large_scales"]["auc"]["value"] == 0.5
    change = summary["large_scales"]["auc"]["value"] - summary["none"]["auc"]["value"]
    assert summary["large_scales"]["change"]["value"] == pytest.approx(change)
