"""Cube files: simulation cubes in one HDF5 file, checked when opened and read a whole cube at a time.

Each cube is an (N, N, N) field, or C such fields (C, N, N, N), as several redshifts of one simulation; N is a
multiple of 64. A seed has one cube per gravity. Two layouts are supported:

    packed   /gr_seed0000   /newton_seed0000   /gr_seed0001   ...
    nested   /0/gr          /0/newton          /1/gr          ...

To add a layout, add an entry to LAYOUTS. The attributes `field`, `redshift`, `mean` and `std` describe one
field; with several, `fields`, `redshifts`, `mean` and `std` are lists in the order of the fields.

A file is opened read-only and without HDF5's file locks, so read-only file systems and those without locks
work. It is closed after each use, so no handle is inherited by a forked process.
"""

from __future__ import annotations

import system
from system import UserError

import hashlib
import math
import os
import re
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .storage import read_filters, read_into, slow_chunks

GRAVITIES = ("newton", "gr")  # the index of a gravity is its label
SIZE_UNIT = 64  # the networks halve the sides of a slice six times

H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError)  # what h5py raises for damaged files


@dataclass(frozen=True)
class Cube:
    """The description of one cube in a file; no values are read."""

    name: str
    """Path inside the file."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None
    """Bytes from the start of the file, if the values are stored contiguously."""
    stored: int
    """Bytes in the file."""
    chunks: tuple[int, ...] | None
    filters: tuple[str, ...]
    """Compression, shuffle, checksum."""
    missing_filter: str | None
    """What is not installed of it, and how to install it."""
    written: bool
    """False if space was reserved, but no value was written."""

    @property
    def direct(self) -> bool:
        """Whether the values have the same bytes in the file and in memory."""
        return self.offset is not None and self.dtype == np.float32 and self.dtype.isnative


Cubes = dict[tuple[int, str], Cube]  # (seed, gravity) -> cube
PerField = float | list[float]  # for all fields of a cube, or one number for each


def _packed(file: h5py.File) -> Iterator[tuple[int, str, str]]:
    for name in file:
        if match := re.fullmatch(r"(gr|newton)_seed(\d{1,9})", str(name)):
            yield int(match[2]), match[1], name


def _nested(file: h5py.File) -> Iterator[tuple[int, str, str]]:
    for name in file:
        # Names that are not UTF-8 are bytes.
        if re.fullmatch(r"\d{1,9}", str(name)) and isinstance(group := file.get(name), h5py.Group):
            for gravity in GRAVITIES:
                if gravity in group:
                    yield int(name), gravity, f"{name}/{gravity}"


Reader = Callable[[h5py.File], Iterator[tuple[int, str, str]]]  # gives (seed, gravity, name of the data set)
LAYOUTS: dict[str, Reader] = {"packed": _packed, "nested": _nested}


def packed_name(seed: int, gravity: str) -> str:
    """Name of a cube in a packed file."""
    return f"{gravity}_seed{seed:04d}"


def is_potential(field: Any) -> bool:
    """Whether a field of this name is the potential, as is one without name; others may vanish for Newton."""
    return field is None or str(field).lower().startswith("phi")


@contextmanager
def open_cubes(path: Path) -> Iterator[h5py.File]:
    """Open a cube file for reading. Raises UserError if it cannot be read, then or within the block."""
    try:
        _require_hdf5(path)
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except H5PY_ERRORS as error:
        if "truncated file" in str(error):
            size = path.stat().st_size
            raise UserError(
                f"{path}: the file is truncated to {size} bytes. Copy or create it again."
            ) from error
        raise UserError(f"{path}: the file cannot be read: {error}") from error


def _require_hdf5(path: Path) -> None:
    if not path.exists():
        raise UserError(
            f"{path}: no such file.\n"
            "Set data_params.datafile (evaluation: --datafile) to an HDF5 file of cubes, or create one:\n"
            f"  python -m datasets pack RAW_DIR {path} --redshift 1    from gevolution's output\n"
            f"  python -m datasets synthesize {path} --seeds 32        a synthetic universe"
        )
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder, not an HDF5 file.\n"
            f"To pack raw gevolution output: python -m datasets pack {path} OUT.h5 --redshift 1"
        )
    with path.open("rb") as raw:  # raises PermissionError; h5py would call the file no HDF5 file
        start = raw.read(8)
    if not h5py.is_hdf5(path):
        raise UserError(f"{path}: is not an HDF5 file, or its start is damaged: {start!r}. Create it again.")


def _cube(file: h5py.File, name: str) -> Cube:
    data = file.get(name)
    if not isinstance(data, h5py.Dataset):
        raise UserError(
            f"{file.filename}: /{name} is named as a cube, but is no readable data set. Rename it."
        )
    filters, missing_filter = read_filters(data)
    in_file = data.file.filename == file.filename  # the data of an external link are in another file
    return Cube(
        name=name,
        shape=data.shape or (),
        dtype=data.dtype,
        offset=data.id.get_offset() if in_file else None,
        stored=data.id.get_storage_size(),
        chunks=data.chunks,
        filters=filters,
        missing_filter=missing_filter,
        written=data.is_virtual or data.id.get_storage_size() > 0,
    )


def find_cubes(file: h5py.File) -> tuple[str, Cubes]:
    """The layout of an open file and its cubes, unchecked.

    Raises UserError if there are none.
    """
    for layout, entries in LAYOUTS.items():
        cubes: Cubes = {}
        for seed, gravity, name in entries(file):
            cubes[seed, gravity] = _cube(file, name)
        if cubes:
            return layout, dict(sorted(cubes.items()))
    if isinstance(data := file.get("data"), h5py.Dataset) and data.ndim == 3:
        raise UserError(raw_snapshot(Path(file.filename)))
    names = list(file)
    listed = ", ".join(f"/{name}" for name in names[:5]) + (", ..." if len(names) > 5 else "")
    raise UserError(
        f"{file.filename}: no cubes found; the file contains {listed or 'nothing'}.\n"
        "Cubes are named /gr_seed0000 and /newton_seed0000, or /0/gr and /0/newton."
    )


def raw_snapshot(path: Path) -> str:
    """What a raw snapshot is, and the command that packs it."""
    number = re.search(r"(\d{3,})_[^_]*$", path.stem)
    raw = path.absolute().parents[2] if len(path.absolute().parents) > 2 else path.parent
    return (
        f"{path}: a raw snapshot of one simulation (/data), not a file of cubes. Pack all simulations, in "
        f"folders RAW_DIR/seed0000/gr, RAW_DIR/seed0000/newton, ..., into one:\n"
        f"python -m datasets pack {shlex.quote(str(raw))} OUT.h5 --snapshot {int(number[1]) if number else 0}"
    )


def problems(cubes: Cubes) -> dict[str, str]:
    """By name, the problem of each cube that is not real numbers in (N, N, N) or (C, N, N, N).

    C and N must be those of all cubes, and N a multiple of 64.
    """
    common = Counter(cube.shape for cube in cubes.values()).most_common(1)[0][0]
    texts = {}
    for cube in cubes.values():
        name, shape = f"cube /{cube.name}", cube.shape
        if cube.dtype.kind not in "fiu":
            texts[cube.name] = f"{name} has the type {cube.dtype}; real numbers are needed."
        elif len(shape) not in (3, 4) or len(set(shape[-3:])) != 1:
            wanted = "(N, N, N)" if len(shape) < 4 else "(C, N, N, N) for C fields"
            texts[cube.name] = f"{name} has the shape {shape}; {wanted} is needed."
        elif 0 in shape or shape[-1] % SIZE_UNIT:
            texts[cube.name] = f"{name} has N = {shape[-1]}; N must be a multiple of {SIZE_UNIT}."
        elif shape != common:
            texts[cube.name] = f"{name} has the shape {shape}, others have {common}; all must be equal."
        elif cube.missing_filter:
            texts[cube.name] = f"{name} {cube.missing_filter}"
        elif not cube.written:
            texts[cube.name] = (
                f"{name} was never written; the program that created the file did not finish. Repeat it."
            )
    return texts


def python_attributes(attributes: h5py.AttributeManager) -> dict[str, Any]:
    """HDF5 attributes as Python values: numbers, strings, lists; None for an empty attribute."""
    values: dict[str, Any] = {}
    for key, value in attributes.items():
        if isinstance(value, np.ndarray | np.generic):
            value = value.item() if value.size == 1 else value.tolist()
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        values[key] = None if isinstance(value, h5py.Empty) else value
    return values


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def file_version(path: Path) -> tuple[int, int]:
    """Size and modification time of a file, which differ after a change. Raises UserError."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


