"""P_GR/P_N by wavenumber: what follows theory, what the cell."""

from pathlib import Path
from typing import Any

import h5py
import pytest

from datasets.__main__ import main
from datasets.preparation.synthetic import write_synthetic


def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *files: Path) -> list[str]:
    monkeypatch.setattr("sys.argv", ["datasets", "inspect", *map(str, files)])
    assert main() == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"physics": "linear"}, "the ratio follows theory at all n"),
        ({"physics": "linear", "resolution": 20.0}, "the ratio follows theory up to n = 4;"),
        ({"physics": "linear", "strength": 0.0}, "no theory to compare with"),
        ({"physics": "late"}, "the ratio follows theory at all n"),
        ({"physics": "toy"}, "no theory to compare with"),
    ],
)
def test_one_pair_shows_up_to_where_the_ratio_follows_theory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    verdict: str,
) -> None:
    write_synthetic(tmp_path / "a.h5", seeds=1, **settings)
    assert inspect(monkeypatch, capsys, tmp_path / "a.h5")[-1].startswith(verdict)


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({}, "converged at all n (within a quarter of the excess)"),
        ({"resolution": 2.0}, "they follow n / n_Ny. What depends on the cell is numerical."),
    ],
)
def test_two_cells_show_what_has_converged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, float],
    verdict: str,
) -> None:
    files = [tmp_path / "64.h5", tmp_path / "128.h5"]
    for file, size in zip(files, (64, 128), strict=True):
        write_synthetic(file, seeds=1, size=size, physics="linear", **settings)
    assert inspect(monkeypatch, capsys, *files)[-1].endswith(verdict)
    with h5py.File(files[0], "a") as file:
        file.attrs["box_size"] = 100.0
    monkeypatch.setattr("sys.argv", ["datasets", "inspect", *map(str, files)])
    assert main() == 2
    assert "the same box" in capsys.readouterr().err
