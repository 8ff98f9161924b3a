"""The fastest cache that fits into the memory that is free: what `cache: auto` means."""

import logging

import torch

import system

from .sampler import STREAMS

FREE_SHARE = 0.4  # of what is free; the test set may take as much again, and the network needs the rest

log = logging.getLogger(__name__)


def choose_cache(pair_bytes: int, seeds: int, device: torch.device, processes: int, *, rotated: bool) -> str:
    """The name of the cache, which the log gives with the reason.

    `pair_bytes` is the size of both twins of one of the `seeds`, in all shared out over `processes`; with
    `rotated` host memory holds them twice.
    """
    # The streams of a process, rounded up; at the borders of its share it needs pairs that others need too.
    streams = min(STREAMS, -(-STREAMS // processes) + (STREAMS % processes > 0))
    share = min(seeds, seeds * streams // STREAMS + 3) * pair_bytes
    if device.type in ("cuda", "xpu"):
        free = FREE_SHARE * torch.get_device_module(device).mem_get_info(device)[0]
        if share <= free:
            log.info("cache: device (%.1f GiB of cubes, %.1f GiB free for them)", share / 2**30, free / 2**30)
            return "device"
    share *= 2 if rotated else 1
    free = FREE_SHARE * system.available_memory() / system.local_world_size()
    choice = "memory" if share <= free else "disk"
    log.info("cache: %s (%.1f GiB of cubes, %.1f GiB free for them)", choice, share / 2**30, free / 2**30)
    return choice
