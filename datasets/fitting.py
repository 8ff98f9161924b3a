"""The fastest cache that fits into the memory that is free: what `cache: auto` means."""

import logging
import os
from pathlib import Path

import psutil
import torch

FREE_SHARE = 0.4  # of what is free; the test set may take as much again, and the network needs the rest

log = logging.getLogger(__name__)


def fitting_cache(pair_bytes: int, seeds: int, device: torch.device, processes: int, *, rotated: bool) -> str:
    """The name of the cache, which the log gives with the reason.

    `pair_bytes` is the size of both twins of one of the `seeds`, in all shared out over `processes`; with
    `rotated` host memory holds them twice.
    """
    # At the borders of its share a process needs pairs that others need too.
    share = min(seeds, seeds // processes + 3) * pair_bytes
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


def free_memory(processes: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this job may still take.

    Clusters bound the memory of a job by control groups (version 2 is looked at), so what the machine has
    free is not all. What a group uses for cached files counts as free.
    """
    free = int(psutil.virtual_memory().available)
    try:
        lines = (processes / "self/cgroup").read_text().splitlines()
        group = groups / next(line[4:] for line in lines if line.startswith("0::/"))
        for level in (group, *group.parents):
            limit = (level / "memory.max").read_text().strip() if (level / "memory.max").exists() else "max"
            if limit != "max":
                used = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
                free = min(free, int(limit) - int(used["anon"]))
    except (OSError, StopIteration):
        pass  # there are no control groups, or none of version 2
    return free
