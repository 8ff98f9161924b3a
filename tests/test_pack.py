"""Packing raw gevolution output: values, attributes, settings, failures; repacking; the commands."""

from system import UserError

import fcntl
import itertools
import logging
import os
import shutil
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
from datasets.moments import Moments
from datasets.preparation import checks
from datasets.preparation import pack as pack_module
from datasets.preparation.cosmology import Cosmology
from datasets.preparation.filter import Filter
from datasets.preparation.gevolution import Simulation, cosmology
from datasets.preparation.pack import SLAB_BYTES, Options, pack
from datasets.preparation.repack import repack

N = 64
FORCE = Options(overwrite=True)
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
    "tiling factor": "16",
    "snapshot file base": "{gravity}_snap",
    "snapshot redshifts": "1, 10, 0   # in any order",
}
# The same simulation as gevolution describes it after a restart.
RESUMED = {
    "IC generator": "restart",
    "cycle": "120",
    "tau": "1.5e-3",
    "Omega_b": "4.827529e-02",
    "Omega_cdm": "2.637705e-01",
    "Omega_g": "5.418294e-05",
    "Omega_ur": "3.748371e-05",
    "N_ncdm": "0",
    "switch linear chi": "0.000000",
    **dict.fromkeys(("omega_b", "omega_cdm", "T_cmb", "N_ur", "tiling factor")),
}


def field(seed: int, gravity: str, snapshot: int, size: int = N) -> np.ndarray:
    """The twins of a seed differ by little noise."""
    common, own = (np.random.default_rng(key) for key in ([seed], [seed, GRAVITIES.index(gravity), snapshot]))
    values = common.standard_normal((size,) * 3) + 0.01 * own.standard_normal((size,) * 3)
    return (1 + 0.1 * snapshot) * values * 4e-5 + 1e-6


def settings_file(raw: Path, seed: int, gravity: str) -> Path:
    return raw / f"seed{seed:04d}" / gravity / f"{gravity}_settings_used.ini"


def snapshot_file(raw: Path, seed: int, gravity: str, snapshot: int) -> Path:
    return raw / f"seed{seed:04d}" / gravity / f"{gravity}_snap{snapshot:03d}_phi.h5"


def write_settings(raw: Path, seed: int, gravity: str, changes: dict[str, str | None] | None = None) -> None:
    values = {"seed": seed, "gravity": gravity, "theory": {"gr": "GR", "newton": "Newton"}[gravity]}
    settings = {key: value.format(**values) for key, value in SETTINGS.items()} | (changes or {})
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


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("template") / "raw")


@pytest.fixture
def raw(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "raw"))


def unpacked(path: Path) -> dict[tuple[int, str], np.ndarray]:
    """The cubes of a packed file, in their original unit."""
    cubes, out = CubeFile(path), {}
    for key in cubes.cubes:
        values = np.empty((cubes.size,) * 3, np.float32)
        cubes.read(*key, values)
        out[key] = values * cubes.attributes["std"] + cubes.attributes["mean"]
    return out


def test_packed_cubes_are_standardized(tmp_path: Path, raw: Path) -> None:
    pack(raw, tmp_path / "out.h5", redshifts=[1.0])
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
    out, plain, again = (tmp_path / f"{name}.h5" for name in ("out", "plain", "again"))
    pack(raw, out, redshifts=[1], options=Options(remove_mean=True))
    pack(raw, plain, redshifts=[1])
    repack([plain], again, options=Options(remove_mean=True))
    with h5py.File(out) as file, h5py.File(plain) as other, h5py.File(again) as repacked:
        assert file.attrs["remove_mean"]
        assert repacked.attrs["remove_mean"]
        scale = other.attrs["std"] / file.attrs["std"]
        squares = []
        for name, cube in file.items():
            values, expected = (data[()].astype(np.float64) for data in (cube, other[name]))
            np.testing.assert_allclose(values, (expected - expected.mean()) * scale, rtol=0, atol=1e-5)
            np.testing.assert_allclose(repacked[name], expected - expected.mean(), rtol=0, atol=1e-6)
            squares.append((values**2).mean())
        assert np.mean(squares) == pytest.approx(1, rel=1e-6)


def test_attributes(tmp_path: Path, raw: Path) -> None:
    for seed, gravity in itertools.product(range(2), GRAVITIES):
        write_settings(raw, seed, gravity, {"radiation treatment": "class", "gauge": "synchronous"})
    pack(raw, tmp_path / "out.h5", redshifts=[1])
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
        "radiation treatment": "CLASS",
        "gauge": "synchronous",
    }
    assert {key: attributes[key] for key in expected} == expected


