"""What all ranks do together: compare values, raise errors, share flags and buffers."""

from __future__ import annotations

import system
from system import UserError

import json
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.distributed.signals import Stopped, ignore_launcher_sigterm


def all_gather_json(value: Any) -> list[Any]:
    """The JSON-able `value` of every rank, in the order of ranks, on every rank. Collective."""
    if not dist.is_initialized():
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(text)]))
    padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
    padded[: len(text)] = text
    texts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    rows = zip(texts, lengths, strict=True)
    return [json.loads(row[: int(length)].numpy().tobytes()) for row, length in rows]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A barrier: if any rank raises inside, all ranks raise, and none waits for a rank that failed.

    The failed rank raises its own error, the others a UserError that quotes it. Code that reads or writes
    files belongs inside, because ranks may see different files. A rank that a signal stops inside stops all.
    """
    own_error: Exception | None = None
    stopped = ""
    try:
        yield
    except Exception as error:
        own_error = error
    except Stopped as stop:
        stopped = str(stop)
    text = f"{type(own_error).__name__}: {own_error}" if own_error else ""
    reports = all_gather_json({"host": socket.gethostname(), "error": text, "stopped": stopped})
    if stopped := next((report["stopped"] for report in reports if report["stopped"]), ""):
        raise Stopped(stopped)
    failed = [(rank, report) for rank, report in enumerate(reports) if report["error"]]
    if failed:
        ignore_launcher_sigterm()
    if own_error:
        vars(own_error)["on_all_ranks"] = all(report["error"] == text for report in reports)
        raise own_error
    if failed:
        rank, report = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"rank {rank} on {report['host']}{more} failed: {report['error']}", on_all_ranks=True)


def require_equal(values: Mapping[str, Any]) -> list[str]:
    """The host of every rank. All ranks must have the same `values`, which are scalars. Collective.

    Raises:
        UserError: on all ranks, if a value differs, with every difference and its hosts.
    """
    reports = all_gather_json({"host": socket.gethostname(), "values": values})
    hosts, differences = [report["host"] for report in reports], []
    for key in reports[0]["values"]:
        ranks_with = defaultdict(list)
        for rank, report in enumerate(reports):
            ranks_with[report["values"].get(key)].append(rank)
        if len(ranks_with) > 1:
            parts = [
                f"{value} on {', '.join(dict.fromkeys(hosts[rank] for rank in ranks))} "
                f"(rank{'s' if len(ranks) > 1 else ''} {system.format_ranges(ranks)})"
                for value, ranks in ranks_with.items()
            ]
            differences.append(f"\n  {key}: {'; '.join(parts)}")
    if differences:
        ignore_launcher_sigterm()
        raise UserError(f"the ranks of this launch differ{''.join(differences)}", on_all_ranks=True)
    return hosts


class AnyRankFlags:
    """Whether any rank has set a flag.

    With one rank the answer is immediate. With several ranks it comes one call later, the same on all: each
    call starts an all-reduce in host memory and returns the result of the previous one, which has long
    arrived. So neither device nor host waits.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank set it. Every rank must call this equally often."""
        if not dist.is_initialized():
            return flags
        previous = self._pending
        values = torch.tensor(flags, dtype=torch.int64)
        self._pending = dist.all_reduce(values, async_op=True), values
        if previous is None:
            return (False,) * len(flags)
        work, values = previous
        work.wait()
        return tuple(bool(value) for value in values.tolist())


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
