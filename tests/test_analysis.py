"""Numbers, spectra, interventions, figures and the report, from arrays whose answers are known."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import h5py
import matplotlib as mpl
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn import metrics as sk

import models
from analysis import (
    comparison,
    figures,
    page,
    passes,
    report,
    saliency,
    scales,
    spectra,
    statistics,
    style,
    yardstick,
)
from analysis.slices import Slices

SIZE = 64
BAND = (8.5, 13.5)  # waves per box in which the twins of the synthetic universe differ


def judged(seeds: int = 6, positions: int = 8, signal: float = 1.0, ties: bool = False) -> Slices:
    """Slices with random logits that tell the gravities apart by `signal`; simulations scatter too."""
    rng = np.random.default_rng(5)
    grid = np.meshgrid(np.arange(10, 10 + seeds), [0, 1], [0, 1, 2], np.arange(positions), indexing="ij")
    seed, label, axis, position = (part.ravel() for part in grid)
    logit = signal * (label - 0.5) + rng.normal(size=len(seed)) + rng.normal(size=seeds)[seed - 10]
    if ties:
        logit = logit.round()
    return Slices(np.arange(len(seed)), seed, label, axis, position, logit)


def universe(seeds: int, *, excess: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices (seeds, SIZE, SIZE) of red noise and of twins that have `excess` of its power in BAND."""
    generator = torch.Generator().manual_seed(3)
    waves = spectra.wave_lengths(SIZE, 2)
    white = torch.fft.rfft2(torch.randn(seeds, SIZE, SIZE, generator=generator))
    inside = (waves >= BAND[0]) & (waves < BAND[1])
    field = white / waves.clamp(min=1)
    return tuple(torch.fft.irfft2(part).float() for part in (field, field * (1 + (excess**0.5 - 1) * inside)))


# numbers and their intervals


@pytest.mark.parametrize("ties", [False, True])
def test_resampled_numbers_are_those_of_the_libraries_on_the_resample(ties: bool) -> None:
    slices = judged(ties=ties)
    bootstrap = statistics.SeedBootstrap(slices.seeds, resamples=20)
    curves = statistics.Curves.of(slices, bootstrap)
    assert bootstrap.draws.sum(1).tolist() == [6.0] * 20
    for row, draws in enumerate(bootstrap.draws):
        chosen = np.concatenate(
            [
                np.tile(np.flatnonzero(slices.seed == seed), int(times))
                for seed, times in zip(slices.seeds, draws, strict=True)
            ]
        )
        expected = statistics.values(slices.where(chosen))
        for name, terms in statistics.RATIOS.items():
            above, below = (bootstrap.per_seed(slices, part) for part in terms(slices))
            assert bootstrap.ratio(above, below)[row] == pytest.approx(expected[name], abs=1e-9), name
        assert curves.auc[row] == pytest.approx(expected["auc"], abs=1e-12)
        assert curves.average_precision[row] == pytest.approx(expected["average_precision"], abs=1e-12)
        error = statistics._calibration_error(slices, bootstrap)[row]
        assert error == pytest.approx(expected["calibration_error"], abs=1e-6)


def test_areas_on_few_thresholds_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = judged(positions=64)
    bootstrap = statistics.SeedBootstrap(slices.seeds, resamples=30)
    exact = statistics.Curves.of(slices, bootstrap)
    assert len(slices) > statistics.THRESHOLDS
    monkeypatch.setattr(statistics, "THRESHOLDS", len(slices) + 1)
    np.testing.assert_allclose(exact.auc, statistics.Curves.of(slices, bootstrap).auc, atol=2e-4)


def test_intervals_draw_whole_seeds() -> None:
    """With slices that all repeat their seed's luck, more slices must not make the interval narrower."""
    few, many = (judged(seeds=12, positions=positions, signal=0) for positions in (1, 50))
    widths = []
    for slices in (few, many):
        seedly = slices.saying(np.where(slices.seed % 2 == 0, 1.0, -1.0) * np.where(slices.label, 1, -1))
        estimate = statistics.slice_estimates(seedly, statistics.SeedBootstrap(seedly.seeds))["accuracy"]
        assert estimate["value"] == 0.5
        widths.append(estimate["high"] - estimate["low"])
    assert widths[0] == widths[1] > 0.4


