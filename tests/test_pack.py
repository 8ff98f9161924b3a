"""Packing raw gevolution output: values, attributes, failures, and repacking."""

from system import UserError

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datasets import __main__ as commands
from datasets.cube_file import GRAVITIES, CubeFile
from datasets.normalization import Moments
from datasets.preparation import pack as pack_module
from datasets.preparation.cosmology import Cosmology
from datasets.preparation.filter import Filter
from datasets.preparation.gevolution import cosmology
from datasets.preparation.pack import SLAB_BYTES, pack, pack_difference, pack_snapshot, repack

N = 64
CHECKOUT = Path(__file__).parents[1]
REDSHIFTS = (10.0, 1.0, 0.0)
SETTINGS = {
    "seed": "{seed}",
    "h": "0.67556",
    "omega_b": "0.022032",
    "omega_cdm": "0.12038",
    "T_cmb": "2.7255",
    "N_ur": "3.046",
    "A_s": "2.215e-9",
    "boxsize": "5120.0",
    "Ngrid": str(N),
    "gravity theory": "{theory}",
    "snapshot redshifts": "1, 10, 0   # in any order",
}


def field(seed: int, gravity: str, snapshot: int, size: int = N) -> np.ndarray:
    generator = np.random.default_rng([seed, GRAVITIES.index(gravity), snapshot])
    return generator.standard_normal((size,) * 3) * 4e-5 + 1e-6


def settings_file(raw: Path, seed: int, gravity: str) -> Path:
    return raw / f"seed{seed:04d}" / gravity / f"{gravity}_settings_used.ini"


def snapshot_file(raw: Path, seed: int, gravity: str, snapshot: int) -> Path:
    return raw / f"seed{seed:04d}" / gravity / f"{gravity}_snap{snapshot:03d}_phi.h5"


def write_settings(raw: Path, seed: int, gravity: str, /, **changes: str | None) -> None:
    theory = {"gr": "GR", "newton": "Newton"}[gravity]
    settings = {key: value.format(seed=seed, theory=theory) for key, value in SETTINGS.items()} | changes
    lines = [f"{key} = {value}" for key, value in settings.items() if value is not None]
    settings_file(raw, seed, gravity).write_text("# settings\n" + "\n".join(lines) + "\n")


def write_raw(
    raw: Path, values: Callable[..., np.ndarray] = field, *, seeds: int = 2, **storage: Any
) -> Path:
    for seed, gravity in itertools.product(range(seeds), GRAVITIES):
        snapshot_file(raw, seed, gravity, 0).parent.mkdir(parents=True)
        write_settings(raw, seed, gravity)
        for snapshot in range(len(REDSHIFTS)):
            with h5py.File(snapshot_file(raw, seed, gravity, snapshot), "w") as file:
                file.create_dataset("data", data=values(seed, gravity, snapshot), **storage)
    return raw


