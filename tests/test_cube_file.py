"""Cube files: checks when a file is opened, and reading from every layout and storage."""

from system import UserError

import fcntl
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datasets.cube_file import GRAVITIES, LAYOUTS, CubeFile

N = 64


def cube(seed: int, gravity: str) -> np.ndarray:
    """Small integers, which every type in these tests represents exactly."""
    generator = np.random.default_rng([seed, GRAVITIES.index(gravity)])
    return generator.integers(-100, 100, (N, N, N)).astype(np.float32)


NAMES = {"packed": "/{gravity}_seed{seed:04d}", "nested": "/{seed}/{gravity}"}


def write(path: Path, seeds: int = 2, layout: str = "packed", dtype: str = "<f4", **storage: Any) -> Path:
    with h5py.File(path, "w") as file:
        for seed in range(seeds):
            for gravity in GRAVITIES:
                name = NAMES[layout].format(gravity=gravity, seed=seed)
                file.create_dataset(name, data=cube(seed, gravity), dtype=dtype, **storage)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "cubes.h5")


def read(cubes: CubeFile, seed: int, gravity: str) -> np.ndarray:
    out = np.full((N, N, N), np.nan, np.float32)
    cubes.read(seed, gravity, out)
    return out


def test_every_layout_has_a_test() -> None:
    assert set(NAMES) == set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    cubes = CubeFile(write(tmp_path / "cubes.h5", seeds=3, layout=layout))
    assert (cubes.layout, cubes.size, cubes.seeds) == (layout, N, (0, 1, 2))
    for seed in range(3):
        for gravity in GRAVITIES:
            assert np.array_equal(read(cubes, seed, gravity), cube(seed, gravity))


@pytest.mark.parametrize(
    ("dtype", "storage", "direct"),
    [
        ("<f4", {}, True),
        (">f4", {}, False),
        ("<f8", {}, False),
        ("<i2", {}, False),
        ("<f4", {"chunks": (16, 32, 32)}, False),
        ("<f4", {"chunks": (1, N, N), "compression": "gzip", "shuffle": True}, False),
        (">f8", {"chunks": (N, N, N), "fletcher32": True}, False),
    ],
)
def test_every_storage_reads_the_same_values(
    tmp_path: Path, dtype: str, storage: dict[str, Any], direct: bool
) -> None:
    cubes = CubeFile(write(tmp_path / "cubes.h5", seeds=1, dtype=dtype, **storage))
    assert all(entry.direct == direct for entry in cubes.cubes.values())
    for gravity in GRAVITIES:
        assert np.array_equal(read(cubes, 0, gravity), cube(0, gravity))


def test_file_with_a_user_block(tmp_path: Path) -> None:
    path = tmp_path / "cubes.h5"
    with h5py.File(path, "w", userblock_size=4096) as file:
        for gravity in GRAVITIES:
            file[f"{gravity}_seed0000"] = cube(0, gravity)
    cubes = CubeFile(path)
    assert cubes.cubes[0, "gr"].direct
    assert np.array_equal(read(cubes, 0, "gr"), cube(0, "gr"))


def test_external_links(tmp_path: Path, path: Path) -> None:
    with h5py.File(tmp_path / "links.h5", "w") as file:
        for gravity in GRAVITIES:
            file[f"{gravity}_seed0000"] = h5py.ExternalLink("cubes.h5", f"{gravity}_seed0001")
    assert np.array_equal(read(CubeFile(tmp_path / "links.h5"), 0, "newton"), cube(1, "newton"))


def test_virtual_data_sets_of_other_files(tmp_path: Path, path: Path) -> None:
    write(tmp_path / "other.h5", seeds=3)
    virtual(path, "other.h5", "newton_seed0002")
    assert np.array_equal(read(CubeFile(path), 1, "gr"), cube(2, "newton"))


