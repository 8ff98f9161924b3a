"""Cube files: simulation cubes in one HDF5 file, checked when it is opened and read a whole cube at a time.

Each cube is an (N, N, N) field, N a multiple of 64; a seed has one cube per gravity. Two layouts are known:

    packed   /gr_seed0000   /newton_seed0000   /gr_seed0001   ...
    nested   /0/gr          /0/newton          /1/gr          ...

Another layout is one more entry in LAYOUTS.

A file is opened read-only and without HDF5's file locks, so that read-only and lock-less file systems serve,
and it is closed again after each use: no handle lives long enough to be inherited over a fork.
"""

import hashlib
import math
import os
import re
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

import system

GRAVITIES = ("newton", "gr")  # the index of a gravity is its label
SIZE_UNIT = 64  # the networks halve the sides of a slice six times
CHECKED_BYTES = 1 << 30  # files up to this size are searched for NaN before a run begins
CHUNK_BYTES = 64 * 1024  # smaller chunks cost more to find than to copy
CHUNK_ROW_BYTES = 64  # shorter rows use only a part of each cache line

H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError)  # what h5py raises for damaged files


class DataError(ValueError):
    """A data file that cannot be used as it is; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Cube:
    """One cube as the file describes it, before any of its values is read."""

    name: str  # path inside the file
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None  # bytes from the start of the file, where the values lie in one piece
    stored: int  # bytes taken in the file
    chunks: tuple[int, ...] | None
    filters: tuple[str, ...]  # compression, shuffle, checksum
    written: bool  # False: space was reserved, but no value was ever written

    @property
    def direct(self) -> bool:
        """Whether the file holds the cube's values exactly as memory does."""
        return self.offset is not None and self.dtype == np.float32 and self.dtype.isnative


Cubes = dict[tuple[int, str], Cube]  # (seed, gravity) -> cube


def _packed(file: h5py.File) -> Iterator[tuple[int, str, str]]:
    for name in file:
        if match := re.fullmatch(r"(gr|newton)_seed(\d+)", name):
            yield int(match[2]), match[1], name


def _nested(file: h5py.File) -> Iterator[tuple[int, str, str]]:
    for name in file:
        if re.fullmatch(r"\d+", name) and isinstance(group := file.get(name), h5py.Group):
            for gravity in GRAVITIES:
                if gravity in group:
                    yield int(name), gravity, f"{name}/{gravity}"


Reader = Callable[[h5py.File], Iterator[tuple[int, str, str]]]  # gives (seed, gravity, name of the data set)
LAYOUTS: dict[str, Reader] = {"packed": _packed, "nested": _nested}


def packed_name(seed: int, gravity: str) -> str:
    """Name of a cube in a packed file."""
    return f"{gravity}_seed{seed:04d}"


@contextmanager
def open_cubes(path: Path) -> Iterator[h5py.File]:
    """A cube file, open for reading. Raises DataError for what keeps it from being read, here and within."""
    try:
        _require_hdf5(path)
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except H5PY_ERRORS as error:
        if "truncated file" in str(error):
            size = path.stat().st_size
            raise DataError(f"{path}: the file is truncated, to {size} bytes. Make it again.") from error
        raise DataError(f"{path}: the file cannot be read: {error}") from error


def _require_hdf5(path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"{path}: there is no such file.\n"
            "Set data_params.datafile (evaluating: --datafile) to an HDF5 file of cubes, or make one:\n"
            f"  python -m datasets pack RAW_DIR {path} --redshift 1    from gevolution's output\n"
            f"  python -m datasets synthesize {path} --seeds 32        a synthetic universe"
        )
    if path.is_dir():
        raise DataError(
            f"{path}: is a folder; an HDF5 file is needed.\n"
            f"Raw gevolution output becomes one by: python -m datasets pack {path} OUT.h5 --redshift 1"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes). Copy it or make it again.")
    with path.open("rb") as raw:  # tells a file that may not be read from one of another format
        start = raw.read(8)
    if not h5py.is_hdf5(path):
        raise DataError(f"{path}: is not an HDF5 file, or its start is damaged: it is {start!r}.")


def _cube(file: h5py.File, name: str) -> Cube:
    data = file.get(name)
    if not isinstance(data, h5py.Dataset):
        raise DataError(f"{file.filename}: /{name} is named like a cube, but is no readable data set.")
    creation = data.id.get_create_plist()
    filters = [creation.get_filter(i)[3].decode() for i in range(creation.get_nfilters())]
    here = data.file.filename == file.filename  # an external link's data lie in another file
    return Cube(
        name=name,
        shape=data.shape or (),
        dtype=data.dtype,
        offset=data.id.get_offset() if here else None,
        stored=data.id.get_storage_size(),
        chunks=data.chunks,
        filters=tuple(filters),
        written=data.is_virtual or data.id.get_storage_size() > 0,
    )


