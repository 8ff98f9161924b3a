"""`inspect`: reports on complete and damaged files, and the plot."""

from system import UserError

import os
import sys
from pathlib import Path
from typing import Any

import h5py
import matplotlib.image
import numpy as np
import pytest

from datasets import __main__ as commands
from datasets import check_normalization, write_synthetic
from datasets.cube_file import GRAVITIES, CubeFile
from datasets.preparation import inspect
from datasets.preparation.inspect import MAX_PROBLEMS, check_plot, draw, plot, report

N = 64


def write(path: Path, seeds: int = 3, **storage: Any) -> Path:
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update({"std": 4e-5, "mean": 0.0, "box_size": 5120.0, "redshift": 1.0, "field": "phi"})
        for seed in range(seeds):
            for gravity in GRAVITIES:
                values = generator.standard_normal((N, N, N)).astype(np.float32)
                file.create_dataset(f"{gravity}_seed{seed:04d}", data=values, **storage)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "cubes.h5")


def rows(text: str) -> dict[str, str]:
    """The report as name -> text."""
    split = (line.split("  ", 1) for line in text.splitlines() if not line.startswith("  "))
    return {parts[0]: parts[-1].strip() for parts in split}


def problems(text: str) -> list[str]:
    return [line.strip() for line in text.split("\nproblems", 1)[1].splitlines()[1:]]


def test_report_on_a_complete_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "SLAB_BYTES", 5 * N**2 * 8)  # several slabs a cube
    text = report(path)
    found = rows(text)
    assert found["layout"].startswith("packed")
    assert found["seeds"] == "3 with both twins: 0-2"
    assert found["gravities"] == "newton (3 cubes), gr (3 cubes)"
    assert (found["shape"], found["type"], found["storage"]) == ("(64, 64, 64)", "float32", "contiguous")
    assert found["problems"] == "none"
    assert "\n  box_size" in text
    with h5py.File(path) as file:
        for gravity in GRAVITIES:
            names = [f"{gravity}_seed{seed:04d}" for seed in range(3)]
            values = np.stack([file[name][...] for name in names]).astype(np.float64)
            assert found[gravity] == f"mean {values.mean():.6g}, std {values.std():.6g}"
        everything = np.stack([file[name][...] for name in file]).astype(np.float64)
    assert found["all values"] == f"mean {everything.mean():.6g}, std {everything.std():.6g}"


def test_report_lists_every_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "cubes.h5", seeds=6)
    with h5py.File(path, "a") as file:
        file["gr_seed0000"][1, 2, 3:5] = np.nan
        file["newton_seed0000"][0, 0, 0] = np.inf
        del file["gr_seed0001"], file["newton_seed0002"], file["gr_seed0004"], file["newton_seed0004"]
        del file["gr_seed0003"], file["newton_seed0003"], file["gr_seed0005"]
        file["gr_seed0003"] = np.zeros((N, N, N // 2), np.float32)
        file["newton_seed0003"] = np.full((N, N, N), b"x")
        file.create_dataset("gr_seed0005", shape=(N, N, N), dtype="f4")
    text = report(path)
    assert rows(text)["seeds"] == "3 with both twins: 0, 3, 5"
    assert problems(text) == [
        "missing twins: no newton cube for seeds 2",
        "missing twins: no gr cube for seeds 1",
        "missing seeds: 4; training needs seeds from 0 without gaps",
        "cube /gr_seed0003 has the shape (64, 64, 32); (N, N, N) is needed.",
        "cube /newton_seed0003 has the type |S1; real numbers are needed.",
        "cube /gr_seed0005 was never written; the program that created the file did not finish. Repeat it.",
        "/gr_seed0000 has 2 values that are NaN, infinite or beyond float32",
        "/newton_seed0000 has 1 values that are NaN, infinite or beyond float32",
    ]


def test_first_cube_of_another_size(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["gr_seed0000"]
        file["gr_seed0000"] = np.zeros(())
    assert any("/gr_seed0000 has the shape ()" in problem for problem in problems(report(path)))


def test_slow_and_damaged_chunks_are_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "cubes.h5", seeds=1, chunks=(N, N, N), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["gr_seed0000"].id.get_chunk_info(0)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(1000))
    found = problems(report(path))
    assert any(problem.startswith("/gr_seed0000 cannot be read") for problem in found)
    assert any("python -m datasets repack" in problem for problem in found)


def test_values_beyond_float32_are_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "cubes.h5", seeds=1, dtype="f8")
    with h5py.File(path, "a") as file:
        file["gr_seed0000"][1, 2, 3] = 1e39
    assert problems(report(path)) == ["/gr_seed0000 has 1 values that are NaN, infinite or beyond float32"]


def test_memory_is_bounded_for_planes_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "cubes.h5", seeds=1)
    expected = report(path)
    sizes = []

    class Recorder(inspect.Moments):
        def add(self, values: np.ndarray) -> None:
            sizes.append(values.nbytes)
            super().add(values)

    monkeypatch.setattr(inspect, "Moments", Recorder)
    monkeypatch.setattr(inspect, "SLAB_BYTES", 10 * N * 8)  # ten rows
    assert report(path) == expected
    assert max(sizes) <= 10 * N * 8


