"""`inspect` and the checks of cubes: reports on complete and damaged files, and the plot."""

from system import UserError

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import matplotlib.image
import numpy as np
import pytest

from datasets import __main__ as commands
from datasets import check_normalization, check_seeds, data_warnings, write_synthetic
from datasets.cube_file import GRAVITIES, CubeFile
from datasets.preparation import checks
from datasets.preparation.inspect import MAX_PROBLEMS, check_plot, draw, plot, report

N = 64


def twins(seed: int) -> np.ndarray:
    """Twins (2, N, N, N) that differ by little noise."""
    generator = np.random.default_rng(seed)
    common, own = generator.standard_normal((1, N, N, N)), generator.standard_normal((2, N, N, N))
    return (common + 0.01 * own).astype(np.float32)


def write(path: Path, seeds: int = 3, scale: float = 1.0, **storage: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs.update({"std": 4e-5, "mean": 0.0, "box_size": 5120.0, "redshift": 1.0, "field": "phi"})
        for seed in range(seeds):
            for gravity, values in zip(GRAVITIES, twins(seed), strict=True):
                file.create_dataset(f"{gravity}_seed{seed:04d}", data=scale * values, **storage)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "cubes.h5")


def rows(text: str) -> dict[str, str]:
    """The report as name -> text."""
    split = (line.split("  ", 1) for line in text.splitlines() if not line.startswith("  "))
    return {parts[0]: parts[-1].strip() for parts in split}


def problems(path: Path) -> list[str]:
    lines = report(path)[0].split("\nproblems", 1)[1].splitlines()[1:]
    return [line.strip() for line in lines if not line.startswith("warning")]


def warnings(path: Path) -> list[str]:
    return [line for line in report(path)[0].splitlines() if line.startswith("warning: ")]


def test_report_on_a_complete_file(path: Path) -> None:
    text, count, sound = report(path)
    found = rows(text)
    assert sound
    assert count == 0
    assert found["layout"].startswith("packed")
    assert found["seeds"] == "3 with both twins: 0-2"
    assert found["gravities"] == "newton (3 cubes), gr (3 cubes)"
    assert (found["shape"], found["type"], found["storage"]) == ("(64, 64, 64)", "float32", "contiguous")
    assert found["problems"] == "none"
    assert "\n  box_size" in text
    with h5py.File(path) as file:
        for gravity in GRAVITIES:
            values = np.concatenate([file[f"{gravity}_seed{seed:04d}"][()] for seed in range(3)])
            values = values.astype(np.float64)
            assert found[gravity] == f"mean {values.mean():.6g}, std {values.std():.6g}"
    assert not warnings(path)