def find_cubes(file: h5py.File) -> tuple[str, Cubes]:
    """The layout of an open file and its cubes, whatever state they are in.

    Raises DataError where there are none, or where two names mean the same cube.
    """
    for layout, entries in LAYOUTS.items():
        cubes: Cubes = {}
        for seed, gravity, name in entries(file):
            if (seed, gravity) in cubes:
                both = f"/{cubes[seed, gravity].name} and /{name}"
                raise DataError(f"{file.filename}: {both} both name the {gravity} cube of seed {seed}.")
            cubes[seed, gravity] = _cube(file, name)
        if cubes:
            return layout, dict(sorted(cubes.items()))
    names = list(file)
    found = ", ".join(f"/{name}" for name in names[:5]) + (", ..." if len(names) > 5 else "")
    raise DataError(
        f"{file.filename}: no cubes found; the file holds {found or 'nothing'}.\n"
        "Cubes are named /gr_seed0000 and /newton_seed0000, or /0/gr and /0/newton."
    )


def problems(cubes: Cubes) -> Iterator[str]:
    """What is wrong with each cube that is not (N, N, N) real numbers, N one multiple of 64 for all cubes."""
    usual = Counter(cube.shape for cube in cubes.values()).most_common(1)[0][0]
    for cube in cubes.values():
        where, shape = f"cube /{cube.name}", cube.shape
        if cube.dtype.kind not in "fiu":
            yield f"{where} is not numeric, but {cube.dtype}; floats or integers are needed."
        elif len(shape) != 3 or len(set(shape)) != 1:
            yield f"{where} is not cubic: its shape is {shape}; (N, N, N) is needed."
        elif shape[0] == 0 or shape[0] % SIZE_UNIT:
            yield f"{where} has N = {shape[0]}; N must be a multiple of {SIZE_UNIT}."
        elif shape != usual:
            yield f"{where} has the shape {shape}, others have {usual}; all must be equal."
        elif not cube.written:
            yield f"{where} was never written: what made the file did not finish. Make it again."


def slow_chunks(path: Path, cubes: Cubes) -> str | None:
    """A warning if filters or chunks make reading whole cubes slow, with the command that mends it."""
    for cube in cubes.values():
        if cube.chunks is None:
            continue
        reasons = [f"passes through filters ({', '.join(cube.filters)})"] if cube.filters else []
        chunk, row = int(np.prod(cube.chunks)) * cube.dtype.itemsize, cube.chunks[-1] * cube.dtype.itemsize
        if chunk < CHUNK_BYTES or row < CHUNK_ROW_BYTES:
            reasons.append(f"is stored in small or thin chunks {cube.chunks}")
        if reasons:
            better = path.with_name(f"{path.stem}_contiguous.h5")
            return (
                f"{path}: reading whole cubes is slow: /{cube.name} {' and '.join(reasons)}.\n"
                "Repack the file once: "
                f"python -m datasets repack {shlex.quote(str(path))} {shlex.quote(str(better))}"
            )
    return None


def python_attributes(attributes: h5py.AttributeManager) -> dict[str, Any]:
    """HDF5 attributes as plain Python values: numbers, strings, lists; None for an empty one."""
    values: dict[str, Any] = {}
    for key, value in attributes.items():
        if isinstance(value, np.ndarray | np.generic):
            value = value.item() if value.size == 1 else value.tolist()
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        values[key] = None if isinstance(value, h5py.Empty) else value
    return values


