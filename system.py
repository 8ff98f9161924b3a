"""What this process may use of its host, and its place in the launch. Any module may import this one."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

# torch and Accelerate read the names on the left; MPI and SLURM set those on the right.
RANK_VARIABLES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}


def adopt_mpi_ranks() -> None:
    """Set torch's rank variables from those of MPI, unless they are set."""
    for name, others in RANK_VARIABLES.items():
        for other in others:
            if other in os.environ:
                os.environ.setdefault(name, os.environ[other])


def world_size() -> int:
    """Number of ranks in this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank in the launch."""
    return int(os.environ.get("RANK", "0"))


def local_world_size() -> int:
    """Number of ranks of this launch on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_cores() -> int:
    """Cores this process may use: the minimum of its affinity mask, cgroup (version 2) and SLURM task."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if "SLURM_CPUS_PER_TASK" in os.environ:
        limits.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    with contextlib.suppress(OSError):  # there are no cgroups here
        for folder in _cgroups("cpu"):
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max":
                    limits.append(max(1, int(quota) // int(period)))
    return min(limits)


def available_memory() -> int:
    """Bytes of host memory this process may still allocate.

    Clusters limit the memory of a job by cgroups, so it may be less than the host has free. Memory that a
    cgroup uses for cached files counts as free.
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
