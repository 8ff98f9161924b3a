"""Filtered cubes: what is kept, exactly, and what is rejected."""

from system import UserError

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datasets.__main__ import main
from datasets.cube_file import CubeFile
from datasets.normalization import check_normalization
from datasets.preparation.filter import Filter
from datasets.preparation.synthetic import write_synthetic


def modes(cube: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|n|^2 and the amplitudes of all modes with |n_i| < 32, of a cube of 64 or 128 cells a side."""
    size = len(cube)
    inside = np.r_[0:32, size - 31 : size]
    n = np.fft.fftfreq(size, 1 / size)[inside]
    amplitudes = np.fft.fftn(cube.astype(np.float64)) / size**3
    return n[:, None, None] ** 2 + n[:, None] ** 2 + n**2, amplitudes[np.ix_(inside, inside, inside)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fewer_cells_keep_every_mode_that_they_can_represent(dtype: type) -> None:
    cube = np.random.default_rng(0).standard_normal((128,) * 3).astype(dtype)
    cropped = Filter(cells=64)(cube)
    assert cropped.shape == (64,) * 3
    assert cropped.dtype == dtype
    (_, before), (_, after) = modes(cube), modes(cropped)
    np.testing.assert_allclose(after, before, atol=1e-8 if dtype == np.float32 else 1e-17)
    nyquist = np.fft.fftn(cropped)[32]
    assert np.abs(nyquist).max() < 1e-3 * np.abs(np.fft.fftn(cropped)).max()


@pytest.mark.parametrize("cells", [None, 64])
def test_the_filter_is_a_sphere_in_three_dimensions(cells: int | None) -> None:
    cube = np.random.default_rng(0).standard_normal((128,) * 3)
    (n2, before), (_, after) = modes(cube), modes(Filter(5, cells)(cube))
    np.testing.assert_allclose(after, np.where(n2 <= 25, before, 0), atol=1e-16)


@pytest.fixture
def universe(tmp_path: Path) -> Path:
    write_synthetic(tmp_path / "128.h5", seeds=1, size=128)
    return tmp_path / "128.h5"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["datasets", *map(str, arguments)])
    return main()


def test_a_repacked_file_records_its_filter(
    universe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.h5", tmp_path / "second.h5"
    assert run(monkeypatch, "repack", universe, first, "--max-wavenumber", 8, "--cells", 64) == 0
    assert run(monkeypatch, "repack", first, second, "--max-wavenumber", 10) == 0
    with h5py.File(universe) as file, h5py.File(second) as filtered:
        n2, amplitudes = modes(filtered["gr_seed0000"][()])
        expected = np.where(n2 <= 64, modes(file["gr_seed0000"][()])[1], 0)
        assert (filtered.attrs["max_wavenumber"], filtered.attrs["cells"]) == (8.0, 64)
        assert filtered.attrs["std"] == file.attrs["std"]  # the values have the same unit
    np.testing.assert_allclose(amplitudes, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max-wavenumber", "0.5"], "--max-wavenumber: found 0.5"),
        (["--max-wavenumber", "nan"], "--max-wavenumber: found nan"),
        (["--max-wavenumber", "40", "--cells", "64"], "less than 32, half of the cells"),
        (["--cells", "256"], "--cells: found 256, allowed: a multiple of 64, at most the 128"),
        (["--cells", "100"], "--cells: found 100"),
        (["--cells", "-64"], "--cells: found -64"),
    ],
)
def test_a_filter_that_does_not_fit_is_rejected_before_writing(
    universe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    text: str,
) -> None:
    assert run(monkeypatch, "repack", universe, tmp_path / "folder" / "out.h5", *options) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_cubes_of_another_filter_are_no_substitute(universe: Path, tmp_path: Path) -> None:
    filtered = tmp_path / "filtered.h5"
    with h5py.File(universe) as file, h5py.File(filtered, "w") as copy:
        for name in file:
            file.copy(name, copy)
        copy.attrs.update(dict(file.attrs) | {"max_wavenumber": 4.0, "cells": 128})
    files: list[Any] = [CubeFile(universe), CubeFile(filtered)]
    check_normalization(files[1], files[1])
    with pytest.raises(UserError, match=r"found unfiltered cubes, .* with --max-wavenumber 4 --cells 128"):
        check_normalization(files[1], files[0])
    with pytest.raises(UserError, match="trained on unfiltered cubes"):
        check_normalization(*files)


def test_rounding_errors_of_removed_modes_count_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_synthetic(tmp_path / "u.h5", seeds=3, size=64, physics="linear", grid=1)
    filtered = str(tmp_path / "n4.h5")
    assert run(monkeypatch, "repack", str(tmp_path / "u.h5"), filtered, "--max-wavenumber", "4") == 0
    capsys.readouterr()
    assert run(monkeypatch, "inspect", filtered) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [line.split("slices AUC")[1] for line in lines if "slices AUC" in line]
    assert expected[0] == expected[1], "of all modes, and of n <= 4"
    assert not any(line.split()[:2] == ["5.5", "to"] for line in lines)
    assert any(line.split()[:1] == ["4"] for line in lines), "the ratio at n = 4"