def test_report_on_a_damaged_file(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["gr_seed0000"][1, 2, 3:5] = np.nan, np.inf
        file["newton_seed0000"][4, 5, 6] = np.inf
        del file["gr_seed0001"], file["newton_seed0002"]
        file["gr_seed0003"] = np.zeros((N, N, N // 2), np.float32)
        file["newton_seed0003"] = np.full((N, N, N), b"x")
        file.create_dataset("gr_seed0005", shape=(N, N, N), dtype="f4")
    text, count, sound = report(path)
    assert not sound
    assert count == 7
    assert rows(text)["seeds"] == "1 with both twins: 0"
    assert problems(path) == [
        "missing twins: no newton cube for seeds 2",
        "missing twins: no gr cube for seeds 1",
        "cube /gr_seed0003 has the shape (64, 64, 32); (N, N, N) is needed.",
        "cube /newton_seed0003 has the type |S1; real numbers are needed.",
        "cube /gr_seed0005 was never written; the program that created the file did not finish. Repeat it.",
        "cube /gr_seed0000 has 2 values that are NaN, infinite or too large for float32, the first at index "
        "(1, 2, 3). Copy the file again, or rerun this simulation.",
        "cube /newton_seed0000 has 1 values that are NaN, infinite or too large for float32, the first at "
        "index (4, 5, 6). Copy the file again, or rerun this simulation.",
    ]


def test_gaps_name_the_command_that_closes_them(path: Path) -> None:
    with h5py.File(path, "a") as file:
        for gravity in GRAVITIES:
            file.move(f"{gravity}_seed0000", f"{gravity}_seed0004")
    command = f"python -m datasets repack {path} {path.with_name('cubes_renumbered.h5')} --renumber"
    assert problems(path)[0] == f"missing seeds: 0, 3; training needs seeds 0, 1, 2, ...: {command}"


def put(name: str, values: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][...] = values(file[name][()])

    return change


def copy(file: h5py.File) -> None:
    for gravity in GRAVITIES:
        file[f"{gravity}_seed0001"][...] = file[f"{gravity}_seed0000"][()]


def exchange(file: h5py.File) -> None:
    file.move("gr_seed0000", "x")
    file.move("gr_seed0002", "gr_seed0000")
    file.move("x", "gr_seed0002")


def rerun(file: h5py.File) -> None:
    file["newton_seed0001"][...] = 1.5 * twins(0)[0] + 0.02 * twins(9)[0]
    file["gr_seed0001"][...] = 1.5 * twins(0)[1] + 0.02 * twins(9)[0]


BLOCKS = np.add.outer(np.arange(N) // 8, np.arange(N) // 8)[:, :, None]

# What was done to a file; what its report says; what training says, if it looks at every pair.
SPOILED: dict[str, tuple[Callable[[h5py.File], None], list[str], str]] = {
    "other initial conditions": (
        put("gr_seed0001", lambda cube: twins(7)[0]),
        ["seeds 1: the cubes are not twins: correlation ", "seed 1: they have different initial conditions"],
        "seed 1 are not twins",
    ),
    "twins of other seeds": (
        exchange,
        ["seeds 0, 2: the cubes are", "several seeds: /gr_seed0000, /newton_seed0002"],
        "seed 0 are not twins",
    ),
    "shifted": (
        put("gr_seed0001", lambda cube: np.roll(cube, 1, axis=2)),
        ["seed 1: the GR cube has the same initial conditions, but it is shifted by (0, 0, 1) cells"],
        "shifted by (0, 0, 1) cells",
    ),
    "transposed": (
        put("gr_seed0001", lambda cube: cube.transpose(2, 0, 1)),
        ["seed 1: the GR cube has the same initial conditions, but its axes are in the order (2, 0, 1)"],
        "in the order (2, 0, 1)",
    ),
    "reversed": (
        put("gr_seed0001", lambda cube: cube[::-1, :, ::-1]),
        ["axis 0 is reversed, axis 2 is reversed"],
        "axis 0 is reversed, axis 2 is reversed",
    ),
    "copied seed": (
        copy,
        ["equal cubes: /gr_seed0000, /gr_seed0001.", "equal cubes: /newton_seed0000, /newton_seed0001."],
        "/newton_seed0001 equals /newton_seed0000",
    ),
    "identical twins": (
        put("gr_seed0001", lambda cube: twins(1)[0]),
        ["equal cubes: /gr_seed0001, /newton_seed0001."],
        "/gr_seed0001 equals /newton_seed0001",
    ),
    "same random seed": (rerun, ["one realization, but several seeds: /gr_seed0000, /newton_seed0000, "], ""),
    "last planes missing": (
        put("newton_seed0001", lambda cube: np.where(np.arange(N)[:, None, None] < 48, cube, 0)),
        ["/newton_seed0001: planes 48-63 along axis 0 are constant."],
        "/newton_seed0001: planes 48-63 along axis 0",
    ),
    "plane along axis 2": (
        put("gr_seed0002", lambda cube: np.where(np.arange(N) == 5, 1, cube)),
        ["/gr_seed0002: planes 5 along axis 2 are constant."],
        "planes 5 along axis 2",
    ),
    "blocks of processes": (
        put("gr_seed0002", lambda cube: np.where(BLOCKS == 9, 0, cube)),
        ["/gr_seed0002: 384 lines are constant"],
        "384 lines",
    ),
    "constant": (put("gr_seed0002", np.zeros_like), ["/gr_seed0002: all values are 0."], "all values are 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_what_spoils_a_result_is_a_problem_and_stops_training(path: Path, kind: str) -> None:
    spoil, lines, message = SPOILED[kind]
    with h5py.File(path, "a") as file:
        spoil(file)
    found = problems(path)
    assert not report(path)[2]
    for line in lines:
        assert any(line in problem for problem in found), found
    if message:
        with pytest.raises(UserError) as caught:
            start(CubeFile(path))
        assert message in str(caught.value)


def start(cubes: CubeFile) -> None:
    """What training looks at before it starts."""
    check_seeds(cubes, range(3))
    cubes.identity(range(3))


def test_only_the_ends_of_large_sets_are_read_before_training(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with h5py.File(path, "a") as file:
        file["gr_seed0001"][...] = 0
    cubes = CubeFile(path)
    with pytest.raises(UserError, match="/gr_seed0001"):
        check_seeds(cubes, range(3))
    monkeypatch.setattr(checks, "CHECKED_BYTES", 5 * 4 * N**3)
    check_seeds(cubes, range(3))
    with pytest.raises(UserError, match="/gr_seed0001"):
        check_seeds(cubes, range(2), range(2, 3), range(3, 3))


@pytest.mark.parametrize(
    "options",
    [{"strength": 15}, {"strength": 0}, {"strength": 1e7}, {"physics": "linear", "strength": 99, "grid": 50}],
)
def test_synthetic_universes_raise_no_alarm(tmp_path: Path, options: dict[str, Any]) -> None:
    write_synthetic(tmp_path / "cubes.h5", seeds=2, size=64, **options)
    cubes = CubeFile(tmp_path / "cubes.h5")
    check_seeds(cubes, range(2))
    cubes.identity(range(2))
    survey = checks.survey(cubes)
    assert not survey.problems(str)
    assert not survey.warnings()


def test_warnings(tmp_path: Path, path: Path) -> None:
    cubes = CubeFile(path)
    assert data_warnings(cubes, range(3)) == []
    small = CubeFile(write(tmp_path / "small.h5", scale=1e-5))
    text = "phi, z = 1: the standard deviation is 1e-05, not 1: set data_params.standardize to train"
    assert data_warnings(small, range(3)) == [text]
    assert data_warnings(small, range(3), standardize="train") == []
    assert warnings(small.path) == [f"warning: {text}"]
    with h5py.File(small.path, "a") as file:
        file.attrs["box_size"] = 320.0
    other = data_warnings(CubeFile(small.path), range(3), standardize="train", trained_on=cubes)
    assert other == ["the box is 320 Mpc/h, that of the training was 5120 Mpc/h"]
    with h5py.File(path, "a") as file:
        for seed in range(3):
            gr = 1.02 * file[f"gr_seed{seed:04d}"][()]
            del file[f"gr_seed{seed:04d}"]
            file[f"gr_seed{seed:04d}"] = gr.astype(np.float64)
    text = "seeds 0-2: P_GR/P_N is 1.04 to 1.04 at all n > 4, where theory predicts 1."
    assert [warning[: len(text)] for warning in data_warnings(CubeFile(path), range(3))] == [text]
    found = warnings(path)
    assert len(found) == 2
    assert text in found[0]
    assert "newton float32, gr float64" in found[1]
    with h5py.File(path, "a") as file:
        for seed in (0, 2):
            file[f"gr_seed{seed:04d}"][...] = file[f"gr_seed{seed:04d}"][()] / 1.02
    assert "seeds 1: P_GR/P_N" in warnings(path)[0]  # the mean is below the limit
    with h5py.File(path, "a") as file:
        file.attrs["difference_redshifts"] = [10.0, 1.0]
    assert data_warnings(CubeFile(path), range(3)) == []


def test_slow_and_damaged_chunks_are_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "cubes.h5", seeds=1, chunks=(N, N, N), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["gr_seed0000"].id.get_chunk_info(0)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(1000))
    found = problems(path)
    assert any(problem.startswith("cube /gr_seed0000 cannot be read") for problem in found)
    assert "python -m datasets repack" in warnings(path)[0]


def test_long_lists_of_problems_are_shortened(path: Path) -> None:
    with h5py.File(path, "a") as file:
        for seed in range(3, 30):
            file[f"gr_seed{seed:04d}"] = np.zeros((seed + 1, 2, 2))
    found = problems(path)
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1] == "... and 7 more"


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
    assert tuple(cells.images[0].get_extent()) == (0, N, 0, N)
    assert "cells" in cells.get_xlabel()
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


def test_no_table_follows_a_problem(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, path) == 0
    assert "P_GR/P_N by n" in capsys.readouterr().out
    with h5py.File(path, "a") as file:
        file["gr_seed0001"][...] = 0
    assert run(monkeypatch, path) == 2
    output = capsys.readouterr()
    assert "found problems (1), listed above" in output.err
    assert "P_GR/P_N by n" not in output.out
    assert "Warning" not in output.err


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
    assert run(monkeypatch, tmp_path / "mean.h5") == 0
    shown = capsys.readouterr().out
    assert "P_GR/P_N by n" in shown
    assert "warning: The mean of a cube separates the labels (AUC 1.000)" in shown