def test_data_sets_of_a_wrong_shape_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "cubes.h5")
    with h5py.File(path, "a") as file:
        del file["gr_seed0000"]
        huge = file.create_dataset("gr_seed0000", shape=(2**40, 2, 2), chunks=(1024, 2, 2), dtype="f4")
        huge[0] = 1
    assert any("/gr_seed0000 has the shape" in problem for problem in problems(report(path)))


def test_long_lists_of_problems_are_shortened(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "cubes.h5", "w") as file:
        for seed in range(30):
            file[f"gr_seed{seed:04d}"] = np.zeros((seed + 1, 2, 2))
    found = problems(report(tmp_path / "cubes.h5"))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1] == "... and 11 more"


def test_files_that_cannot_be_opened(tmp_path: Path, path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(UserError, match="truncated"):
        report(path)
    with pytest.raises(UserError, match="no such file"):
        report(tmp_path / "gone.h5")


def test_plot_shows_the_slices_in_physical_units() -> None:
    generator = np.random.default_rng(0)
    gr, newton = generator.standard_normal((2, N, N))
    gr[0, 0] = np.nan
    figure = draw(gr, newton, box_size=5120.0, label="phi", title="title")
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["General Relativity", "Newtonian twin", "GR − Newton"]
    for axes, values in zip(panels, (gr, newton, gr - newton), strict=True):
        image = axes.images[0]
        assert np.array_equal(np.ma.filled(image.get_array(), np.nan), values.T, equal_nan=True)
        assert tuple(image.get_extent()) == (0, 5120, 0, 5120)
        assert image.norm.vmin == -image.norm.vmax
        assert "Mpc/h" in axes.get_xlabel()
    assert panels[0].images[0].norm.vmax == panels[1].images[0].norm.vmax
    cells = draw(gr, newton, box_size=None, label="phi", title="title").axes[0]
    assert cells.get_xlabel() == "y  [cells]"
    assert tuple(cells.images[0].get_extent()) == (0, N, 0, N)


def test_equal_twins_can_be_plotted() -> None:
    zeros = np.zeros((N, N))
    figure = draw(zeros, zeros, box_size=None, label="phi", title="title")
    figure.canvas.draw()
    assert all(np.isfinite(axes.images[0].norm.vmax) for axes in figure.axes[:3])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["datasets", "inspect", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return commands.main()


def test_command_prints_and_plots(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plot.png"
    assert run(monkeypatch, path) == 0
    assert not out.exists()
    assert run(monkeypatch, path, "--plot", out) == 0
    assert capsys.readouterr().out.count("problems") == 2
    assert matplotlib.image.imread(out).shape[1] > 1000
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cubes.h5", "plot.png"]
    out.write_text("precious")
    assert run(monkeypatch, path, "--plot", out) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert run(monkeypatch, path, "--plot", out, "--force") == 0
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize("value", ["5 Gpc", [1.0, 2.0], np.nan, h5py.Empty("f8")], ids=str)
def test_attributes_that_are_not_numbers_are_ignored(path: Path, tmp_path: Path, value: Any) -> None:
    with h5py.File(path, "a") as file:
        for name in ("box_size", "redshift", "synthetic", "mean", "std"):
            file.attrs[name] = value
    plot(path, tmp_path / "plot.png")
    check_normalization(CubeFile(path), CubeFile(path))
    assert CubeFile(path).attr_float("box_size") is None


def test_plots_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found ending .* allowed: "):
        check_plot(tmp_path / "plot.h5", overwrite=False)
    with pytest.raises(UserError, match="no folder"):
        check_plot(tmp_path / "gone" / "plot.png", overwrite=False)
    with h5py.File(path, "a") as file:
        for seed in range(3):
            del file[f"gr_seed{seed:04d}"]
    with pytest.raises(UserError, match="nothing to plot"):
        plot(path, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_inspect_warns_if_the_mean_separates_the_gravities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_synthetic(tmp_path / "mean.h5", seeds=3, size=64, strength=1)
    with h5py.File(tmp_path / "mean.h5", "a") as file:
        for seed in range(3):
            file[f"gr_seed{seed:04d}"][...] = file[f"gr_seed{seed:04d}"][:] + 0.5
    monkeypatch.setattr(sys, "argv", ["datasets", "inspect", str(tmp_path / "mean.h5")])
    assert commands.main() == 0
    shown = capsys.readouterr().out
    assert "P_GR/P_N by n" in shown
    assert "warning: The mean of a cube separates the labels (AUC 1.000)" in shown
