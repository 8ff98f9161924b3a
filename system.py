"""What this process may use of its host, and its place in the launch. Any module may import this one."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

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
        ValueError: if a variable is missing, not an integer, or inconsistent with the others.
    """
    _adopt(RANK_VARIABLES)
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"RANK is set ({os.environ['RANK'][:40]}), but WORLD_SIZE is not. "
            "Set both, or start the ranks with accelerate launch or torchrun."
        )
    if world_size() == 1:
        return  # SLURM_LOCALID is also set where the launcher that srun started has a single process
    _adopt(LOCAL_RANK_VARIABLES)
    for name in ("RANK", "LOCAL_RANK"):
        if name not in os.environ:
            raise ValueError(
                f"WORLD_SIZE is {world_size()}, but {name} is not set. "
                "Set it, or start the ranks with accelerate launch or torchrun."
            )
    if (port := read_int("MASTER_PORT", 29500)) > 65535:
        raise ValueError(f"MASTER_PORT: found {port}, allowed: up to 65535")
    for number, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in os.environ and read_int(number, 0) >= read_int(size, 1, minimum=1):
            raise ValueError(
                f"{number} is {os.environ[number]}, but {size} is {os.environ[size]}. "
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


def ranks_sharing_cores() -> int:
    """Number of ranks between which the cores of this process are divided.

    A task of SLURM has cores of its own, and is one rank or a launcher of several.
    """
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return max(1, world_size() // read_int("SLURM_STEP_NUM_TASKS", 1, minimum=1))
    return local_world_size()


def launch_seconds() -> float:
    """How long ranks wait for one another at the start; to be raised where importing torch takes minutes."""
    found = os.environ.get("LAUNCH_SECONDS", "50")
    try:
        seconds = float(found)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(
            f"environment variable LAUNCH_SECONDS: found {found[:40]!r}, allowed: a number of seconds. "
            "Correct it or unset it."
        )
    return seconds


def read_int(name: str, default: int, *, minimum: int = 0) -> int:
    """The integer in an environment variable. Raises ValueError that names the variable."""
    found = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", found) or int(found) < minimum:
        raise ValueError(
            f"environment variable {name}: found {found[:40]!r}, allowed: an integer of at least {minimum}. "
            "Correct it or unset it."
        )
    return int(found)


def available_cores() -> int:
    """Cores this process may use: the minimum of its affinity mask, cgroups (version 2) and SLURM task.

    Raises ValueError if SLURM_CPUS_PER_TASK is not an integer.
    """
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if "SLURM_CPUS_PER_TASK" in os.environ:
        limits.append(read_int("SLURM_CPUS_PER_TASK", 1, minimum=1))
    with contextlib.suppress(OSError):  # there are no cgroups here
        for folder in _cgroups("cpu"):
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max":
                    limits.append(max(1, int(quota) // int(period)))
    return min(limits)


def available_memory() -> int:
    """Bytes of host memory that this process may still allocate.

    Clusters limit the memory of a job by cgroups, so this may be less than the free memory of the host. File
    pages that a cgroup has cached count as free.
    """
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError):  # there are no cgroups here
        for folder in _cgroups("memory"):
            v2 = (folder / "memory.max").exists()
            limit_file, used = ("memory.max", "anon") if v2 else ("memory.limit_in_bytes", "total_rss")
            if (folder / limit_file).exists() and (
                limit := (folder / limit_file).read_text().strip()
            ) != "max":
                usage = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, int(limit) - int(usage[used]))
    return min(free, sys.maxsize)


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup of `controller` and of the cgroups above it, in both versions."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
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
