"""The fastest cache that fits into the memory that is free: what `cache: auto` means."""

import contextlib
import logging
import os
import sys
from pathlib import Path

import psutil
import torch

from .order import LANES

FREE_SHARE = 0.4  # of what is free; the test set may take as much again, and the network needs the rest
PROCESSES, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")

log = logging.getLogger(__name__)


def fitting_cache(pair_bytes: int, seeds: int, device: torch.device, processes: int, *, rotated: bool) -> str:
    """The name of the cache, which the log gives with the reason.

    `pair_bytes` is the size of both twins of one of the `seeds`, in all shared out over `processes`; with
    `rotated` host memory holds them twice.
    """
    # The lanes of a process, rounded up; at the borders of its share it needs pairs that others need too.
    lanes = min(LANES, -(-LANES // processes) + (LANES % processes > 0))
    share = min(seeds, seeds * lanes // LANES + 3) * pair_bytes
    if device.type == "cuda":
        free = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
        if share <= free:
            log.info("cache: device (%.1f GiB of cubes, %.1f GiB free for them)", share / 2**30, free / 2**30)
            return "device"
    share *= 2 if rotated else 1
    free = FREE_SHARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    choice = "memory" if share <= free else "disk"
    log.info("cache: %s (%.1f GiB of cubes, %.1f GiB free for them)", choice, share / 2**30, free / 2**30)
    return choice


def free_memory() -> int:
    """Bytes of host memory that this job may still take.

    Clusters bound the memory of a job by control groups, so it may be less than the machine has. What a group
    uses for cached files counts as free.
    """
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError):  # there are no control groups here
        for line in (PROCESSES / "self/cgroup").read_text().splitlines():
            number, kinds, group = line.split(":", 2)
            if number == "0":  # version 2
                free = min(free, _left(GROUPS, group, "memory.max", "anon"))
            elif kinds == "memory":  # version 1
                free = min(free, _left(GROUPS / "memory", group, "memory.limit_in_bytes", "total_rss"))
    return free


def _left(root: Path, group: str, limit: str, used: str) -> int:
    """What the limits of a group and of those above it leave, in bytes."""
    left = sys.maxsize
    folder = root / group.lstrip("/")
    for level in (folder, *folder.parents):
        if (level / limit).exists() and (most := (level / limit).read_text().strip()) != "max":
            numbers = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
            left = min(left, int(most) - int(numbers[used]))
    return left
