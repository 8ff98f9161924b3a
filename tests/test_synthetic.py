"""The synthetic universe: physics and reproducibility."""

from system import UserError

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datasets.cube_file import CubeFile
from datasets.preparation.cosmology import Cosmology, late_ratio, linear_theory_ratio
from datasets.preparation.synthetic import BOX_SIZE, REDSHIFT, Settings, Universe, write_synthetic

N = 64


def wavenumbers() -> np.ndarray:
    """|k| in h/Mpc of the modes of rfftn."""
    whole, half = np.fft.fftfreq(N, BOX_SIZE / N), np.fft.rfftfreq(N, BOX_SIZE / N)
    return 2 * np.pi * np.sqrt(whole[:, None, None] ** 2 + whole[None, :, None] ** 2 + half**2)


def universe(**settings: Any) -> Universe:
    return Universe(Settings(size=N, **settings))


def twins(universe: Universe, index: int = 0) -> dict[str, np.ndarray]:
    return dict(universe.twins(index))


def modes_of_twins(universe: Universe) -> dict[str, np.ndarray]:
    return {gravity: np.fft.rfftn(values.astype(np.float64)) for gravity, values in universe.twins(0)}


@pytest.mark.parametrize("strength", [0.0, 1.0, 15.0])
def test_twins_differ_by_the_horizon_term_only(strength: float) -> None:
    modes = modes_of_twins(universe(strength=strength))
    k = wavenumbers()
    inside = k > 0
    expected = k**2 / np.where(inside, k**2 + 3 * strength * Cosmology().conformal_hubble(REDSHIFT) ** 2, 1)
    error = np.abs(modes["gr"] - modes["newton"] * expected)
    assert error.max() < 1e-5 * np.abs(modes["newton"]).max()
    assert strength or np.array_equal(modes["gr"], modes["newton"])


def direction() -> np.ndarray:
    """sum k_i^4 / k^4 of the modes of rfftn."""
    whole, half = np.fft.fftfreq(N, 1 / N), np.fft.rfftfreq(N, 1 / N)
    fourth = whole[:, None, None] ** 4 + whole[None, :, None] ** 4 + half**4
    return fourth / np.maximum(whole[:, None, None] ** 2 + whole[None, :, None] ** 2 + half**2, 1) ** 2


@pytest.mark.parametrize(
    "settings",
    [
        {"physics": "linear"},
        {"physics": "linear", "strength": 2.0},
        {"physics": "linear", "grid": 1.0, "resolution": 2.0},
        {"physics": "late", "strength": 2.0, "resolution": 1.0},
        {"physics": "linear", "strength": 0.0, "grid": 3.0},
    ],
)
def test_physics_lattice_and_resolution_set_the_ratio_of_every_mode(settings: dict[str, Any]) -> None:
    modes, n = modes_of_twins(universe(**settings)), wavenumbers() * BOX_SIZE / (2 * np.pi)
    physics = {"linear": linear_theory_ratio, "late": late_ratio}[settings["physics"]]
    ratio = physics(wavenumbers()) ** settings.get("strength", 1.0)
    ratio *= 1 + settings.get("grid", 0.0) * (0.0425 - 0.054 * direction())
    ratio *= 1 + settings.get("resolution", 0.0) * 0.007 * (n / 32) ** 2
    error = np.abs(modes["gr"] - modes["newton"] * np.sqrt(ratio))
    assert error.max() < 1e-5 * np.abs(modes["newton"]).max()
    assert error[n > 20].max() < 1e-3 * np.abs(modes["newton"][n > 20]).mean()


def test_lattice_term_mimics_gevolution_twins() -> None:
    modes = modes_of_twins(universe(physics="linear", grid=1.0))
    pair = {gravity: np.abs(values) ** 2 for gravity, values in modes.items()}
    n = wavenumbers() * BOX_SIZE / (2 * np.pi)
    axes, diagonals = direction() > 0.9, direction() <= 0.45
    for low, high in ((5, 8), (12, 17), (24, 32)):
        shell = (n >= low) & (n < high)
        ratios = [
            pair["gr"][shell & part].sum() / pair["newton"][shell & part].sum() for part in (axes, diagonals)
        ]
        assert ratios == pytest.approx([0.99, 1.021], abs=0.004)


def test_numbers_of_the_module_docstring() -> None:
    redshifts = np.array([0.99, 1.01])
    growth = [Cosmology().potential_growth(z) / (1 + z) for z in redshifts]  # D = a g
    rate = np.log(growth[0] / growth[1]) / np.log((1 + redshifts[1]) / (1 + redshifts[0]))
    assert rate == pytest.approx(0.875, abs=0.001)
    horizon = 3 * Cosmology().conformal_hubble(REDSHIFT) ** 2 / (2 * np.pi / BOX_SIZE) ** 2
    assert 1 - 1 / (1 + horizon) == pytest.approx(0.15, abs=0.005)
    assert 1 - 1 / (1 + horizon / 16) == pytest.approx(0.01, abs=0.002)


