"""DistributedDataParallel set up such that a resumed run is bit-identical to an uninterrupted one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def warm_up_ddp(network: nn.Module, images: torch.Tensor) -> None:
    """Run one backward pass on `images` (b, C, N, N), of a step's shape; weights and buffers do not change.

    DistributedDataParallel sums gradients in buckets and rebuilds these after its first step. With three or
    more ranks their layout determines the order of the sums, and so the last bits of the gradients. Without
    a warm-up, the first step of a resumed run would use another layout than the same step of an
    uninterrupted run.
    """
    if not isinstance(network, nn.parallel.DistributedDataParallel):
        return
    before = [buffer.clone() for buffer in network.buffers()]
    network.train()
    network(images).sum().backward()
    network.zero_grad()
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)


def broadcast_buffers(network: nn.Module) -> None:
    """Copy the buffers of rank 0, which checkpoints hold, to all ranks. Collective.

    Unless batch normalization is synchronized, the running statistics of ranks differ after a step.
    """
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)