class CubeFile:
    """The cubes of one HDF5 file.

    Opening reads and checks the description of the cubes, but no values. Raises UserError if the file is
    missing, damaged or without cubes, or if these are not real numbers in (N, N, N) or (C, N, N, N), with one
    C and one N, a multiple of 64. If not `strict`, such cubes are left out and `problems` (by name) has the
    reasons; there is at least one other.
    """

    def __init__(self, path: str | Path, *, strict: bool = True):
        self.path = Path(path)
        with open_cubes(self.path) as file:
            self._version = file_version(self.path)
            self.layout, self.cubes = find_cubes(file)
            self.attributes = python_attributes(file.attrs)
        self.problems = problems(self.cubes)
        valid = {key: cube for key, cube in self.cubes.items() if cube.name not in self.problems}
        if self.problems and (strict or not valid):
            raise UserError(f"{self.path}: {next(iter(self.problems.values()))}")
        self.cubes = valid
        self.shape = next(iter(self.cubes.values())).shape
        """(N, N, N) or (C, N, N, N)."""
        self.size = self.shape[-1]
        self.num_fields = math.prod(self.shape[:-3])
        seeds = {gravity: {seed for seed, g in self.cubes if g == gravity} for gravity in GRAVITIES}
        self.seeds = tuple(sorted(seeds["newton"] & seeds["gr"]))
        self.potentials = [
            i for i, name in enumerate(self.field_attrs("fields", "field")) if is_potential(name)
        ]
        """The fields that are potentials."""
        self.bytes_read = 0
        """Bytes of cubes read from the file so far."""
        self._lock = threading.Lock()  # several threads may read cubes at the same time

    def __repr__(self) -> str:
        return f"CubeFile({str(self.path)!r}: {len(self.seeds)} seeds of {self.size}^3, {self.layout})"

    @property
    def synthetic(self) -> bool:
        """Whether the file is a synthetic universe."""
        return self.attributes.get("synthetic") is True

    def attr_float(self, key: str) -> float | None:
        """An attribute of the file, if it is a finite number; otherwise None."""
        return _finite(self.attributes.get(key))

    def field_attrs(self, *keys: str) -> list[Any]:
        """An attribute of each field, under the first of `keys` that exists; None where it is missing."""
        value = next((self.attributes[key] for key in keys if key in self.attributes), None)
        values = value if isinstance(value, list) else [value] * self.num_fields
        return values if len(values) == self.num_fields else [None] * self.num_fields

    def field_floats(self, *keys: str) -> list[float | None]:
        """As `field_attrs`, but None where it is no finite number."""
        return [_finite(value) for value in self.field_attrs(*keys)]

    @property
    def fields(self) -> list[str]:
        """The fields in order, as `phi, z = 10`."""
        names, redshifts = self.field_attrs("fields", "field"), self.field_floats("redshifts", "redshift")
        return [
            (str(name) if name is not None else f"field {i}")
            + (f", z = {z:g}" if isinstance(z, int | float) else "")
            for i, (name, z) in enumerate(zip(names, redshifts, strict=True))
        ]

    def require(self, seeds: range) -> None:
        """Raise UserError unless the file has both twins of each of these seeds."""
        known = set(self.seeds)
        # Far more seeds than the file has: the first few suffice for the message.
        missing = [seed for seed in seeds[: len(known) + 1000] if seed not in known]
        if not missing:
            return
        lines = [
            f"{self.path}: seeds {system.format_ranges(seeds)} are needed "
            "(data_params.train_seeds and data_params.test_seeds, or --seeds), but"
        ]
        for twin in GRAVITIES:
            alone = [seed for seed in missing if (seed, twin) in self.cubes]
            if alone:
                lines.append(f"  seeds {system.format_ranges(alone)} have only the {twin} cube")
            missing = [seed for seed in missing if seed not in alone]
        if missing:
            lines.append(f"  seeds {system.format_ranges(missing)} have no cubes")
        lines.append(f"{len(self.seeds)} seeds have both twins: {system.format_ranges(self.seeds)}.")
        count = len(self.seeds)
        if count < len(seeds):
            lines.append(f"Reduce train_seeds and test_seeds to {count} in total, or add simulations.")
        elif self.seeds == tuple(range(count)):
            lines.append("Choose among them with --seeds A:B.")
        else:
            lines.append(f"To number them 0, 1, 2, ...: {self.renumber_command}")
        raise UserError("\n".join(lines))

    @property
    def renumber_command(self) -> str:
        """A command that gives the seeds numbers without gaps."""
        out = self.path.with_name(f"{self.path.stem}_renumbered.h5")
        return f"python -m datasets repack {shlex.quote(str(self.path))} {shlex.quote(str(out))} --renumber"

    def read(self, seed: int, gravity: str, out: NDArray[np.float32]) -> None:
        """Read one cube into `out`, a C-contiguous float32 array of as many values. Thread-safe.

        A contiguous, uncompressed, native float32 cube is read directly from its place in the file, any other
        by HDF5, which converts it. Raises UserError if it cannot be read or contains NaN or infinity, or if
        the file was changed since it was opened.
        """
        self.read_unchecked(seed, gravity, out)
        self.check_finite(seed, gravity, out)

    def read_unchecked(self, seed: int, gravity: str, out: NDArray[np.float32]) -> None:
        """As `read`, without the check for NaN and infinity."""
        cube = self.cubes[seed, gravity]
        if cube.direct:
            self._read_direct(cube, out)
        else:
            with open_cubes(self.path) as file:
                try:
                    file[cube.name].read_direct(out.reshape(cube.shape))
                except H5PY_ERRORS as error:
                    raise UserError(f"{self.path}: cube /{cube.name} cannot be read: {error}") from error
        if file_version(self.path) != self._version:  # a change before or during the read
            raise UserError(
                f"{self.path}: the file was changed or replaced while in use: its size or modification time "
                "differs.\n"
                "Restore it and run the same command again: a run resumes from its last checkpoint."
            )
        with self._lock:
            self.bytes_read += cube.stored

    def _read_direct(self, cube: Cube, out: NDArray[np.float32]) -> None:
        assert cube.offset is not None
        target = out.data.cast("B")
        try:
            done = read_into(self.path, cube.offset, target)
        except OSError as error:
            raise UserError(f"{self.path}: cube /{cube.name} cannot be read: {error}") from error
        if done < len(target):
            raise UserError(
                f"{self.path}: the file now ends within cube /{cube.name}. It was changed while in use."
            )

    def check_finite(self, seed: int, gravity: str, values: NDArray[np.float32]) -> None:
        """Raise UserError if the values of a cube contain NaN or infinity."""
        cube = self.cubes[seed, gravity]
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.sum()):  # one fast pass: NaN and infinity propagate into the sum
                return
        bad = ~np.isfinite(values)
        if not bad.any():  # the sum of finite values overflowed
            return
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), cube.shape))
        raise UserError(
            f"{self.path}: cube /{cube.name} has {int(bad.sum())} values that are NaN, infinite or too "
            f"large for float32, the first at index {first}. Copy the file again, or rerun this simulation."
        )

    def read_planes(self, seed: int, gravity: str, count: int) -> NDArray[np.floating]:
        """`count` planes (C, count, N, N) of a cube, equally spaced along axis 0."""
        with open_cubes(self.path) as file:
            planes = file[self.cubes[seed, gravity].name][..., :: self.size // count, :, :]
        return np.asarray(planes).reshape(self.num_fields, count, self.size, self.size)

    def identity(self, seeds: range) -> dict[str, Any]:
        """Identifies the data of these seeds, as JSON-able values, without reading all of it.

        `fingerprint` is a hash of four rows in the middle of every field, as float32. It depends on the
        simulations, their order and standardization, not on path, layout or compression of the file.

        Raises UserError if two cubes have the same rows, but for synthetic twins, which may be equal.
        """
        digest, middle = hashlib.sha256(), self.size // 2
        names: dict[bytes, str] = {}
        with open_cubes(self.path) as file, np.errstate(over="ignore"):
            for seed in seeds:
                for gravity in GRAVITIES:
                    name = self.cubes[seed, gravity].name
                    values = file[name][..., middle, middle : middle + 4, :]
                    rows = np.ascontiguousarray(values, dtype="<f4").tobytes()
                    digest.update(rows)
                    if names.setdefault(rows, name) != name and not self.synthetic:
                        raise UserError(
                            f"{self.path}: /{name} equals /{names[rows]}. Each cube must be a simulation of "
                            "its own: another random seed for each seed, another gravity for each twin.\n"
                            f"python -m datasets inspect {self.path} lists all equal cubes."
                        )
        return {
            "path": str(self.path.absolute()),
            "bytes": os.path.getsize(self.path),  # for information, as is the path
            "shape": list(self.shape),
            "seeds": [seeds.start, seeds.stop],
            "fingerprint": digest.hexdigest(),
        }

    def slow_chunks(self) -> str | None:
        """A warning if filters or chunks make it slow to read whole cubes, with the command that fixes it."""
        return slow_chunks(self.path, self.cubes)