def test_power_spectrum_matches_linear_theory() -> None:
    ensemble, seeds, k = universe(), 8, wavenumbers()
    power = np.zeros_like(k)
    for index in range(seeds):
        values = twins(ensemble, index)["newton"].astype(np.float64) * np.sqrt(ensemble.variance)
        power += np.abs(np.fft.rfftn(values)) ** 2 * BOX_SIZE**3 / N**6 / seeds
    fundamental = 2 * np.pi / BOX_SIZE
    for low in (2, 4, 8, 16, 32, 48):
        shell = (k >= low * fundamental) & (k < 1.5 * low * fundamental)
        ratio = power[shell] / Cosmology().potential_power(k[shell], REDSHIFT)
        spread = 1 / np.sqrt(seeds * shell.sum() / 2)  # modes of a half cube are not all independent
        assert ratio.mean() == pytest.approx(1, abs=5 * spread)
        assert ratio.std() == pytest.approx(1 / np.sqrt(seeds), rel=0.2)  # a Gaussian field


@pytest.mark.parametrize("settings", [{}, {"physics": "linear", "grid": 40.0}])
def test_values_are_standardized_over_the_ensemble(settings: dict[str, Any]) -> None:
    ensemble = universe(strength=15.0, **settings)
    cubes = [values for index in range(24) for values in twins(ensemble, index).values()]
    assert np.abs([values.mean() for values in cubes]).max() < 1e-6
    assert np.mean([values.var() for values in cubes]) == pytest.approx(1, abs=0.05)


def test_strength_rescales_the_newtonian_twin() -> None:
    weak, strong = universe(strength=1.0), universe(strength=100.0)
    a, b = (twins(u)["newton"] * np.sqrt(u.variance) for u in (weak, strong))
    assert np.abs(a - b).max() < 1e-6 * np.abs(a).max()


def write(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    write_synthetic(path, **{"seeds": 2, "size": N, "strength": 15.0, "seed": 3} | changes)
    with h5py.File(path) as file:
        return {name: file[name][...] for name in file}


def test_cubes_are_reproducible_and_independent_of_the_number_of_seeds(tmp_path: Path) -> None:
    first = write(tmp_path / "a.h5")
    again = write(tmp_path / "b.h5")
    more = write(tmp_path / "c.h5", seeds=3)
    other = write(tmp_path / "d.h5", seed=4)
    assert list(first) == ["gr_seed0000", "gr_seed0001", "newton_seed0000", "newton_seed0001"]
    for name, values in first.items():
        assert np.array_equal(values, again[name])
        assert np.array_equal(values, more[name])
        assert not np.array_equal(values, other[name])
    assert not np.array_equal(first["gr_seed0000"], first["gr_seed0001"])
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_file_is_packed_contiguous_and_annotated(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    cubes = CubeFile(tmp_path / "a.h5")
    assert (cubes.layout, cubes.size, cubes.seeds) == ("packed", N, (0, 1))
    assert all(cube.direct for cube in cubes.cubes.values())
    attributes = cubes.attributes
    assert "radiation treatment" not in attributes
    for physics, treatment in (("linear", "background"), ("late", "CLASS")):
        write(tmp_path / "b.h5", seeds=1, strength=1.0, physics=physics, overwrite=True)
        assert CubeFile(tmp_path / "b.h5").attributes["radiation treatment"] == treatment
    assert attributes["variance"] == pytest.approx(attributes["std"] ** 2)
    assert 3e-5 < attributes["std"] < 6e-5  # similar to the simulations
    expected = {
        "mean": 0.0,
        "box_size": 5120.0,
        "box_size_unit": "Mpc/h",
        "redshift": 1.0,
        "synthetic": True,
        "physics": "toy",
        "grid": 0.0,
        "strength": 15.0,
        "seed": 3,
        "gravities": ["newton", "gr"],
        "field": "phi",
        "h": 0.67556,
    }
    assert {key: attributes[key] for key in expected} == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": 0},
        {"size": 96},
        {"size": -64},
        {"physics": "real"},
        {"strength": 100.0, "physics": "linear"},
        {"grid": 51.0},
        {"resolution": -1.0},
        {"strength": float("nan")},
        {"seed": -1},
    ],
)
def test_invalid_arguments(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="allowed: ") as caught:
        write(tmp_path / "folder" / "a.h5", **changes)
    key, value = next(iter(changes.items()))
    assert re.search(f"{key} =? ?{value}", str(caught.value))
    assert not list(tmp_path.iterdir())
