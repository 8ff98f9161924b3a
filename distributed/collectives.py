"""Collectives over JSON values, and errors that all ranks raise together."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import system
from distributed.errors import LaunchError, ignore_launcher_sigterm

LAUNCH_SECONDS = float(os.environ.get("LAUNCH_SECONDS", "50"))
"""How long processes wait for one another at the start; raise it where importing torch takes minutes."""

RUN_SECONDS = 1800.0
"""Longest wait for another process after the start: the main process may write or verify files meanwhile."""


def all_gather_json(report: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """The JSON-able `report` of every process, in their order, on every process, within `seconds`."""
    if not dist.is_initialized():
        return [dict(report)]
    text = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)
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
            f"process {dist.get_rank()} on {socket.gethostname()} lost the others\n"
            f"  found: {str(error).splitlines()[0]}",
            on_all_ranks=False,
        ) from error
    rows = zip(texts, lengths, strict=True)
    return [json.loads(row[: int(length)].numpy().tobytes()) for row, length in rows]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """What fails inside on any process fails on all: there with its own error, elsewhere with a LaunchError.

    Whatever reads or writes files where several processes could see different things belongs inside.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    report = {"host": socket.gethostname(), "error": f"{type(mine).__name__}: {mine}" if mine else ""}
    reports = all_gather_json(report, RUN_SECONDS)
    failed = [(rank, other) for rank, other in enumerate(reports) if other["error"]]
    if failed:
        ignore_launcher_sigterm()
    if mine:
        vars(mine)["on_all_ranks"] = all(other["error"] == report["error"] for other in reports)
        raise mine
    if failed:
        rank, other = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise LaunchError(f"process {rank} on {other['host']}{more}: {other['error']}")


def require_equal(mine: Mapping[str, Any]) -> None:
    """Raise a LaunchError on all processes, naming hosts and values, unless `mine` is the same on all."""
    report = {"host": socket.gethostname(), "problem": "", **mine}
    raise_if_different(all_gather_json(report, RUN_SECONDS))


def raise_if_different(reports: Sequence[Mapping[str, Any]]) -> None:
    """Raise a LaunchError that names every problem and every difference with its hosts."""
    lines = [
        f"process {rank} on {report['host']} {report['problem']}"
        for rank, report in enumerate(reports)
        if report["problem"]
    ]
    for key in reports[0].keys() - {"host", "problem", "mark"}:
        values: dict[Any, list[int]] = {}
        for rank, report in enumerate(reports):
            values.setdefault(report.get(key), []).append(rank)
        if len(values) > 1:
            found = (
                f"{value} on {', '.join(hosts_of([reports[n] for n in ranks]))} (process {system.format_ranges(ranks)})"
                for value, ranks in values.items()
            )
            lines.append(f"{key}: {'; '.join(found)}")
    if lines:
        ignore_launcher_sigterm()
        raise LaunchError("the processes of this launch do not fit together\n  " + "\n  ".join(sorted(lines)))


def hosts_of(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The hosts of `reports`, in order, each once."""
    return list(dict.fromkeys(report["host"] for report in reports))