def test_an_interval_leaves_a_fortieth_of_the_resamples_on_each_side() -> None:
    resampled = np.random.default_rng(2).exponential(size=777)
    expected = np.quantile(resampled, [0.025, 0.975])
    assert statistics.SeedBootstrap(np.arange(3)).interval(resampled) == pytest.approx(expected, rel=1e-12)


def test_resamples_are_moved_so_that_their_mean_is_the_value() -> None:
    """A seed drawn twice meets its own twin more often, so here no resampled area is below the value."""
    newton = np.arange(8.0)
    found = statistics.cube_estimates(
        np.stack([newton, newton + 0.01], axis=1), statistics.SeedBootstrap(np.arange(8))
    )["cube_auc"]
    assert found["value"] == 36 / 64
    assert found["low"] < found["value"] < found["high"]


def test_one_seed_has_no_interval_and_its_report_is_still_json() -> None:
    slices = judged(seeds=1)
    numbers = statistics.summary(slices, statistics.SeedBootstrap(slices.seeds))
    assert np.isnan(numbers["slices"]["accuracy"]["low"])
    clean = report.plain(numbers)
    assert clean["slices"]["accuracy"]["low"] is None
    json.dumps(clean, allow_nan=False)


def test_cubes_and_twins() -> None:
    cubes = np.array([[-1.0, 2.0], [0.5, 1.0], [-3.0, -4.0], [-2.0, -1.0]])  # Newton, GR
    found = statistics.cube_estimates(cubes, statistics.SeedBootstrap(np.arange(4)))
    value = {key: estimate["value"] for key, estimate in found.items()}
    assert value["cube_accuracy"] == 5 / 8
    assert value["pair_accuracy"] == 3 / 4
    assert value["cube_auc"] == sk.roc_auc_score([0, 1] * 4, cubes.ravel())
    assert value["mean_difference"] == pytest.approx(0.875)
    assert value["pair_p_value"] == pytest.approx(5 / 16)
    # sums of squares about their means: 8.1875 of the differences, 6.6875 of Newton, 21 of GR
    assert value["separation"] == pytest.approx(0.875 / (8.1875 / 3) ** 0.5)
    assert value["contrast"] == pytest.approx(0.875 / ((6.6875 / 3 + 21 / 3) / 2) ** 0.5)
    assert found["pair_accuracy"]["low"] == pytest.approx(0.1941, abs=1e-4)  # tables of Clopper and Pearson
    assert found["pair_accuracy"]["high"] == pytest.approx(0.9937, abs=1e-4)


def test_slices_of_all_axes_and_chance() -> None:
    slices = judged()
    numbers = statistics.summary(slices, statistics.SeedBootstrap(slices.seeds))
    assert list(numbers["axes"]) == [0, 1, 2]
    accuracies = [numbers["axes"][axis]["accuracy"]["value"] for axis in range(3)]
    assert np.mean(accuracies) == pytest.approx(numbers["slices"]["accuracy"]["value"])
    assert sum(numbers["confusion"].values()) == len(slices)
    assert numbers["chance"]["balance"] == numbers["chance"]["accuracy"] == 0.5
    assert sum(row["slices"] for row in numbers["reliability"]) == len(slices)


def test_a_gain_over_itself_is_nothing_and_over_noise_is_found() -> None:
    slices = judged(signal=6, seeds=10)
    bootstrap = statistics.SeedBootstrap(slices.seeds)
    nothing = statistics.difference(slices, slices, bootstrap)["accuracy"]
    assert (nothing["value"], nothing["low"], nothing["high"]) == (0, 0, 0)
    noise = slices.saying(np.random.default_rng(1).normal(size=len(slices)))
    assert statistics.difference(slices, noise, bootstrap)["accuracy"]["low"] > 0.2


# spectra