def test_snapshots_are_numbered_by_time(tmp_path: Path, raw: Path) -> None:
    for snapshot, redshift in enumerate(REDSHIFTS):
        pack(raw, tmp_path / "a.h5", snapshot=snapshot, options=FORCE)
        pack(raw, tmp_path / "b.h5", redshifts=[redshift], options=FORCE)
        assert CubeFile(tmp_path / "a.h5").attributes["redshift"] == redshift
        assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert CubeFile(tmp_path / "a.h5").attributes["radiation treatment"] == "background"


@pytest.mark.parametrize(
    "storage", [{"dtype": ">f8"}, {"dtype": "<f4"}, {"chunks": (40, 64, 64), "compression": "gzip"}]
)
def test_storage_of_the_input_does_not_matter(tmp_path: Path, raw: Path, storage: dict[str, Any]) -> None:
    pack(raw, tmp_path / "a.h5", redshifts=[1])
    pack(write_raw(tmp_path / "other", **storage), tmp_path / "b.h5", redshifts=[1])
    a, b = unpacked(tmp_path / "a.h5"), unpacked(tmp_path / "b.h5")
    assert all(np.allclose(a[key], b[key], rtol=0, atol=1e-10) for key in a)


def test_difference_cancels_linear_newtonian_growth(tmp_path: Path) -> None:
    growth = [Cosmology().potential_growth(redshift) for redshift in REDSHIFTS]

    def linear(seed: int, gravity: str, snapshot: int) -> np.ndarray:
        """A linear field, and what grows otherwise: nearly the same in both twins."""
        extra = np.random.default_rng([7, seed]).standard_normal((N, N, N)) * 4e-7
        return field(seed, "newton", 0) * growth[snapshot] + snapshot * extra * (1 + 0.1 * (gravity == "gr"))

    pack(write_raw(tmp_path / "raw", linear), tmp_path / "out.h5", difference=(10.0, 1.0))
    left = unpacked(tmp_path / "out.h5")
    for seed in range(2):
        expected = -np.random.default_rng([7, seed]).standard_normal((N, N, N)) * 4e-7 / growth[1]
        assert np.abs(left[seed, "newton"] - expected).max() < 1e-4 * expected.std()
        assert np.abs(left[seed, "gr"] - 1.1 * expected).max() < 1e-4 * expected.std()
    attributes = CubeFile(tmp_path / "out.h5").attributes
    assert attributes["difference_redshifts"] == [10.0, 1.0]
    assert attributes["difference_growth"] == pytest.approx(growth[:2], rel=1e-6)
    assert "redshift" not in attributes


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
    raw = write_raw(tmp_path / "raw", lambda *key: field(*key, size=2 * N), seeds=1)
    tracemalloc.start()
    try:
        pack(raw, tmp_path / "out.h5", difference=(10.0, 1.0))
        assert tracemalloc.get_traced_memory()[1] < 3 * (2 * N) ** 3 * 4  # cubes, of which two are checked
    finally:
        tracemalloc.stop()


# ---- settings ----


def of(tmp_path: Path, **settings: str) -> Cosmology:
    return cosmology({key.replace("__", " "): value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("changes", "growth"),
    [
        ({"T_cmb": "2.7255", "N_ur": "3.046"}, (1.001855, 0.955915)),
        ({}, (0.99970, 0.95547)),  # without a temperature gevolution has no radiation
        ({"T_cmb": "2.7255", "omega_fld": "0.313930", "w0_fld": "-0.8"}, (1.00057, 0.92041)),
        ({"T_cmb": "2.7255", "Omega_fld": "0.6", "w0_fld": "-1"}, (1.001855, 0.955915)),  # ignored
    ],
)
def test_growth_includes_every_background(changes: dict[str, str], growth: tuple[float, float]) -> None:
    base = {"h": "0.67556", "omega_b": "0.022032", "omega_cdm": "0.12038"}
    universe = cosmology(base | changes)
    assert [universe.potential_growth(z) for z in (10, 1)] == pytest.approx(growth, abs=6e-6)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"m_ncdm": "0.06"}, "m_ncdm"),
        ({"Omega_fld": "0.5", "w0_fld": "-0.9", "fluid treatment": "CLASS"}, "fluid treatment"),
        ({"T_cmb": "0", "Omega_ur": "1e-5", "N_ur": None}, "Omega_ur"),
    ],
)
def test_unknown_growth_allows_no_difference(
    tmp_path: Path, raw: Path, changes: dict[str, str | None], key: str
) -> None:
    for seed, gravity in itertools.product(range(2), GRAVITIES):
        write_settings(raw, seed, gravity, changes)
    pack(raw, tmp_path / "out.h5", redshifts=[1])
    with pytest.raises(UserError, match=f"have {key} = "):
        pack(raw, tmp_path / "d.h5", difference=(10.0, 1.0))


