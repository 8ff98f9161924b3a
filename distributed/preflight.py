"""Comparison of all ranks before the first step."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator

import files
import system
from distributed.collectives import LAUNCH_SECONDS, all_gather_json, hosts_of, raise_if_different
from distributed.errors import LaunchError


def preflight(accelerator: Accelerator, config: Mapping[str, Any]) -> str:
    """Compare all processes before the first step. Returns a line that says what runs where.

    `config` is the resolved configuration, {section: {key: value}}.

    Raises:
        LaunchError: on every process, within a minute, naming what is wrong or differs and on which hosts.
    """
    check_device(accelerator)
    report = describe(accelerator, config)
    folder = files.existing_parent(Path(config["train_params"]["log_dir"]))
    mark: Path | None = None
    try:
        mark = Path(tempfile.mkstemp(prefix=".preflight-", dir=folder)[1])
    except OSError as error:
        report["problem"] = report["problem"] or f"cannot write {folder}: {error.strerror}"
    try:
        reports = all_gather_json(report | {"mark": str(mark or "")}, LAUNCH_SECONDS)
        # Every process looks for the file of the main one: is the folder the same?
        sees = all_gather_json({"mark": Path(reports[0]["mark"]).exists()}, LAUNCH_SECONDS)
    finally:
        if mark:
            mark.unlink()
    for other, seen in zip(reports, sees, strict=True):
        if not seen["mark"] and not other["problem"]:
            other["problem"] = f"does not see the run folder of {reports[0]['host']}: {folder} is not shared"
    raise_if_different(reports)
    processes = len(reports)
    hosts = {host: [n for n, r in enumerate(reports) if r["host"] == host] for host in hosts_of(reports)}
    places = ", ".join(f"{host}: {system.format_ranges(ranks)}" for host, ranks in hosts.items())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return (
        f"{processes} process{'es' if processes > 1 else ''} ({places}), {reports[0]['device']}, "
        f"torch {reports[0]['torch']}, accelerate {reports[0]['accelerate']}, "
        f"configuration {digest}, code {reports[0]['code']}"
    )


def check_device(accelerator: Accelerator) -> None:
    """Sum one number over all processes on their devices, within LAUNCH_SECONDS."""
    if not dist.is_initialized():
        return
    ones = torch.ones(1, device=accelerator.device)
    try:
        dist.all_reduce(ones, async_op=True).wait(timedelta(seconds=LAUNCH_SECONDS))
        total = int(ones.item())
    except RuntimeError as error:
        raise LaunchError(
            f"process {dist.get_rank()} on {socket.gethostname()}: its device {accelerator.device} does not "
            f"reach the others'\n  found: {str(error).splitlines()[0]}",
            on_all_ranks=False,
        ) from error
    if total != dist.get_world_size():
        raise LaunchError(f"a sum of ones over {dist.get_world_size()} processes gave {total}")


def describe(accelerator: Accelerator, config: Mapping[str, Any]) -> dict[str, Any]:
    """What this process has. All but `host` and `problem` should be the same on_all_ranks."""
    data, problem = config["data_params"], ""
    try:
        with open(data["datafile"], "rb") as file:
            size = f"{file.seek(0, os.SEEK_END)} bytes"
    except FileNotFoundError:
        size = "absent"
        if not data.get("synthetic"):
            problem = f"has no data file {data['datafile']}"
    except OSError as error:
        size, problem = "unreadable", f"cannot read the data file: {error}"
    return {
        "host": socket.gethostname(),
        "problem": problem,
        "device": accelerator.device.type,
        "mixed precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "code": code_hash(Path(__file__).parents[1]),
        "data file": size,
    } | {f"{section}.{key}": repr(value) for section, keys in config.items() for key, value in keys.items()}


def code_hash(root: Path) -> str:
    """Hash of the Python files of this checkout, without its tests and whatever was installed inside it."""
    digest = hashlib.sha256()
    for path in sorted((*root.glob("*.py"), *root.glob("[a-z]*/*.py"))):
        if path.parent.name not in ("tests", "benchmarks"):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]
