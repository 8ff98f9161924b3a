"""Collectives over JSON values, and errors that all ranks raise together."""

from __future__ import annotations

import system

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from training.distributed.errors import LaunchError, error_summary, ignore_launcher_sigterm

RUN_SECONDS = 1800.0
"""Longest wait for another rank after the start: rank 0 may write or verify files meanwhile."""


def all_gather_json(value: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """The JSON-able `value` of every rank, in the order of ranks, on every rank.

    Raises:
        LaunchError: on this rank, if another one does not answer within `seconds`.
    """
    if not dist.is_initialized():
        return [dict(value)]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    limit = timedelta(seconds=seconds)
    try:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, torch.tensor([len(text)]), async_op=True).wait(limit)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(texts, padded, async_op=True).wait(limit)
    except RuntimeError as error:
        raise LaunchError(
            f"rank {dist.get_rank()} on {socket.gethostname()} lost the connection to the other ranks: "
            f"{error_summary(error)}\nSee the error of the rank that ended first.",
            on_all_ranks=False,
        ) from error
    rows = zip(texts, lengths, strict=True)
    return [json.loads(row[: int(length)].numpy().tobytes()) for row, length in rows]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A barrier: if any rank raises inside, all ranks raise, and none waits for a rank that failed.

    The failed rank raises its own error, the others a LaunchError that quotes it. Code that reads or writes
    files belongs inside, because ranks may see different files.
    """
    own_error: Exception | None = None
    try:
        yield
    except Exception as error:
        own_error = error
    text = f"{type(own_error).__name__}: {own_error}" if own_error else ""
    reports = all_gather_json({"host": socket.gethostname(), "error": text}, RUN_SECONDS)
    failed = [(rank, report) for rank, report in enumerate(reports) if report["error"]]
    if failed:
        ignore_launcher_sigterm()
    if own_error:
        vars(own_error)["on_all_ranks"] = all(report["error"] == text for report in reports)
        raise own_error
    if failed:
        rank, report = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise LaunchError(f"rank {rank} on {report['host']}{more} failed: {report['error']}")


def require_equal(values: Mapping[str, Any]) -> None:
    """Raise a LaunchError on all ranks, with hosts and values, if `values` differs. Collective."""
    report = {"host": socket.gethostname(), "problem": "", **values}
    raise_if_different(all_gather_json(report, RUN_SECONDS))


def raise_if_different(reports: Sequence[Mapping[str, Any]]) -> None:
    """Raise a LaunchError that names every problem and every difference between ranks, with their hosts.

    Each report holds `host`, `problem` (empty if there is none) and values that should be equal on all ranks.
    """
    lines = [
        f"rank {rank} on {report['host']} {report['problem']}"
        for rank, report in enumerate(reports)
        if report["problem"]
    ]
    for key in reports[0].keys() - {"host", "problem"}:
        ranks_with: dict[Any, list[int]] = {}
        for rank, report in enumerate(reports):
            ranks_with.setdefault(report.get(key), []).append(rank)
        if len(ranks_with) > 1:
            found = (
                f"{value} on {', '.join(hosts_of([reports[rank] for rank in ranks]))} ({format_ranks(ranks)})"
                for value, ranks in ranks_with.items()
            )
            lines.append(f"{key}: {'; '.join(found)}")
    if lines:
        ignore_launcher_sigterm()
        raise LaunchError("the ranks of this launch differ\n  " + "\n  ".join(sorted(lines)))


def hosts_of(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The hosts of `reports`, in order, each once."""
    return list(dict.fromkeys(report["host"] for report in reports))


def format_ranks(ranks: Sequence[int]) -> str:
    """[2] gives "rank 2", [0, 1, 2] "ranks 0-2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {system.format_ranges(ranks)}"