@pytest.mark.parametrize(
    "changes",
    [
        RESUMED,
        {"seed": "0001"},
        {"gravity theory": "g", "k-domain": "Cube"},
        {"Omega_b": "9", "boxsize": "5120 # Mpc/h"},  # omega_b comes first
        {"Pk bins": "9", "lightcone 0 vertex": "1, 2, 3", "output path": "/elsewhere/", "root": "x"},
        {"Tk file": None, "A_s": "2.2150000001e-9"},
    ],
)
def test_settings_that_gevolution_reads_alike(tmp_path: Path, raw: Path, changes: dict[str, Any]) -> None:
    write_settings(raw, 1, "gr", changes)
    pack(raw, tmp_path / "out.h5", redshifts=[1])


def test_fields_by_name_become_channels(tmp_path: Path, raw: Path) -> None:
    """Every field has its own mean and std; chi vanishes under Newtonian gravity."""
    for path in raw.glob("*/*/*_phi.h5"):
        with h5py.File(path) as phi, h5py.File(path.with_name(path.name.replace("phi", "chi")), "w") as chi:
            chi["data"] = 0 * phi["data"][()] if path.parent.name == "newton" else 3 + phi["data"][()] ** 2
    out, like, alone = (tmp_path / f"{name}.h5" for name in ("out", "like", "alone"))
    pack(raw, out, redshifts=[10, 1], fields=["phi", "chi"])
    cubes = CubeFile(out)
    assert cubes.shape == (4, N, N, N)
    assert cubes.attributes["fields"] == ["phi", "chi", "phi", "chi"]
    assert cubes.attributes["redshifts"] == [10, 10, 1, 1]
    values = np.stack([checks.read_pair(cubes, seed) for seed in cubes.seeds]).astype(np.float64)
    np.testing.assert_allclose(values.mean((0, 1, 3, 4, 5)), 0, atol=1e-6)
    np.testing.assert_allclose(values.std((0, 1, 3, 4, 5)), 1, atol=1e-6)
    pack(raw, alone, redshifts=[1], fields=["chi"])
    np.testing.assert_array_equal(checks.read_pair(CubeFile(alone), 1)[:, 0], values[1, :, 3].astype("f4"))
    pack(raw, like, redshifts=[10, 1], fields=["phi", "chi"], options=Options(like=out))
    assert CubeFile(like).attributes["std"] == cubes.attributes["std"]
    np.testing.assert_array_equal(checks.read_pair(CubeFile(like), 1), values[1].astype("f4"))
    for arguments, message in (
        (
            {"redshifts": [1], "options": Options(like=out)},
            "--like .*found 4 fields, allowed: 1, as in these",
        ),
        ({"redshifts": [1], "fields": ["phi", "phi"]}, "each field once"),
        ({"redshifts": [1], "fields": ["phi", "B"]}, "no file gr_snapNNN_B.h5|no file newton_snapNNN_B.h5"),
        ({"difference": (10, 1), "fields": ["chi"]}, "takes the potential phi alone"),
    ):
        with pytest.raises(UserError, match=message):
            pack(raw, tmp_path / "new" / "out.h5", **arguments)
    snapshot_file(raw, 1, "gr", 1).with_name("gr_snap001_chi.h5").unlink()
    with pytest.raises(UserError, match=r"no snapshot 1 of chi \(z = 1\)"):
        pack(raw, tmp_path / "new" / "out.h5", redshifts=[1], fields=["phi", "chi"])
    assert not (tmp_path / "new").exists()