def attr_float(attributes: Mapping[str, Any], key: str) -> float | None:
    """An attribute that is a finite number; None if there is none, or something else under its name."""
    value = attributes.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class CubeFile:
    """The cubes of one HDF5 file.

    Opening reads no values, only what the file says of its cubes, and checks that. Raises DataError if the
    file is missing, damaged or without cubes, or if these are not real numbers in (N, N, N), N one multiple
    of 64.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open_cubes(self.path) as file:
            self.layout, self.cubes = find_cubes(file)
            self.attributes = python_attributes(file.attrs)
        for problem in problems(self.cubes):
            raise DataError(f"{self.path}: {problem}")
        self.size: int = next(iter(self.cubes.values())).shape[0]
        there = {gravity: {seed for seed, g in self.cubes if g == gravity} for gravity in GRAVITIES}
        self.seeds = tuple(sorted(there["newton"] & there["gr"]))
        self._bytes_read = 0
        self._lock = threading.Lock()  # cubes may be read by several threads at once

    def __repr__(self) -> str:
        return f"CubeFile({str(self.path)!r}: {len(self.seeds)} seeds of {self.size}^3, {self.layout})"

    @property
    def bytes_read(self) -> int:
        """Bytes of cubes taken from the file so far."""
        return self._bytes_read

    def attr_float(self, key: str) -> float | None:
        """An attribute of the file that is a finite number, None without one."""
        return attr_float(self.attributes, key)

    def require(self, seeds: range) -> None:
        """Raises DataError unless both twins of each of these seeds are there."""
        known = set(self.seeds)
        # Of more seeds than any file holds the first few tell enough.
        missing = [seed for seed in seeds[: len(known) + 1000] if seed not in known]
        if not missing:
            return
        lines = [
            f"{self.path}: seeds {system.format_ranges(seeds)} are asked for "
            "(data_params.train_seeds and data_params.test_seeds, or --seeds), but"
        ]
        for twin in GRAVITIES:
            alone = [seed for seed in missing if (seed, twin) in self.cubes]
            if alone:
                lines.append(f"  of seeds {system.format_ranges(alone)} only the {twin} cube is there")
            missing = [seed for seed in missing if seed not in alone]
        if missing:
            lines.append(f"  there are no cubes of seeds {system.format_ranges(missing)}")
        lines.append(f"Both twins are there of {len(self.seeds)} seeds: {system.format_ranges(self.seeds)}.")
        raise DataError("\n".join(lines))

    def require_finite(self, seeds: range) -> None:
        """Raises DataError if a value of these seeds is NaN or infinite, unless they have over CHECKED_BYTES.

        That many would delay the start of a run; each cube is checked as it is read anyway.
        """
        cube = np.empty((self.size,) * 3, np.float32)
        if cube.nbytes * len(GRAVITIES) * len(seeds) <= CHECKED_BYTES:
            for seed in seeds:
                for gravity in GRAVITIES:
                    self.read(seed, gravity, cube)

    def read(self, seed: int, gravity: str, out: NDArray[np.float32]) -> None:
        """Reads one cube into `out`, a C-contiguous (N, N, N) float32 array; threads may do so at once.

        A contiguous, uncompressed, native float32 cube comes straight from its place in the file; any other
        is read and converted by HDF5. Raises DataError if it cannot be read, or holds NaN or infinity.
        """
        cube = self.cubes[seed, gravity]
        if cube.direct:
            self._read_direct(cube, out)
        else:
            with open_cubes(self.path) as file:
                try:
                    file[cube.name].read_direct(out)
                except H5PY_ERRORS as error:
                    raise DataError(f"{self.path}: cube /{cube.name} cannot be read: {error}") from error
        with self._lock:
            self._bytes_read += cube.stored
        self._require_finite(cube, out)

    def _read_direct(self, cube: Cube, out: NDArray[np.float32]) -> None:
        assert cube.offset is not None
        target, done = out.data.cast("B"), 0
        try:
            with open(self.path, "rb", buffering=0) as raw:
                raw.seek(cube.offset)
                while done < len(target) and (count := raw.readinto(target[done:])):
                    done += count
        except OSError as error:
            raise DataError(f"{self.path}: cube /{cube.name} cannot be read: {error}") from error
        if done < len(target):
            raise DataError(f"{self.path}: the file now ends inside cube /{cube.name}.")

    def _require_finite(self, cube: Cube, values: NDArray[np.float32]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.sum()):  # one fast pass; NaN and infinity survive a sum
                return
        bad = ~np.isfinite(values)
        if not bad.any():  # finite values whose sum overflows
            return
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
        raise DataError(
            f"{self.path}: cube /{cube.name} holds {int(bad.sum())} values that are NaN, infinite or too "
            f"large for float32, the first at index {first}. All must be finite: make this simulation again."
        )

    def identity(self, seeds: range) -> dict[str, Any]:
        """What tells this data from other data, as JSON-able values, without reading all of it.

        `fingerprint` hashes four rows in the middle of every cube of these seeds, as float32: it changes with
        the simulations, their order and standardisation, not with the file's place, layout or compression.
        """
        self.require(seeds)
        digest, middle = hashlib.sha256(), self.size // 2
        with open_cubes(self.path) as file:
            for seed in seeds:
                for gravity in GRAVITIES:
                    rows = file[self.cubes[seed, gravity].name][middle, middle : middle + 4]
                    digest.update(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        return {
            "path": str(self.path.absolute()),
            "bytes": os.path.getsize(self.path),  # as the path, for people: a repacked file has another
            "shape": [self.size] * 3,
            "seeds": [seeds.start, seeds.stop],
            "fingerprint": digest.hexdigest(),
        }

    def slow_chunks(self) -> str | None:
        """A warning if filters or chunks make reading whole cubes slow, with the command that mends it."""
        return slow_chunks(self.path, self.cubes)