@pytest.mark.parametrize("dimensions", [2, 3])
def test_power_of_a_plane_wave(dimensions: int) -> None:
    box = spectra.Box(SIZE, 5120.0)
    position = torch.arange(SIZE) / SIZE * 2 * torch.pi
    grid = torch.meshgrid(*[position] * dimensions, indexing="ij")
    wave = (3 * torch.cos(4 * grid[0] + 3 * grid[-1])).float()[None]  # |n| = 5
    power = spectra.PowerSpectrum(box, dimensions)(wave)[0].numpy()
    lengths = spectra.wave_lengths(SIZE, dimensions)
    full = torch.fft.fftn(torch.zeros([SIZE] * dimensions)).numel()
    assert full == SIZE**dimensions
    ring = count_modes(dimensions, 5)
    assert np.argmax(power) == 4
    assert box.shells[4] == pytest.approx(5 * 2 * np.pi / 5120)
    # the variance, 9 / 2, is the sum of P(k) over the modes of the shell, over the volume
    assert power[4] * ring / 5120.0**dimensions == pytest.approx(4.5, rel=1e-5)
    assert np.delete(power, 4).max() < 1e-8 * power[4]
    assert lengths.max() == pytest.approx(SIZE / 2 * dimensions**0.5)


def count_modes(dimensions: int, shell: int) -> int:
    waves = np.fft.fftfreq(SIZE, 1 / SIZE)
    lengths = np.sqrt(sum(part**2 for part in np.meshgrid(*[waves] * dimensions)))
    return int(((lengths >= shell - 0.5) & (lengths < shell + 0.5)).sum())