def test_files_are_named_by_the_settings(tmp_path: Path, raw: Path) -> None:
    pack(raw, tmp_path / "a.h5", redshifts=[1])
    for seed, gravity in itertools.product(range(2), GRAVITIES):
        write_settings(raw, seed, gravity, {"snapshot file base": None if seed else "lcdm_snap"})
        settings_file(raw, seed, gravity).rename(raw / f"seed{seed:04d}/{gravity}/lcdm_settings_used.ini")
        for number in range(3):
            path = snapshot_file(raw, seed, gravity, number)
            path.rename(path.with_name(f"{'snapshot' if seed else 'lcdm_snap'}{number:03d}_phi.h5"))
    pack(raw, tmp_path / "b.h5", redshifts=[1])
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


# ---- bad input ----


def change(raw: Path, **changes: str | None) -> None:
    write_settings(raw, 1, "gr", {key.replace("__", " "): value for key, value in changes.items()})


def replace(raw: Path, values: Any, gravity: str = "gr", seed: int = 1) -> None:
    with h5py.File(snapshot_file(raw, seed, gravity, 1), "w") as file:
        file["data"] = values


def edit(raw: Path, index: Any, value: float) -> None:
    with h5py.File(snapshot_file(raw, 1, "gr", 1), "a") as file:
        file["data"][index] = value


def rename_data(raw: Path) -> None:
    with h5py.File(snapshot_file(raw, 1, "gr", 1), "a") as file:
        file.move("data", "phi")


def compress(raw: Path) -> None:
    with h5py.File(snapshot_file(raw, 1, "gr", 1), "w") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((8, N, N))
        creation.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (2, 2, 8, 8 * N * N * 8, 5, 1, 0))
        space = h5py.h5s.create_simple((N, N, N))
        h5py.h5d.create(file.id, b"data", h5py.h5t.NATIVE_DOUBLE, space, creation)