def test_bytes_read(tmp_path: Path, path: Path) -> None:
    cubes = CubeFile(path)
    assert cubes.bytes_read == 0
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: read(cubes, i % 2, GRAVITIES[i // 2 % 2]), range(8)))
    assert cubes.bytes_read == 8 * N**3 * 4
    half = CubeFile(write(tmp_path / "half.h5", dtype="<i2"))
    read(half, 0, "gr")
    assert half.bytes_read == N**3 * 2


def test_concurrent_reads(tmp_path: Path) -> None:
    for path in (write(tmp_path / "a.h5"), write(tmp_path / "b.h5", chunks=(N, N, N))):
        cubes = CubeFile(path)
        keys = [(i % 2, GRAVITIES[i // 2 % 2]) for i in range(16)]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda key: read(cubes, *key), keys))  # noqa: B023
        assert all(np.array_equal(values, cube(*key)) for values, key in zip(got, keys, strict=True))


def test_locked_and_read_only_files(path: Path) -> None:
    path.chmod(0o444)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="lock"):
            h5py.File(path, "r", locking=True)
        assert np.array_equal(read(CubeFile(path), 0, "gr"), cube(0, "gr"))


@pytest.mark.parametrize("chunks", [None, (N, N, N)])
def test_forked_process_opens_the_file_itself(tmp_path: Path, chunks: tuple[int, ...] | None) -> None:
    cubes = CubeFile(write(tmp_path / "cubes.h5", chunks=chunks))
    read(cubes, 0, "gr")
    assert not [link for link in Path("/proc/self/fd").iterdir() if _points_to(link, cubes.path)]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(read(cubes, 1, "newton"), cube(1, "newton")) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _points_to(link: Path, path: Path) -> bool:
    try:
        return link.resolve() == path
    except OSError:
        return False


def test_attributes_become_python_values(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file.attrs.update({"std": np.float64(2.5), "n": np.int32(3), "names": ["a", "b"]})
        file.attrs["raw"] = np.bytes_(b"x")
        file.attrs["empty"] = h5py.Empty("f4")
    attributes = CubeFile(path).attributes
    assert attributes == {"std": 2.5, "n": 3, "names": ["a", "b"], "raw": "x", "empty": None}
    assert json.loads(json.dumps(attributes)) == attributes


# ---- bad files ----


def replace(path: Path, values: np.ndarray, name: str = "gr_seed0001") -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = values


def empty_data_set(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["gr_seed0001"]
        file.create_dataset("gr_seed0001", shape=(N, N, N), dtype="f4")


def group_for_a_cube(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["gr_seed0001"]
        file.create_group("gr_seed0001")


def other_names(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["phi"] = cube(0, "gr")


def broken_link(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["gr_seed0001"]
        file["gr_seed0001"] = h5py.ExternalLink("gone.h5", "/gr")


def damaged_names(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"HEAP", b"HEAQ"))  # the names of a group


def virtual(path: Path, source: str, name: str) -> None:
    layout = h5py.VirtualLayout((N, N, N), "f4")
    layout[...] = h5py.VirtualSource(source, name, (N, N, N))
    with h5py.File(path, "a") as file:
        del file["gr_seed0001"]
        file.create_virtual_dataset("gr_seed0001", layout)


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (Path.unlink, ["no such file", "data_params.datafile", "python -m datasets pack"]),
    "text": (lambda path: path.write_text("Dear colleague,"), ["not an HDF5 file", "Dear col"]),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1000), ["truncated"]),
    "header only": (lambda path: os.truncate(path, 20), ["cannot be read"]),
    "damaged names": (damaged_names, ["cannot be read"]),
    "no cubes": (other_names, ["no cubes found", "/phi", "/gr_seed0000"]),
    "never written": (empty_data_set, ["/gr_seed0001", "never written"]),
    "group": (group_for_a_cube, ["/gr_seed0001", "no readable data set"]),
    "broken link": (broken_link, ["/gr_seed0001"]),
    "not cubic": (lambda path: replace(path, np.zeros((N, N, 2 * N))), ["/gr_seed0001", "(64, 64, 128)"]),
    "flat": (lambda path: replace(path, np.zeros((N, N))), ["/gr_seed0001", "(N, N, N) is needed"]),
    "scalar": (lambda path: replace(path, np.zeros(())), ["/gr_seed0001", "(N, N, N) is needed"]),
    "sizes": (lambda path: replace(path, np.zeros((2 * N,) * 3, "f4")), ["(128, 128, 128)", "(64, 64, 64)"]),
    "text cube": (
        lambda path: replace(path, np.full((N, N, N), b"a")),
        ["/gr_seed0001 has the type |S1", "real numbers"],
    ),
    "complex": (lambda path: replace(path, np.zeros((N, N, N), complex)), ["complex128", "real numbers"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(path: Path, kind: str) -> None:
    damage, words = BAD[kind]
    damage(path)
    with pytest.raises(UserError) as caught:
        CubeFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) <= 5
    for word in words:
        assert word in message


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        CubeFile(tmp_path)


@pytest.mark.parametrize("size", [32, 96])
def test_sizes_that_are_no_multiple_of_64(tmp_path: Path, size: int) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["gr_seed0000"] = np.zeros((size,) * 3, np.float32)
    with pytest.raises(UserError, match=f"N = {size}; N must be a multiple of 64"):
        CubeFile(tmp_path / "a.h5")


@pytest.mark.parametrize("storage", [{}, {"chunks": (N, N, N)}, {"dtype": "<f8"}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_errors(tmp_path: Path, storage: dict[str, Any], value: float) -> None:
    path = write(tmp_path / "cubes.h5", **storage)
    with h5py.File(path, "a") as file:
        file["newton_seed0001"][3, 4, 5] = value
        file["newton_seed0001"][3, 4, 6] = value
    cubes = CubeFile(path)
    read(cubes, 1, "gr")
    with pytest.raises(UserError, match=r"/newton_seed0001 has 2 values .* index \(3, 4, 5\)"):
        read(cubes, 1, "newton")


def test_values_beyond_float32_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "cubes.h5", seeds=1, dtype="<f8")
    with h5py.File(path, "a") as file:
        file["gr_seed0000"][0, 0] = 3e38  # their sum overflows
        file["newton_seed0000"][0, 0, 0] = 1e39
    read(CubeFile(path), 0, "gr")
    with pytest.raises(UserError, match="/newton_seed0000 has 1 values"):
        read(CubeFile(path), 0, "newton")


@pytest.mark.parametrize("chunks", [None, (16, N, N)])
@pytest.mark.parametrize("replace", [True, False])
def test_a_file_changed_while_in_use_is_not_read(
    tmp_path: Path, chunks: tuple[int, ...] | None, replace: bool
) -> None:
    cubes = CubeFile(write(tmp_path / "cubes.h5", chunks=chunks))
    read(cubes, 0, "gr")
    if replace:
        write(tmp_path / "other.h5", chunks=chunks).replace(cubes.path)
    else:
        with h5py.File(cubes.path, "a") as file:
            file["gr_seed0001"][0] = 0
    with pytest.raises(UserError, match="changed or replaced while in use"):
        read(cubes, 1, "gr")
    cubes.path.unlink()
    with pytest.raises(UserError, match=r"(?i)no such file"):
        read(cubes, 1, "gr")


@pytest.mark.parametrize("chunks", [None, (16, N, N)])
def test_a_file_truncated_while_in_use(tmp_path: Path, chunks: tuple[int, ...] | None) -> None:
    cubes = CubeFile(write(tmp_path / "cubes.h5", chunks=chunks))
    os.truncate(cubes.path, cubes.path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"ends within cube|truncated"):
        read(cubes, 1, "newton")


def test_require_lists_missing_and_present_seeds(tmp_path: Path) -> None:
    path = write(tmp_path / "cubes.h5", seeds=6)
    with h5py.File(path, "a") as file:
        del file["gr_seed0001"], file["newton_seed0004"], file["gr_seed0005"], file["newton_seed0005"]
    cubes = CubeFile(path)
    assert cubes.seeds == (0, 2, 3)
    cubes.require(range(0))
    cubes.require(range(2, 4))
    with pytest.raises(UserError) as caught:
        cubes.require(range(8))
    assert str(caught.value).splitlines() == [
        f"{path}: seeds 0-7 are needed (data_params.train_seeds and data_params.test_seeds, or --seeds), but",
        "  seeds 1 have only the newton cube",
        "  seeds 4 have only the gr cube",
        "  seeds 5-7 have no cubes",
        "3 seeds have both twins: 0, 2-3.",
        "Reduce train_seeds and test_seeds to 3 in total, or add simulations.",
    ]


# ---- identity and warnings ----


def test_identity_depends_on_values_not_on_storage(tmp_path: Path, path: Path) -> None:
    identity = CubeFile(path).identity(range(2))
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["shape"], identity["seeds"]) == ([N, N, N], [0, 2])
    assert (identity["path"], identity["bytes"]) == (str(path), path.stat().st_size)

    def fingerprint(path: Path, seeds: range = range(2)) -> str:
        return CubeFile(path).identity(seeds)["fingerprint"]

    stored = write(tmp_path / "b.h5", layout="nested", dtype=">f8", chunks=(1, N, N), compression="gzip")
    assert fingerprint(stored) == identity["fingerprint"]
    assert fingerprint(path, range(1)) != identity["fingerprint"]
    with h5py.File(path, "a") as file:
        file.move("gr_seed0000", "x")
        file.move("gr_seed0001", "gr_seed0000")
        file.move("x", "gr_seed0001")
    assert fingerprint(path) != identity["fingerprint"]


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ({}, None),
        ({"chunks": (16, 32, 32)}, None),
        ({"chunks": (8, 8, 8)}, "chunks (8, 8, 8)"),
        ({"chunks": (N, N, 1)}, "chunks (64, 64, 1)"),
        ({"chunks": (N, N, N), "compression": "gzip"}, "deflate"),
        ({"chunks": (N, N, N), "shuffle": True}, "shuffle"),
    ],
)
def test_slow_chunks_give_a_warning(tmp_path: Path, storage: dict[str, Any], words: str | None) -> None:
    warning = CubeFile(write(tmp_path / "my cubes.h5", seeds=1, **storage)).slow_chunks()
    if words is None:
        assert warning is None
    else:
        assert warning is not None
        assert words in warning
        command = f"python -m datasets repack '{tmp_path}/my cubes.h5' '{tmp_path}/my cubes_contiguous.h5'"
        assert command in warning
