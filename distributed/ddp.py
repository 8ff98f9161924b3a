"""What the processes of a training tell each other about the network, such that a restart changes no bit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def warm_up_ddp(network: nn.Module, images: torch.Tensor) -> None:
    """One backward pass on `images`, of a step's shape, that leaves weights and buffers as they were.

    DistributedDataParallel sums gradients in buckets, and lays these out anew after its first step. The
    layout decides the order of sums over three and more processes, and so their last bits: without this the
    first step of a run that goes on would differ from the same step of a run that was never stopped.
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
    """Give every process the buffers of the main one, which are those that a checkpoint holds.

    Unless batch normalisation is synchronised, each process has running statistics of its own after a step.
    """
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)
