"""The leaf that every module may import: OpenMP, `UserError`, cores, memory, ranks and files on disk.

Programs import this module before torch, which reads these settings when it is imported, as libgomp does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import psutil
except ModuleNotFoundError as missing:  # of all packages that a program needs, it imports this one first
    print(
        f"error: {missing} in {sys.executable}. Activate the environment of the project "
        "(source .venv/bin/activate), or make it: make venv",
        file=sys.stderr,
    )
    sys.exit(2)

# The threads of torch's CPU kernels wait for one another at the end of each parallel region. libgomp lets
# them spin, by default for some 10 ms. Where another process uses one of the cores, all spin while the last
# one waits for its time slice, and training slows down by much more than its share of the cores.
SPIN_COUNT = 1000  # turns of a loop, some 0.05 ms; see benchmarks/README.md

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)

# When a connection breaks, torch would print C++ stacks above the error of the program.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
log = logging.getLogger(__name__)


class UserError(ValueError):
    """An error that the user can fix: programs print its message and exit with status 2."""

    def __init__(self, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks
        """Whether every rank of the launch raises this error, so that one prints it."""


# torch and Accelerate read the names on the left; MPI and SLURM set those on the right.
RANK_VARIABLES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
}
LOCAL_RANK_VARIABLES = {
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
}


def setup_ranks() -> None:
    """Set torch's rank variables from those of MPI and SLURM where they are not set, and check them.

    Raises:
        UserError: if a variable is missing, not an integer, or inconsistent with the others.
    """
    _adopt(RANK_VARIABLES)
    required = ["RANK", "WORLD_SIZE"]
    if world_size() > 1:  # SLURM_LOCALID is also set where srun started a launcher, which starts the ranks
        _adopt(LOCAL_RANK_VARIABLES)
        required.append("LOCAL_RANK")
    elif "RANK" not in os.environ:
        return
    if missing := [name for name in required if name not in os.environ]:
        given = next(name for name in required if name in os.environ)
        raise UserError(
            f"{given} is {os.environ[given][:40]}, but {' and '.join(missing)} is not set. "
            f"Set {', '.join(required)}, or start the ranks with accelerate launch or torchrun."
        )
    if (port := read_int("MASTER_PORT", 29500)) > 65535:
        raise UserError(f"MASTER_PORT: found {port}, allowed: up to 65535")
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in os.environ and read_int(name, 0) >= read_int(size, 1, minimum=1):
            raise UserError(
                f"{name} is {os.environ[name]}, but {size} is {os.environ[size]}. "
                f"Number the ranks from 0 to {size} - 1."
            )


def _adopt(variables: Mapping[str, tuple[str, ...]]) -> None:
    for name, sources in variables.items():
        for source in sources:
            if source in os.environ:
                os.environ.setdefault(name, os.environ[source])


def world_size() -> int:
    """Number of ranks in this launch."""
    return read_int("WORLD_SIZE", 1, minimum=1)


def rank() -> int:
    """This process's rank in the launch."""
    return read_int("RANK", 0)


def local_world_size() -> int:
    """Number of ranks of this launch on this host."""
    return read_int("LOCAL_WORLD_SIZE", 1, minimum=1)