@pytest.fixture(autouse=True)
def _several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of five planes, the last one of four; at the usual size a small cube would be one slab."""
    monkeypatch.setattr(pack_module, "SLAB_BYTES", 5 * N**2 * 8)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw")


def unpacked(path: Path) -> dict[tuple[int, str], np.ndarray]:
    """The cubes of a packed file, in their original unit."""
    cubes, out = CubeFile(path), {}
    for key in cubes.cubes:
        values = np.empty((cubes.size,) * 3, np.float32)
        cubes.read(*key, values)
        out[key] = values * cubes.attributes["std"] + cubes.attributes["mean"]
    return out


def test_packed_cubes_are_standardized(tmp_path: Path, raw: Path) -> None:
    pack(raw, tmp_path / "out.h5", redshift=1.0)
    everything = np.stack([field(seed, gravity, 1) for seed in range(2) for gravity in GRAVITIES])
    cubes = CubeFile(tmp_path / "out.h5")
    assert (cubes.layout, cubes.seeds, cubes.size) == ("packed", (0, 1), N)
    assert all(cube.direct for cube in cubes.cubes.values())
    assert cubes.attributes["mean"] == pytest.approx(everything.mean(), rel=1e-9)
    assert cubes.attributes["std"] == pytest.approx(everything.std(), rel=1e-12)
    assert cubes.attributes["variance"] == pytest.approx(everything.var(), rel=1e-12)
    for (seed, gravity), values in unpacked(cubes.path).items():
        assert np.abs(values - field(seed, gravity, 1)).max() < 1e-6 * everything.std()


def test_remove_mean_leaves_every_cube_with_mean_0(tmp_path: Path, raw: Path) -> None:
    out, plain = tmp_path / "out.h5", tmp_path / "plain.h5"
    pack(raw, out, redshift=1, remove_mean=True)
    pack(raw, plain, redshift=1)
    with h5py.File(out) as file, h5py.File(plain) as other:
        assert file.attrs["mean_removed"]
        assert not other.attrs["mean_removed"]
        scale = other.attrs["std"] / file.attrs["std"]
        squares = []
        for name, cube in file.items():
            values, expected = (data[()].astype(np.float64) for data in (cube, other[name]))
            np.testing.assert_allclose(values, (expected - expected.mean()) * scale, rtol=0, atol=1e-5)
            squares.append((values**2).mean())
        assert np.mean(squares) == pytest.approx(1, rel=1e-6)


def test_attributes(tmp_path: Path, raw: Path) -> None:
    pack(raw, tmp_path / "out.h5", redshift=1)
    attributes = CubeFile(tmp_path / "out.h5").attributes
    expected = {
        "field": "phi",
        "redshift": 1.0,
        "box_size": 5120.0,
        "box_size_unit": "Mpc/h",
        "gravities": ["newton", "gr"],
        "source": f"gevolution, {raw}",
        "h": 0.67556,
        "A_s": 2.215e-9,
    }
    assert {key: attributes[key] for key in expected} == expected


def test_snapshots_are_numbered_by_time(tmp_path: Path, raw: Path) -> None:
    for snapshot, redshift in enumerate(REDSHIFTS):
        pack_snapshot(raw, tmp_path / "a.h5", snapshot=snapshot, overwrite=True)
        pack(raw, tmp_path / "b.h5", redshift=redshift, overwrite=True)
        assert CubeFile(tmp_path / "a.h5").attributes["redshift"] == redshift
        assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize(
    "storage", [{"dtype": ">f8"}, {"dtype": "<f4"}, {"chunks": (40, 64, 64), "compression": "gzip"}]
)
def test_storage_of_the_input_does_not_matter(tmp_path: Path, raw: Path, storage: dict[str, Any]) -> None:
    pack(raw, tmp_path / "a.h5", redshift=1)
    pack(write_raw(tmp_path / "other", **storage), tmp_path / "b.h5", redshift=1)
    a, b = unpacked(tmp_path / "a.h5"), unpacked(tmp_path / "b.h5")
    assert all(np.allclose(a[key], b[key], rtol=0, atol=1e-10) for key in a)


def test_difference_cancels_linear_newtonian_growth(tmp_path: Path) -> None:
    growth = [Cosmology().potential_growth(redshift) for redshift in REDSHIFTS]

    def linear(seed: int, gravity: str, snapshot: int) -> np.ndarray:
        extra = snapshot * field(seed, "gr", 7) * 0.01 if gravity == "gr" else 0
        return field(seed, "newton", 0) * growth[snapshot] + extra

    pack_difference(write_raw(tmp_path / "raw", linear), tmp_path / "out.h5", redshifts=(10.0, 1.0))
    left = unpacked(tmp_path / "out.h5")
    for seed in range(2):
        expected = -field(seed, "gr", 7) * 0.01 / growth[1]
        assert np.abs(left[seed, "newton"]).max() < 1e-6 * expected.std()
        assert np.abs(left[seed, "gr"] - expected).max() < 1e-5 * expected.std()
    attributes = CubeFile(tmp_path / "out.h5").attributes
    assert attributes["difference_redshifts"] == [10.0, 1.0]
    assert attributes["difference_growth"] == growth[:2]
    assert "redshift" not in attributes


def test_densities_with_and_without_h_squared() -> None:
    settings = {"h": "0.5", "Omega_b": "0.04", "omega_cdm": "0.06", "n_s": "0.9"}
    found = cosmology(settings)
    assert (found.omega_b, found.omega_cdm, found.n_s) == (0.01, 0.06, 0.9)
    assert pytest.approx(0.28) == found.Omega_m


def test_moments_do_not_depend_on_the_partition() -> None:
    values = np.random.default_rng(0).normal(1e6, 1.0, 10_000)  # a naive sum of squares fails here
    whole, parts, half = Moments(), Moments(), Moments()
    whole.add(values.copy())
    for part in np.split(values[:6000].copy(), [7, 8, 5000]):
        parts.add(part)
    half.add(values[6000:].copy())
    parts.merge(half)
    parts.merge(Moments())
    for moments in (whole, parts):
        assert moments.count == 10_000
        assert moments.mean == pytest.approx(values.mean(), rel=1e-13)
        assert moments.variance == pytest.approx(values.var(), rel=1e-9)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "SLAB_BYTES", SLAB_BYTES)
    raw = write_raw(tmp_path / "raw", lambda *key: field(*key, size=2 * N), seeds=1)  # 16 MiB a cube
    tracemalloc.start()
    try:
        pack_difference(raw, tmp_path / "out.h5", redshifts=(10.0, 1.0))
        assert tracemalloc.get_traced_memory()[1] < (2 * N) ** 3 * 8  # a cube
    finally:
        tracemalloc.stop()


# ---- bad input ----


def change(raw: Path, **changes: str | None) -> None:
    write_settings(raw, 1, "gr", **changes)


def replace(raw: Path, values: Any) -> None:
    with h5py.File(snapshot_file(raw, 1, "gr", 1), "w") as file:
        file["data"] = values


def insert_nan(raw: Path) -> None:
    with h5py.File(snapshot_file(raw, 1, "gr", 1), "a") as file:
        file["data"][40, 1, 1] = np.nan


def rename_data(raw: Path) -> None:
    with h5py.File(snapshot_file(raw, 1, "gr", 1), "a") as file:
        file.move("data", "phi")


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no snapshot": (
        lambda raw: snapshot_file(raw, 1, "gr", 1).unlink(),
        ["gr_snap001_phi.h5: no such file", "gr_snap002_phi.h5"],
    ),
    "no twin": (lambda raw: (raw / "seed0001/gr").rename(raw / "seed0001/x"), ["no folder gr", "seeds 1"]),
    "no settings": (lambda raw: settings_file(raw, 1, "gr").unlink(), ["gr_settings_used.ini: no such file"]),
    "no redshift": (
        lambda raw: change(raw, **{"snapshot redshifts": "10, 2, 0"}),
        ["seed0001/gr/gr_settings_used.ini", "no snapshot at redshift 1", "10, 2, 0"],
    ),
    "no list": (lambda raw: change(raw, **{"snapshot redshifts": None}), ["snapshot redshifts = (missing)"]),
    "other box": (lambda raw: change(raw, boxsize="320"), ["boxsize = 320", "5120.0", "must agree"]),
    "other seed": (lambda raw: change(raw, seed="7"), ["seed = 7", "its twin has 1"]),
    "other theory": (lambda raw: change(raw, **{"gravity theory": "Newton"}), ["= Newton", "folder is gr"]),
    "other size": (lambda raw: replace(raw, np.zeros((128,) * 3, "f4")), ["(128, 128, 128)", "(64, 64, 64)"]),
    "not cubic": (lambda raw: replace(raw, np.zeros((64, 64, 32))), ["(64, 64, 32)", "multiple of 64"]),
    "not numeric": (lambda raw: replace(raw, np.full((64,) * 3, b"x")), ["no numeric data set `data`"]),
    "no data": (rename_data, ["no numeric data set `data`", "phi"]),
    "not HDF5": (lambda raw: snapshot_file(raw, 1, "gr", 1).write_text("x" * 99), ["not an HDF5 file"]),
    "truncated": (lambda raw: os.truncate(snapshot_file(raw, 1, "gr", 1), 10_000), ["truncated"]),
    "too large": (
        lambda raw: replace(raw, np.full((N, N, N), 1e300) * (np.arange(N) - 9)),
        ["variance", "float64"],
    ),
    "NaN": (insert_nan, ["seed0001/gr/gr_snap001_phi.h5", "NaN"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_raw_output(tmp_path: Path, raw: Path, kind: str) -> None:
    damage, words = BAD[kind]
    damage(raw)
    with pytest.raises(UserError) as caught:
        pack(raw, tmp_path / "out.h5", redshift=1)
    assert len(str(caught.value).splitlines()) <= 3
    for word in words:
        assert word in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_invalid_requests(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "out.h5"
    for call, words in (
        (lambda: pack(tmp_path / "gone", out, redshift=1), "not a folder"),
        (lambda: pack(raw / "seed0000", out, redshift=1), "no folders seed0000"),
        (lambda: pack_snapshot(raw, out, snapshot=3), "no snapshot 3"),
        (lambda: pack_difference(raw, out, redshifts=(1.0, 1.0)), "all values are"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    change(raw, **{"snapshot redshifts": "10, 2, 0"})
    with pytest.raises(UserError, match="several redshifts"):
        pack_snapshot(raw, out, snapshot=1)
    (raw / "seed00001").mkdir()
    with pytest.raises(UserError, match="are the same seed"):
        pack(raw, out, redshift=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_massive_neutrinos_allow_no_difference(tmp_path: Path, raw: Path) -> None:
    for seed, gravity in itertools.product(range(2), GRAVITIES):
        write_settings(raw, seed, gravity, m_ncdm="0.06")
    pack(raw, tmp_path / "out.h5", redshift=1)
    with pytest.raises(UserError, match=r"m_ncdm = 0\.06"):
        pack_difference(raw, tmp_path / "d.h5", redshifts=(10.0, 1.0))


# ---- failures leave no incomplete file ----


def test_existing_files_are_kept_without_force(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("precious")
    with pytest.raises(UserError, match=r"exists already.*--force"):
        pack(raw, out, redshift=1)
    assert out.read_text() == "precious"
    pack(raw, out, redshift=1, overwrite=True)
    CubeFile(out).require(range(2))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left"), RuntimeError("HDF5")])
def test_a_failure_leaves_no_file(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls = itertools.count()

    def fail_later(*arguments: Any) -> None:
        if next(calls) == 2:
            assert [entry.suffix for entry in tmp_path.iterdir() if entry.is_file()] == [".partial"]
            raise error
        original(*arguments)

    original = pack_module._standardize
    monkeypatch.setattr(pack_module, "_standardize", fail_later)
    with pytest.raises((KeyboardInterrupt, UserError)):
        pack(raw, tmp_path / "out.h5", redshift=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_a_killed_pack_leaves_the_old_file(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("precious")
    program = (
        "import os, signal, sys; from pathlib import Path; from datasets.preparation import pack\n"
        "original = pack._standardize\n"
        "def standardize(*arguments):\n"
        "    original(*arguments)\n"
        "    if arguments[-2].simulation.seed == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack._standardize = standardize\n"
        "pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), redshift=1, overwrite=True)\n"
    )
    command = [sys.executable, "-c", program, str(raw), str(out)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert out.read_text() == "precious"
    assert len(list(tmp_path.glob("*.h5"))) == 1
    (partial,) = tmp_path.glob("out.h5.*.partial")
    with partial.open("rb") as file:  # another program still writes it
        fcntl.flock(file, fcntl.LOCK_EX)
        pack(raw, out, redshift=1, overwrite=True)
        assert partial.exists()
    pack(raw, out, redshift=1, overwrite=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"out.h5", "raw"}


def test_permissions_follow_the_umask(tmp_path: Path, raw: Path) -> None:
    previous = os.umask(0o027)
    try:
        pack(raw, tmp_path / "out.h5", redshift=1)
    finally:
        os.umask(previous)
    assert (tmp_path / "out.h5").stat().st_mode & 0o777 == 0o640


def test_free_space_is_checked_first(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: _Usage)
    with pytest.raises(UserError, match="not enough space"):
        pack(raw, tmp_path / "new folder" / "out.h5", redshift=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


class _Usage:
    free = 4 * N**3 * 4 - 1


# ---- repack and the commands ----


def test_repack(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    expected = {}
    with h5py.File(tmp_path / "slow.h5", "w") as file:
        file.attrs.update({"std": 2.0, "names": ["a", "b"]})
        for seed, gravity in itertools.product(range(2), GRAVITIES):
            expected[seed, gravity] = generator.standard_normal((N,) * 3).astype(np.float32)
            values = expected[seed, gravity].astype(">f8")
            file.create_dataset(f"{seed}/{gravity}", data=values, chunks=(8, 8, 8), compression="gzip")
    assert CubeFile(tmp_path / "slow.h5").slow_chunks()
    repack(tmp_path / "slow.h5", tmp_path / "fast.h5")
    fast = CubeFile(tmp_path / "fast.h5")
    assert fast.slow_chunks() is None
    assert fast.layout == "packed"
    assert fast.attributes == {"std": 2.0, "names": ["a", "b"]}
    out = np.empty((N,) * 3, np.float32)
    for key, values in expected.items():
        assert fast.cubes[key].direct
        fast.read(*key, out)
        assert np.array_equal(out, values)
    repack(fast.path, fast.path, overwrite=True)  # in place
    assert CubeFile(fast.path).seeds == (0, 1)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["datasets", *map(str, arguments)])
    previous = signal.getsignal(signal.SIGTERM)
    try:
        return commands.main()
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_commands(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d, e = (tmp_path / f"{name}.h5" for name in "abcde")
    assert run(monkeypatch, "pack", raw, a, "--redshift", 1) == 0
    assert run(monkeypatch, "pack", raw, b, "--snapshot", 1) == 0
    assert a.read_bytes() == b.read_bytes()
    assert run(monkeypatch, "pack", raw, b, "--difference", 10, 1) == 2
    assert run(monkeypatch, "pack", raw, b, "--difference", 10, 1, "--force") == 0
    assert CubeFile(b).attributes["difference_redshifts"] == [10.0, 1.0]
    assert run(monkeypatch, "repack", a, c) == 0
    assert CubeFile(c).seeds == (0, 1)
    assert run(monkeypatch, "synthesize", d, "--seeds", 1, "--strength", 15, "--seed", 2) == 0
    assert CubeFile(d).attributes["strength"] == 15.0
    assert CubeFile(d).attributes["seed"] == 2
    assert run(monkeypatch, "synthesize", e, "--seeds", 1, "--physics", "linear", "--grid", 1) == 0
    assert CubeFile(e).attributes["physics"] == "linear"
    assert CubeFile(e).attributes["grid"] == 1.0


def test_commands_with_invalid_input(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.h5"
    for arguments in (
        ("pack", raw, out, "--redshift", 3),
        ("pack", tmp_path / "gone", out, "--redshift", 1),
        ("synthesize", out, "--seeds", 0),
        ("synthesize", out, "--seeds", 1, "--size", 100),
        ("repack", tmp_path / "gone.h5", out),
        ("inspect", tmp_path / "gone.h5"),
    ):
        assert run(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "Traceback" not in error
    for arguments in (("pack", raw, out), ("pack", raw, out, "--redshift", "one"), ()):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *arguments)
        assert ended.value.code == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_a_filter_acts_on_the_whole_cube_before_standardization(tmp_path: Path, raw: Path) -> None:
    pack(raw, tmp_path / "all.h5", redshift=1)
    pack(raw, tmp_path / "few.h5", redshift=1, filter=Filter(4))
    everything, few = unpacked(tmp_path / "all.h5"), unpacked(tmp_path / "few.h5")
    for key, cube in everything.items():
        np.testing.assert_allclose(few[key], Filter(4)(cube), atol=1e-5 * np.abs(cube).max())
    packed = CubeFile(tmp_path / "few.h5").attributes
    assert (packed["max_wavenumber"], packed["cells"]) == (4.0, N)
    assert packed["std"] < 0.9 * CubeFile(tmp_path / "all.h5").attributes["std"]
