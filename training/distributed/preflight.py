"""Preflight: all ranks compare their set-up before the first step."""

from __future__ import annotations

import system

import hashlib
import json
import os
import platform
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator

from training.distributed.collectives import all_gather_json, hosts_of, raise_if_different
from training.distributed.devices import sum_over_devices
from training.distributed.errors import LaunchError


def preflight(accelerator: Accelerator, config: Mapping[str, Any]) -> str:
    """Compare all ranks. Returns one line with hosts, ranks, device, versions and hashes. Collective.

    `config` is the resolved configuration, {section: {key: value}}.

    Raises:
        LaunchError: on every rank, within a minute, naming every problem and difference with its hosts.
    """
    if accelerator.num_processes != system.world_size():
        raise LaunchError(
            f"WORLD_SIZE is {system.world_size()}, but Accelerate found {accelerator.num_processes}. "
            "Start the ranks with accelerate launch or torchrun.",
            on_all_ranks=False,
        )
    sum_over_devices(accelerator)
    report, seconds = describe(accelerator, config), system.launch_seconds()
    folder = system.existing_parent(Path(config["train_params"]["log_dir"]))
    mark: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".preflight-", dir=folder)
        os.close(descriptor)
        mark = Path(name)
    except OSError as error:
        report["problem"] = report["problem"] or f"cannot write to {folder}: {error.strerror}"
    try:
        reports = all_gather_json(report, seconds)
        # Every rank looks for the file of rank 0, to find out whether the folder is shared.
        marks = all_gather_json({"mark": str(mark or "")}, seconds)
        seen = all_gather_json({"mark": Path(marks[0]["mark"]).exists()}, seconds)
    finally:
        if mark:
            mark.unlink()
    for other, sees in zip(reports, seen, strict=True):
        if not sees["mark"] and not other["problem"]:
            other["problem"] = f"does not see the run folder of {reports[0]['host']}: {folder} is not shared"
    raise_if_different(reports)
    processes = len(reports)
    hosts = {host: [n for n, r in enumerate(reports) if r["host"] == host] for host in hosts_of(reports)}
    where = ", ".join(f"{host}: {system.format_ranges(ranks)}" for host, ranks in hosts.items())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return (
        f"{processes} process{'es' if processes > 1 else ''} ({where}), {reports[0]['device']}, "
        f"torch {reports[0]['torch']}, accelerate {reports[0]['accelerate']}, "
        f"configuration {digest}, code {reports[0]['code']}"
    )


def describe(accelerator: Accelerator, config: Mapping[str, Any]) -> dict[str, Any]:
    """The set-up of this rank. All entries but `host` and `problem` must be the same on all ranks."""
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
        "code": code_hash(Path(__file__).parents[2]),
        "data file": size,
    } | {f"{section}.{key}": repr(value) for section, keys in config.items() for key, value in keys.items()}


def code_hash(root: Path) -> str:
    """Hash of the Python files of this checkout, without tests, benchmarks and installed packages."""
    digest = hashlib.sha256()
    for path in sorted((*root.glob("*.py"), *root.glob("[a-z]*/**/*.py"))):
        if path.parent.name not in ("tests", "benchmarks"):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]