@pytest.mark.parametrize("dimensions", [2, 3])
def test_power_is_that_of_the_full_transform(dimensions: int) -> None:
    field = np.random.default_rng(1).normal(size=[SIZE] * dimensions).astype(np.float32)
    waves = np.fft.fftfreq(SIZE, 1 / SIZE)
    lengths = np.sqrt(sum(part**2 for part in np.meshgrid(*[waves] * dimensions)))
    power = np.abs(np.fft.fftn(field)) ** 2 * 5120.0**dimensions / SIZE ** (2 * dimensions)
    shells = np.round(lengths).astype(int)
    expected = [power[shells == shell].mean() for shell in range(1, SIZE // 2 + 1)]
    found = spectra.PowerSpectrum(spectra.Box(SIZE, 5120.0), dimensions)(torch.from_numpy(field)[None])
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_power_of_white_noise_is_flat_and_adds_up_to_the_variance() -> None:
    field = torch.randn(20, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    power = spectra.PowerSpectrum(spectra.Box(SIZE, None), 2)(field).mean(0).numpy()
    flat = (2 * np.pi) ** 2 / SIZE**2
    np.testing.assert_allclose(power[4:], flat, rtol=0.1)
    assert spectra.Box(SIZE, None).unit == "waves per box"
    np.testing.assert_array_equal(spectra.Box(SIZE, None).shells, np.arange(1, 33))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_bands_share_out_all_modes(size: int) -> None:
    bands = spectra.Bands.logarithmic(size)
    lengths = spectra.wave_lengths(size, 2)
    inside = sum(
        ((lengths >= low) & (lengths < high)).int()
        for low, high in zip(bands.edges, bands.edges[1:], strict=False)
    )
    assert isinstance(inside, torch.Tensor)
    assert bool((inside == 1).all())
    assert 8 <= len(bands) <= 14
    box = spectra.Box(size, 1000.0)
    assert len(bands.centres(box)) == len(bands.cuts(box)) == len(bands) - 1
    assert np.all(bands.cuts(box)[1:] > bands.centres(box)[:-1])
    assert np.all(bands.cuts(box) < bands.centres(box))


def test_interventions_take_and_exchange_what_they_say() -> None:
    newton, gr = (part[:, None] for part in universe(2, excess=2.0))
    bands = spectra.Bands((0.0, 0.5, *BAND, 64.0))
    torch.testing.assert_close(sum(bands.parts(newton)), newton)
    changed: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for kind, *pair in spectra.interventions(newton, gr, bands):
        changed.setdefault(kind, []).append(tuple(pair))
    for low, high in zip(changed["low_pass"], changed["high_pass"], strict=True):
        torch.testing.assert_close(low[0] + high[0], newton)
        torch.testing.assert_close(low[1] + high[1], gr)
    assert len(changed["exchange"]) == len(bands) == 4
    for band in (0, 1, 3):  # the twins are the same there
        torch.testing.assert_close(changed["exchange"][band], (newton, gr), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(changed["exchange"][2], (gr, newton), atol=1e-6, rtol=1e-4)
    means = changed["low_pass"][0][0]
    torch.testing.assert_close(
        means, newton.mean((2, 3), keepdim=True).expand_as(means), atol=1e-6, rtol=1e-3
    )


class RingPower(torch.nn.Module):
    """A network that learned P(k): a logistic regression on the logarithm of a slice's power in rings."""

    def __init__(self, regression: Any, box: spectra.Box) -> None:
        super().__init__()
        self.spectrum = spectra.PowerSpectrum(box, 2)
        scaler, last = regression[0], regression[-1]
        parts = (scaler.mean_, last.coef_[0] / scaler.scale_, last.intercept_)
        self.mean, self.weight, self.bias = (torch.from_numpy(part) for part in parts)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        """Slices (b, 1, N, N) -> logits (b,)."""
        power = self.spectrum(slices[:, 0]).clamp(min=1e-3)  # below is what rounding left of removed modes
        return ((power.log() - self.mean) @ self.weight + self.bias).float()


def batches(newton: torch.Tensor, gr: torch.Tensor) -> list[Any]:
    """Batches as the data set gives them, one axis, from slices (seeds, SIZE, N, N)."""
    found = []
    for seed in range(len(newton)):
        for label, cubes in enumerate((newton, gr)):
            ids = ((seed * 2 + label) * 3) * SIZE + torch.arange(SIZE)
            found.append(type("Batch", (), {"ids": ids, "images": cubes[seed][:, None]}))
    return found


@pytest.fixture(scope="module")
def scanned() -> tuple[dict[str, Any], Slices, NDArray[np.float64], spectra.Bands, spectra.Box]:
    """The scales of a universe whose twins differ in BAND alone, judged by one that learned its P(k)."""
    box = spectra.Box(SIZE, 5120.0)
    newton, gr = universe(12 * SIZE, excess=1.5)
    power = spectra.PowerSpectrum(box, 2)
    known = torch.cat([power(newton[: 6 * SIZE]), power(gr[: 6 * SIZE])]).numpy()
    labels, groups = np.repeat([0, 1], 6 * SIZE), np.tile(np.repeat(np.arange(6), SIZE), 2)
    regression, _ = yardstick.fit(known, labels, groups)
    bands = spectra.Bands((0.0, 0.5, 2.5, 5.5, *BAND, 20.5, 64.0))
    unseen = batches(*(part[6 * SIZE :].view(6, SIZE, SIZE, SIZE) for part in (newton, gr)))
    ids, table = passes.scales(RingPower(regression, box), unseen, bands, box)
    order = np.argsort(ids)
    where = ids[order] // (6 * SIZE), ids[order] // (3 * SIZE) % 2, ids[order] * 0, ids[order] % SIZE
    slices = Slices(ids[order], *where, table[order, 0])
    bootstrap = statistics.SeedBootstrap(slices.seeds)
    numbers = scales.by_wavenumber(slices, table[order], bands, box, bootstrap)
    return numbers, slices, table[order], bands, box


def test_the_intervention_finds_the_band_in_which_the_twins_differ(scanned: Any) -> None:
    numbers, slices, _, bands, _ = scanned
    assert len(slices) == 6 * 2 * passes.POSITIONS
    assert numbers["none"]["auc"]["value"] > 0.9
    areas = [estimate["value"] for estimate in numbers["exchange"]["auc"]]
    guilty = bands.edges.index(BAND[0])
    assert areas[guilty] == pytest.approx(1 - numbers["none"]["auc"]["value"], abs=0.01)
    assert numbers["exchange"]["pair_accuracy"][guilty]["value"] == 0
    for band, area in enumerate(areas):
        if band != guilty:
            assert area == pytest.approx(numbers["none"]["auc"]["value"], abs=1e-3)
    # what is below the band tells nothing; once the band is in, all is there
    low = [estimate["value"] for estimate in numbers["low_pass"]["auc"]]
    assert all(area == pytest.approx(0.5, abs=0.02) for area in low[:guilty])
    summary = statistics.summary(slices, statistics.SeedBootstrap(slices.seeds))
    assert page._most_telling_band(report.plain({**summary, "scales": numbers})).startswith(
        "The verdict on slices depends most on k from 0.01043 to 0.01657 h/Mpc"
    )


def test_the_power_ratio_shows_the_band(scanned: Any) -> None:
    _, slices, table, bands, box = scanned
    cubes = np.ones((6, 2, SIZE // 2))
    found = scales.power(slices, table, cubes, bands, box, statistics.SeedBootstrap(slices.seeds))
    inside = (found["k"] > BAND[0] * box.fundamental) & (found["k"] < BAND[1] * box.fundamental)
    np.testing.assert_allclose(found["ratio"][inside], 1.5, rtol=1e-3)
    np.testing.assert_allclose(found["ratio"][~inside], 1, rtol=1e-3)
    assert np.all(found["ratio_low"] <= found["ratio"] + 1e-9)


def test_power_of_two_seeds_by_hand() -> None:
    box, bands = spectra.Box(4, None), spectra.Bands((0.0, 0.5, 4.0))
    seed, label = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    slices = Slices(np.arange(4), seed, label, seed * 0, seed * 0, np.zeros(4))
    places = passes.columns(bands, 2)
    table = np.zeros((4, places["saliency"].stop))
    table[:, places["power"]] = [[1, 4], [2, 3], [3, 2], [4, 6]]
    table[:, places["saliency"]] = [[1, 0], [5, 1], [2, 1], [4, 2]]
    cubes = np.array([[[1, 2], [2, 2]], [[3, 2], [4, 3]]])
    found = scales.power(slices, table, cubes, bands, box, statistics.SeedBootstrap(slices.seeds))
    expected = {
        "k": [1, 2],
        "newton": [2, 3],
        "gr": [3, 4.5],
        "ratio": [1.5, 1.5],
        "ratio_low": [4 / 3, 3 / 4],  # of 1000 resamples of two seeds, a quarter draws one of them twice
        "ratio_high": [2, 3],
        "cube_newton": [2, 2],
        "cube_gr": [3, 2.5],
        "cube_ratio": [1.5, 1.25],
        "saliency": [3 / 5, 2 / 5],  # the means 3 and 1, by rings with modes in proportion to k
    }
    assert found.keys() == expected.keys()
    for key, numbers in expected.items():
        np.testing.assert_allclose(found[key], numbers, err_msg=key)


def test_spectra_of_slices_and_of_the_cube_they_make() -> None:
    cubes = torch.randn(2, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    box = spectra.Box(SIZE, 5120.0)
    (ids, planes), (names, solids) = passes.spectra(box, batches(*cubes))
    assert ids.tolist() == [*range(SIZE), *range(3 * SIZE, 4 * SIZE)]
    assert names.tolist() == [0, 1]
    np.testing.assert_allclose(planes[0], spectra.PowerSpectrum(box, 2)(cubes[0, 0, :1])[0])
    np.testing.assert_allclose(solids[1], spectra.PowerSpectrum(box, 3)(cubes[1])[0])


# saliency


def test_integrated_gradients_add_up() -> None:
    torch.manual_seed(0)
    network = models.build_model(
        architecture="RACOON", layer_param=2, dropout=0.5, activation="gelu", size=SIZE
    ).eval()
    slices = 3 * torch.randn(1, 1, SIZE, SIZE)
    found = saliency.maps(network, slices)
    with torch.no_grad():
        whole = float(network(slices) - network(torch.zeros_like(slices)))
    assert found["integrated"].sum() == pytest.approx(whole, abs=0.02 * abs(whole) + 1e-4)
    assert found["residual"] == pytest.approx(found["integrated"].sum() - whole, abs=1e-5)


def test_the_gradient_of_a_linear_network_is_its_weights() -> None:
    weights = torch.randn(SIZE, SIZE)
    with torch.no_grad():
        slopes = saliency.gradient(lambda x: (x[:, 0] * weights).sum((1, 2)), torch.randn(3, 1, SIZE, SIZE))
    for slope in slopes:
        torch.testing.assert_close(slope[0], weights)


# the yardstick


def test_the_yardstick_learns_from_known_seeds_and_is_judged_on_others() -> None:
    box, seeds = spectra.Box(SIZE, None), 10
    newton, gr = universe(seeds * 8, excess=1.5)
    power = torch.stack([spectra.PowerSpectrum(box, 2)(part) for part in (newton, gr)], dim=1).numpy()
    by_seed = power.reshape(seeds, 8, 2, -1).transpose(0, 2, 1, 3)
    seed, label = (
        part.ravel() for part in np.meshgrid(np.arange(seeds), [0, 1], np.arange(8), indexing="ij")[:2]
    )
    halves = [
        yardstick.Spectra(
            seed[chosen], label[chosen], by_seed.reshape(-1, SIZE // 2)[chosen], by_seed.mean(2)[ids]
        )
        for chosen, ids in ((seed < 5, slice(0, 5)), (seed >= 5, slice(5, 10)))
    ]
    network = Slices(
        np.arange(80), halves[1].seed, halves[1].label, halves[1].seed * 0, halves[1].seed * 0, np.zeros(80)
    )
    found = yardstick.compare(network, *halves, statistics.SeedBootstrap(network.seeds))
    assert found["slices"]["accuracy"]["value"] > 0.75
    assert found["slices_by_cube"]["pair_accuracy"]["value"] == 1
    assert found["cubes"]["pair_accuracy"]["value"] == 1
    assert found["gain"]["accuracy"]["value"] == pytest.approx(0.5 - found["slices"]["accuracy"]["value"])


def test_one_simulation_is_enough_to_fit() -> None:
    rng = np.random.default_rng(0)
    regression, strength = yardstick.fit(
        np.exp(rng.normal(size=(8, 4))), np.tile([0, 1], 4), np.zeros(8, int)
    )
    assert strength == 1
    assert yardstick.logits(regression, np.ones((3, 4))).shape == (3,)


# figures and report


def numbers_of(slices: Slices, scanned: Any) -> dict[str, Any]:
    """A whole report's numbers, as evaluation.py makes them."""
    measured, some, table, bands, box = scanned
    bootstrap = statistics.SeedBootstrap(slices.seeds)
    rng = np.random.default_rng(0)
    shells = np.exp(rng.normal(size=(6, 2, 3)))
    flat = yardstick.Spectra(slices.seed, slices.label, np.exp(rng.normal(size=(len(slices), 3))), shells)
    maps = {key: rng.normal(size=(SIZE, SIZE)) for key in ("image", "gradient", "integrated")}
    return {
        "run": "a <run>",
        "model": {"architecture": "RACOON", "layer_param": 2},
        "data": {"file": "z1.h5", "seeds": [10, 16], "train_seeds": 10, "newton_augmentation": 1.0},
        "how": {"processes": 1},
        **statistics.summary(slices, bootstrap),
        "scales": measured,
        "spectra": scales.power(
            some, table, np.ones((6, 2, 32)), bands, box, statistics.SeedBootstrap(some.seeds)
        ),
        "yardstick": yardstick.compare(slices, flat, flat, bootstrap),
        "extremes": [{"what": what, **slices.name(place), **maps} for what, place in slices.extremes.items()],
    }


@pytest.fixture(scope="module")
def written(scanned: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report and its figures."""
    folder, slices = tmp_path_factory.mktemp("report"), judged()
    numbers = numbers_of(slices, scanned)
    curves = statistics.curves(slices, statistics.SeedBootstrap(slices.seeds))
    line = {"loss": 0.7, "accuracy": 0.5, "auc": 0.5, "cube_accuracy": 0.5, "pair_accuracy": 1.0}
    history = [line | {"phase": phase, "epoch": epoch} for epoch in (1, 2) for phase in ("train", "test")]
    drawn = figures.of_slices(slices, curves, numbers, history) | figures.of_scales(numbers, scanned[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.STYLE, "savefig.dpi", 120)  # faster
        for name, figure in drawn.items():
            style.save(figure, folder / name)
    report.write(folder, numbers, drawn)
    return folder, numbers


def test_every_figure_is_png_and_pdf(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    for name in page.PICTURES:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 300
            grey = np.asarray(image.convert("L"))
        assert grey.min() < 100
        assert grey.max() == 255
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_figures_leave_matplotlib_as_it_was_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    for name in ("first", "second"):
        drawn = figures.twins_plot([3, 4, 5], np.array([0.0, 1, 2]), np.array([1.0, 0, 3]))
        style.save(drawn, tmp_path / name)
    assert dict(mpl.rcParams) == before
    for suffix in (".png", ".pdf"):
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()


def test_an_estimate_without_an_interval_is_drawn_without_an_error_bar() -> None:
    known = {"value": 0.7, "low": 0.6, "high": 0.75}
    nan = float("nan")
    unknown: Any = [{"value": 0.8, "low": end, "high": end} for end in (None, nan)]
    rows = {"known": {"auc": known}, "read back": {"auc": unknown[0]}, "one seed": {"auc": unknown[1]}}
    figure = figures.intervals(rows, {"auc": ("AUC", 0.5)})
    figure.draw_without_rendering()
    bars: Any = figure.axes[0].containers
    assert [bar.has_xerr for bar in bars] == [True, False, False]
    np.testing.assert_allclose(bars[0].lines[2][0].get_segments(), [[[0.6, 2], [0.75, 2]]])
    assert [bar.lines[0].get_xdata().item() for bar in bars] == [0.7, 0.8, 0.8]


def test_saliency_maps_name_the_directions_of_each_slice() -> None:
    maps = {key: np.eye(4) for key in ("image", "gradient", "integrated")}
    about = {"what": "some", "gravity": "GR", "seed": 1, "position": 0, "logit": 1.0}
    rows = [maps | about | {"axis": axis} for axis in (2, 0, 1)]
    axes = figures.saliency_maps(rows, spectra.Box(4, 100.0)).axes[:9]
    # rows of an image count the first direction that is left of its cube, columns the second
    vertical = [place.get_ylabel() for place in axes[::3]]
    assert vertical == ["x [Mpc/h]", "y [Mpc/h]", "x [Mpc/h]"]
    horizontal = [place.get_xlabel() for place in axes]
    assert horizontal == ["y [Mpc/h]"] * 3 + ["z [Mpc/h]"] * 6


def told(*, seeds: int = 6, signal: float = 6.0, factor: float = 1.0, **parts: Any) -> list[str]:
    """The findings of random slices that differ by `signal`, with `parts` of the report beside them."""
    slices = judged(seeds=seeds, signal=signal)
    data = {"seeds": [10, 10 + seeds], "train_seeds": 10, "newton_augmentation": factor}
    summary = statistics.summary(slices, statistics.SeedBootstrap(slices.seeds))
    return page.findings(report.plain({"data": data, **summary, **parts}))


def test_the_first_finding_is_that_it_is_a_test_of_the_pipeline() -> None:
    warning = "Newtonian slices were multiplied by 0.9: this is a test of the pipeline, not of gravity."
    assert told(factor=0.9) == [warning, *told(factor=1.0)]
    assert "pipeline" not in " ".join(told(factor=1.0))


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.01, 0.04), "By AUC the network is above it"),
        ((-0.04, -0.01), "By AUC the network is below it"),
        ((-0.01, 0.04), "By AUC the network cannot be told from it"),
        ((None, None), "The spread over seeds is unknown"),
    ],
)
def test_the_auc_decides_between_network_and_yardstick(ends: tuple[float, float], verdict: str) -> None:
    gain = {
        "auc": {"value": 0.02, "low": ends[0], "high": ends[1]},
        "accuracy": {"value": 0.1, "low": 0.05, "high": 0.15},
    }
    found = {"slices": {"accuracy": {"value": 0.6, "low": None, "high": None}}, "gain": gain}
    area = "0.0200" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends[0] is not None else "")
    assert told(yardstick=found)[-1] == (
        "A logistic regression on the power spectrum of slices, the yardstick, gets 60.0 % of them right. "
        f"{verdict}: the difference is {area} in AUC and 10.0 % [5.0 %, 15.0 %] in accuracy."
    )


def test_a_scale_is_named_only_for_a_network_above_chance() -> None:
    areas = [{"value": area} for area in (0.8, 0.3)]
    measured = {"edges": [0, 1, 2], "unit": "h/Mpc", "none": {"auc": areas[0]}, "exchange": {"auc": areas}}
    assert told(scales=measured)[-1] == (
        "The verdict on slices depends most on k from 1 to 2 h/Mpc: exchanged between twins, it takes the "
        "AUC from 0.800 to 0.300."
    )
    assert told(scales=measured, signal=0)[-1] == "The network is not above chance, so no scale is named."
    assert told(scales=measured, seeds=1)[-1] == "The spread over seeds is unknown, so no scale is named."
    # either number at chance is enough
    fine, poor = ({"value": 0.6, "low": low, "high": 0.7} for low in (0.55, 0.5))
    chance = {"accuracy": 0.5, "auc": 0.5}
    for slices in ({"accuracy": fine, "auc": poor}, {"accuracy": poor, "auc": fine}):
        sentence = page._most_telling_band({"slices": slices, "chance": chance, "scales": measured})
        assert sentence == "The network is not above chance, so no scale is named."


def test_one_pair_is_one_pair() -> None:
    assert " of the one pair of twins correctly;" in told(seeds=1)[1]
    assert " of the 6 pairs of twins correctly;" in told()[1]


@pytest.mark.parametrize("logits", [np.zeros(12), np.full(12, 40.0)])
def test_a_network_that_says_the_same_of_all_can_be_drawn(
    logits: NDArray[np.float64], tmp_path: Path
) -> None:
    slices = judged(seeds=2, positions=1).saying(logits)
    bootstrap = statistics.SeedBootstrap(slices.seeds)
    numbers = statistics.summary(slices, bootstrap)
    assert numbers["slices"]["auc"]["value"] == 0.5
    for figure in figures.of_slices(slices, statistics.curves(slices, bootstrap), numbers, []).values():
        figure.draw_without_rendering()


def test_the_report_holds_every_number_and_needs_nothing_else(written: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = written
    text = (folder / "report.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    assert found["slices"]["auc"]["value"] == numbers["slices"]["auc"]["value"]
    assert len(found["scales"]["exchange"]["auc"]) == 7
    assert "image" not in found["extremes"][0]
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(page.PICTURES)
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|<script|https?://""", html)
    assert "a &lt;run&gt;" in html
    for key in found["slices"]:
        assert page.NAMES[key] in html


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>addEventListener("load", () => {
  const pictures = [...document.images];
  const seen = pictures.filter(p => p.complete && p.naturalWidth > 0 && p.offsetWidth > 100);
  const asked = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.title = JSON.stringify([seen.length, asked.length, wide, document.querySelectorAll("td").length]);
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_real_browser_shows_the_report(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = tmp_path / "report.html"
    copy.write_text((written[0] / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800", "--timeout=20000"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [str(CHROMIUM), *options, *offline, "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None
    pictures, requests, too_wide, cells = json.loads(title[1])
    assert pictures == len(page.PICTURES)
    assert requests == 0
    assert not too_wide
    assert cells > 100


def test_predictions_can_be_read_by_anyone(tmp_path: Path) -> None:
    slices = judged(seeds=2)
    report.write_predictions(tmp_path / "predictions.h5", slices)
    with h5py.File(tmp_path / "predictions.h5") as file:
        np.testing.assert_array_equal(file["logit"][:], slices.logit)
        assert set(file["gravity"][:].tolist()) == {b"gr", b"newton"}
        assert ((file["gravity"][:] == b"gr") == (file["label"][:] == 1)).all()
        np.testing.assert_array_equal(file["cubes/mean_logit"][:], slices.cube_logits.ravel())
        assert file["cubes/seed"][:].tolist() == [10, 10, 11, 11]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.h5"]


def test_runs_are_compared_in_one_table(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    reports = {}
    for name in ("a", "b"):
        shutil.copytree(written[0], tmp_path / name / "evaluation")
        reports[name] = comparison.read(tmp_path / name)
    table = comparison.write(tmp_path, reports)
    assert len(table.splitlines()) == 4
    assert "z1.h5, 10 to 15, 1" in table
    assert {path.name for path in tmp_path.glob("comparison.*")} == {
        f"comparison.{suffix}" for suffix in ("md", "json", "png", "pdf")
    }
    with pytest.raises(comparison.ComparisonError, match="evaluate the run first"):
        comparison.read(tmp_path)
    (tmp_path / "a" / "evaluation" / "report.json").write_text("{")
    with pytest.raises(comparison.ComparisonError, match="damaged"):
        comparison.read(tmp_path / "a")