def read_int(name: str, default: int, *, minimum: int = 0) -> int:
    """The integer in an environment variable. Raises UserError that names the variable."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < minimum:
        raise invalid_variable(name, f"an integer of at least {minimum}")
    return int(text)


def read_flag(name: str) -> bool:
    """The boolean in an environment variable, as Accelerate reads it. Raises UserError that names it."""
    text = os.environ.get(name, "false").lower()
    if text in ("y", "yes", "t", "true", "on", "1"):
        return True
    if text in ("n", "no", "f", "false", "off", "0"):
        return False
    raise invalid_variable(name, "true or false")


def invalid_variable(name: str, allowed: str) -> UserError:
    """The error of an environment variable that is not `allowed`."""
    return UserError(
        f"environment variable {name}: found {os.environ[name][:40]!r}, allowed: {allowed}. "
        "Correct it or unset it."
    )


def available_cores() -> int:
    """Cores this process may use: the minimum of its affinity mask, cgroups and SLURM task.

    Raises UserError if SLURM_CPUS_PER_TASK is not an integer.
    """
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if "SLURM_CPUS_PER_TASK" in os.environ:
        limits.append(read_int("SLURM_CPUS_PER_TASK", 1, minimum=1))
    for folder in _cgroups("cpu"):
        # One file in version 2, two in version 1. Both give microseconds of computing per period.
        files = (folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
        words = [word for file in files if file.is_file() for word in file.read_text().split()]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            limits.append(max(1, int(words[0]) // int(words[1])))
    return min(limits)


def thread_limits() -> str:
    """The limits on processes and threads that apply to this process, with their names."""
    limits = [
        f"{path} {path.read_text().strip()}"
        for path in (folder / "pids.max" for folder in _cgroups("pids"))
        if path.is_file() and path.read_text().strip() != "max"
    ]
    for name, kind in (("-u", resource.RLIMIT_NPROC), ("-v", resource.RLIMIT_AS)):
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            limits.append(f"ulimit {name} {limit}")
    return ", ".join(limits) or "none known"


def available_memory() -> int:
    """Bytes of host memory that this process may still allocate.

    Clusters limit the memory of a job by cgroups, so this may be less than the free memory of the host. File
    pages that a cgroup has cached count as free.
    """
    free = int(psutil.virtual_memory().available)
    for folder in _cgroups("memory"):
        v2 = (folder / "memory.max").is_file()
        limit_file, used = ("memory.max", "anon") if v2 else ("memory.limit_in_bytes", "total_rss")
        if (folder / limit_file).is_file() and (limit := (folder / limit_file).read_text().strip()) != "max":
            usage = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, int(limit) - int(usage[used]))
    return min(free, sys.maxsize)


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup of `controller` and of the cgroups above it, in both versions."""
    groups = PROC / "self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        number, controllers, group = line.split(":", 2)
        if number == "0":
            root = CGROUPS
        elif controller in controllers.split(","):
            root = CGROUPS / controller
        else:
            continue
        folder = root / group.lstrip("/")
        yield from (folder, *(parent for parent in folder.parents if parent.is_relative_to(root)))


def format_ranges(numbers: Iterable[int]) -> str:
    """Integers as ranges: (0, 1, 2, 5) gives "0-2, 5"; "none" if there are none."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges) or "none"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`: after a crash it holds the old bytes or the new ones.

    The temporary file `NAME.part` is created exclusively, so a symbolic link of that name is never followed.
    Raises OSError, with `path` unchanged.
    """
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)  # left by a process that was killed
    try:
        write_new(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet and flush it to disk. Raises OSError that names `path`."""
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync_directory(folder: Path) -> None:
    """Make the names in `folder` as durable as the files themselves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one record to a JSON-lines file and flush it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, in order; empty if there is no such file.

    Skips lines that are not JSON objects, such as the last line of a process that was killed, with a warning.
    Raises OSError if it is not a regular file: opening a pipe would block.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise OSError(f"{path}: not a regular file. Remove it.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            json.dumps(record, allow_nan=False)  # Python reads NaN and infinity, which are not JSON
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            log.warning("%s: line %d is damaged and skipped", path, number)
    return records


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file atomically."""
    write_atomically(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def expand_path(path: str) -> str:
    """A path with `~`, $VARIABLE and ${VARIABLE} replaced. Raises UserError if a variable is not set."""
    for braces, name in re.findall(r"\$(?:\{(\w+)\}|(\w+))", path):
        if (variable := braces or name) not in os.environ:
            raise UserError(
                f"a path without ${variable}, which is not set. Set it, or write the path in full"
            )
    return os.path.expanduser(os.path.expandvars(path))


def path_argument(text: str) -> Path:
    """`expand_path` for an argument of a command, whose name argparse adds to the message."""
    try:
        return Path(expand_path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(f"found {text}, allowed: {error}") from None


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest directory above it that exists.

    Raises UserError if something on the way to `folder` is not a directory.
    """
    for path in (folder.absolute(), *folder.absolute().parents):
        if path.is_dir():
            return path
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {path.readlink()}, which does not exist. Mount or remove it."
            )
        if path.exists():
            raise UserError(f"{path} is not a folder. Remove it, or choose another folder.")
    raise AssertionError  # the root exists