def age(raw: Path) -> None:
    path = snapshot_file(raw, 1, "gr", 0)
    os.utime(path, (path.stat().st_mtime - 3600,) * 2)


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no snapshot": (
        lambda raw: snapshot_file(raw, 1, "gr", 1).unlink(),
        ["no snapshot 1 of phi (z = 1)", "gr_snap002_phi.h5"],
    ),
    "no twin": (lambda raw: (raw / "seed0001/gr").rename(raw / "seed0001/x"), ["no folder gr", "seeds 1"]),
    "no settings": (
        lambda raw: settings_file(raw, 1, "gr").unlink(),
        ["seed0001/gr: 0 files *_settings_used.ini", "contains gr_snap000_phi.h5"],
    ),
    "two settings": (
        lambda raw: (raw / "seed0001/gr/old_settings_used.ini").write_text("h = 1"),
        ["2 files *_settings_used.ini", "old_settings_used.ini"],
    ),
    "other file base": (
        lambda raw: change(raw, snapshot__file__base="lcdm_snap"),
        ["no file lcdm_snapNNN_phi.h5", "`snapshot file base`", "contains gr_settings_used.ini"],
    ),
    "no redshift": (
        lambda raw: change(raw, snapshot__redshifts="10, 2, 0"),
        ["seed0001/gr/gr_settings_used.ini", "no snapshot at redshift 1", "10, 2, 0"],
    ),
    "no list": (lambda raw: change(raw, snapshot__redshifts=None), ["snapshot redshifts = (missing)"]),
    "more files than redshifts": (
        lambda raw: change(raw, snapshot__redshifts="1, 0.5"),
        ["gr_snap002_phi.h5", "lists 2 redshifts", "another run"],
    ),
    "left over": (age, ["gr_snap000_phi.h5: older than the settings", "earlier run"]),
    "other box": (lambda raw: change(raw, boxsize="320"), ["boxsize = 320, not 5120.0"]),
    "other density": (lambda raw: change(raw, T_cmb="2.8"), ["Omega_g = "]),
    "other numerics": (
        lambda raw: change(raw, tiling__factor="8", radiation__treatment="CLASS"),
        ["radiation treatment = CLASS, not background; tiling factor = 8, not 16"],
    ),
    "unknown setting": (lambda raw: change(raw, new__physics="on"), ["new physics = on, not (missing)"]),
    "other seed": (lambda raw: change(raw, seed="7"), ["seed = 7", "its twin has 1"]),
    "seed never changed": (
        lambda raw: [write_settings(raw, 1, gravity, {"seed": "0"}) for gravity in GRAVITIES],
        ["seed0001: its random seed is 0, as in", "seed0000"],
    ),
    "other theory": (lambda raw: change(raw, gravity__theory="newtonian"), ["= newtonian", "folder gr"]),
    "no theory": (
        lambda raw: write_settings(raw, 1, "newton", {"gravity theory": None}),
        ["gravity theory = none", "gevolution runs General Relativity, in the folder newton"],
    ),
    "other size": (lambda raw: replace(raw, np.zeros((128,) * 3, "f4")), ["(128, 128, 128)", "(64, 64, 64)"]),
    "not cubic": (lambda raw: replace(raw, np.zeros((64, 64, 32))), ["(64, 64, 32)", "multiple of 64"]),
    "not numeric": (lambda raw: replace(raw, np.full((64,) * 3, b"x")), ["no numeric data set `data`"]),
    "no data": (rename_data, ["no numeric data set `data`", "phi"]),
    "missing filter": (compress, ["gr_snap001_phi.h5", "Blosc (HDF5 filter 32001)", "pip install"]),
    "not HDF5": (lambda raw: snapshot_file(raw, 1, "gr", 1).write_text("x" * 99), ["not an HDF5 file"]),
    "truncated": (lambda raw: os.truncate(snapshot_file(raw, 1, "gr", 1), 10_000), ["truncated"]),
    "too large": (
        lambda raw: replace(raw, np.random.default_rng(0).uniform(-1e300, 1e300, (N, N, N))),
        ["variance", "float64"],
    ),
    "NaN": (lambda raw: edit(raw, (40, 1, 1), np.nan), ["seed0001/gr/gr_snap001_phi.h5", "NaN"]),
    "last planes": (lambda raw: edit(raw, slice(48, None), 0), ["planes 48-63 along axis 0 are constant"]),
    "planes along axis 2": (lambda raw: edit(raw, np.s_[:, :, :9], 0), ["planes 0-8 along axis 2 are const"]),
    "block of one process": (lambda raw: edit(raw, np.s_[32:, 32:], 1), ["1024 lines are constant"]),
    "empty": (lambda raw: edit(raw, slice(None), 0), ["gr_snap001_phi.h5: all values are 0"]),
    "same initial conditions": (
        lambda raw: [replace(raw, field(0, gravity, 1), gravity) for gravity in GRAVITIES],
        ["equal cubes: ", "seed0000/gr/gr_snap001_phi.h5, ", "seed0001/gr/gr_snap001_phi.h5"],
    ),
    "same gravity": (lambda raw: replace(raw, field(1, "newton", 1)), ["equal cubes: ", "seed0001"]),
    "twin of another seed": (
        lambda raw: [replace(raw, field(1 - s, "gr", 1), seed=s) for s in range(2)],
        ["seeds 0-1: the cubes are not twins", "one realization, but several seeds: "],
    ),
    "shifted": (
        lambda raw: replace(raw, np.roll(field(1, "gr", 1), (1, 0, -3), (0, 1, 2))),
        ["seeds 1: the cubes are not twins", "seed 1: the GR cube has", "shifted by (1, 0, -3) cells"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_raw_output(tmp_path: Path, raw: Path, kind: str) -> None:
    damage, words = BAD[kind]
    damage(raw)
    with pytest.raises(UserError) as caught:
        pack(raw, tmp_path / "out.h5", redshifts=[1])
    assert len(str(caught.value).splitlines()) <= 4
    for word in words:
        assert word in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_edited_settings_make_no_snapshot_old(tmp_path: Path, raw: Path) -> None:
    now = settings_file(raw, 1, "gr").stat().st_mtime
    os.utime(settings_file(raw, 1, "gr"), (now + 3600,) * 2)
    assert list(Simulation(1, "gr", raw / "seed0001/gr").snapshots("phi")) == [0, 1, 2]


def test_other_power_gives_a_warning(tmp_path: Path, raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(raw, tmp_path / "a.h5", redshifts=[1])
    assert not caplog.records
    for seed in range(2):
        replace(raw, field(seed, "gr", 0), seed=seed)
    with caplog.at_level(logging.WARNING):
        pack(raw, tmp_path / "b.h5", redshifts=[1])
    assert "seeds 0-1: P_GR/P_N is 0.82" in caplog.text


def test_invalid_requests(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "out.h5"
    for call, words in (
        (lambda: pack(tmp_path / "gone", out, redshifts=[1]), "not a folder"),
        (lambda: pack(raw / "seed0000", out, redshifts=[1]), "no folders seed0000.* contains gr, newton"),
        (lambda: pack(raw, out, snapshot=3), "no snapshot 3"),
        (lambda: pack(raw, out, difference=(1.0, 1.0)), "all values are"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    change(raw, snapshot__redshifts="10, 2, 0")
    with pytest.raises(UserError, match="several redshifts"):
        pack(raw, out, snapshot=1)
    (raw / "seed00001").mkdir()
    with pytest.raises(UserError, match="are the same seed"):
        pack(raw, out, redshifts=[1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


# ---- files that fit others ----


def test_like_standardizes_as_another_file(tmp_path: Path, raw: Path) -> None:
    first, second, third, fourth = (tmp_path / f"{name}.h5" for name in "abcd")
    pack(raw, first, redshifts=[1])
    new = write_raw(tmp_path / "new", lambda seed, *key: 1.2 * field(seed + 5, *key) + 2e-6)
    pack(new, second, redshifts=[1])
    pack(new, third, redshifts=[1], options=Options(like=first))
    repack([second], fourth, options=Options(like=first))
    with h5py.File(first) as a, h5py.File(third) as c, h5py.File(fourth) as d:
        for name, cube in c.items():
            np.testing.assert_allclose(cube, d[name], rtol=0, atol=1e-6)
            values = 1.2 * field(int(name[-4:]) + 5, name.split("_")[0], 1) + 2e-6
            expected = (values - a.attrs["mean"]) / a.attrs["std"]
            np.testing.assert_allclose(cube, expected, rtol=0, atol=1e-5)
        for file in (c, d):
            assert (file.attrs["mean"], file.attrs["std"]) == (a.attrs["mean"], a.attrs["std"])
            assert file.attrs["like"] == str(first)
    with h5py.File(first, "a") as file:
        file.attrs["std"] = 1.0
    with pytest.raises(UserError, match=r"--like .*a.h5: was standardized by std 1, but the values have"):
        pack(new, third, redshifts=[1], options=Options(like=first, overwrite=True))
    with h5py.File(first, "a") as file:
        del file.attrs["std"]
    with pytest.raises(UserError, match=r"--like .*a.h5: has no attributes mean and std"):
        pack(new, third, redshifts=[1], options=Options(like=first, overwrite=True))


def test_renumber_closes_gaps_and_leaves_out_seeds_without_twin(
    tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(raw, tmp_path / "a.h5", redshifts=[1])
    (raw / "seed0001").rename(raw / "seed0004")
    (raw / "seed0000").rename(raw / "seed0001")
    pack(raw, tmp_path / "b.h5", redshifts=[1])
    with pytest.raises(UserError, match=r"repack .*b.h5 .*b_renumbered.h5 --renumber"):
        CubeFile(tmp_path / "b.h5").require(range(2))
    (raw / "seed0007" / "gr").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no folder newton for seeds 7.*--renumber"):
        pack(raw, tmp_path / "c.h5", redshifts=[1])
    pack(raw, tmp_path / "c.h5", redshifts=[1], options=Options(renumber=True))
    assert "no folder newton for seeds 7, which are left out" in capsys.readouterr().err
    repack([tmp_path / "b.h5"], tmp_path / "d.h5", options=Options(renumber=True))
    expected = unpacked(tmp_path / "a.h5")
    for name in "cd":
        cubes = CubeFile(tmp_path / f"{name}.h5")
        assert cubes.attributes["original_seeds"] == [1, 4]
        values = unpacked(cubes.path)
        assert all(np.array_equal(values[key], expected[key]) for key in expected)


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
    repack([tmp_path / "slow.h5"], tmp_path / "fast.h5", options=Options())
    fast = CubeFile(tmp_path / "fast.h5")
    assert fast.slow_chunks() is None
    assert fast.layout == "packed"
    assert fast.attributes == {"std": 2.0, "names": ["a", "b"]}
    out = np.empty((N,) * 3, np.float32)
    for key, values in expected.items():
        assert fast.cubes[key].direct
        fast.read(*key, out)
        assert np.array_equal(out, values)
    repack([fast.path], fast.path, options=FORCE)  # in place
    assert CubeFile(fast.path).seeds == (0, 1)


# ---- failures leave no incomplete file ----


def test_existing_files_are_kept_without_force(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("precious")
    with pytest.raises(UserError, match=r"exists already.*--force"):
        pack(raw, out, redshifts=[1])
    assert out.read_text() == "precious"
    pack(raw, out, redshifts=[1], options=FORCE)
    CubeFile(out).require(range(2))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left"), RuntimeError("HDF5")])
def test_a_failure_leaves_no_file(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls = itertools.count()

    def fail_later(*arguments: Any) -> Any:
        if next(calls) == 2:
            assert [entry.suffix for entry in tmp_path.iterdir() if entry.is_file()] == [".partial"]
            raise error
        return original(*arguments)

    original = pack_module.new_cube
    monkeypatch.setattr(pack_module, "new_cube", fail_later)
    with pytest.raises((KeyboardInterrupt, UserError)):
        pack(raw, tmp_path / "out.h5", redshifts=[1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_a_killed_pack_leaves_the_old_file(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "out.h5"
    out.write_text("precious")
    program = (
        "import os, signal, sys; from pathlib import Path; from datasets.preparation import pack\n"
        "original = pack.new_cube\n"
        "def new_cube(file, seed, *arguments):\n"
        "    if seed == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(file, seed, *arguments)\n"
        "pack.new_cube = new_cube\n"
        "options = pack.Options(overwrite=True)\n"
        "pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), redshifts=[1], options=options)\n"
    )
    command = [sys.executable, "-c", program, str(raw), str(out)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert out.read_text() == "precious"
    assert len(list(tmp_path.glob("*.h5"))) == 1
    (partial,) = tmp_path.glob("out.h5.*.partial")
    with partial.open("rb") as file:  # another program still writes it
        fcntl.flock(file, fcntl.LOCK_EX)
        pack(raw, out, redshifts=[1], options=FORCE)
        assert partial.exists()
    pack(raw, out, redshifts=[1], options=FORCE)
    assert {entry.name for entry in tmp_path.iterdir()} == {"out.h5", "raw"}


def test_permissions_follow_the_umask(tmp_path: Path, raw: Path) -> None:
    previous = os.umask(0o027)
    try:
        pack(raw, tmp_path / "out.h5", redshifts=[1])
    finally:
        os.umask(previous)
    assert (tmp_path / "out.h5").stat().st_mode & 0o777 == 0o640


def test_free_space_is_checked_first(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: _Usage)
    with pytest.raises(UserError, match="not enough space"):
        pack(raw, tmp_path / "new folder" / "out.h5", redshifts=[1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


class _Usage:
    free = 4 * N**3 * 4 - 1


# ---- the commands ----


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["datasets", *map(str, arguments)])
    previous = signal.getsignal(signal.SIGTERM)
    try:
        return commands.main()
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_commands(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path))
    a, b, c, d, e = (tmp_path / f"{name}.h5" for name in "abcde")
    assert run(monkeypatch, "pack", "$PLACE/raw", "${PLACE}/a.h5", "--redshift", 1) == 0
    assert run(monkeypatch, "pack", raw, b, "--snapshot", 1) == 0
    assert a.read_bytes() == b.read_bytes()
    assert run(monkeypatch, "pack", raw, b, "--difference", 10, 1) == 2
    assert run(monkeypatch, "pack", raw, b, "--difference", 10, 1, "--force") == 0
    assert CubeFile(b).attributes["difference_redshifts"] == [10.0, 1.0]
    assert run(monkeypatch, "repack", a, c, "--remove-mean", "--renumber", "--like", a) == 0
    assert CubeFile(c).attributes["original_seeds"] == [0, 1]
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
    bad = ("pack", raw, out), ("pack", raw, out, "--redshift", "one"), (), ("inspect", "$UNSET_VARIABLE/a.h5")
    for arguments in bad:
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *arguments)
        assert ended.value.code == 2
    assert "$UNSET_VARIABLE, which is not set" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_a_filter_acts_on_the_whole_cube_before_standardization(tmp_path: Path, raw: Path) -> None:
    pack(raw, tmp_path / "all.h5", redshifts=[1])
    pack(raw, tmp_path / "few.h5", redshifts=[1], options=Options(filter=Filter(4)))
    everything, few = unpacked(tmp_path / "all.h5"), unpacked(tmp_path / "few.h5")
    for key, cube in everything.items():
        np.testing.assert_allclose(few[key], Filter(4)(cube), atol=1e-5 * np.abs(cube).max())
    packed = CubeFile(tmp_path / "few.h5").attributes
    assert (packed["max_wavenumber"], packed["cells"]) == (4.0, N)
    assert packed["std"] < 0.9 * CubeFile(tmp_path / "all.h5").attributes["std"]
