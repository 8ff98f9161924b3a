"""Shared by the benchmarks: the training file, runners in their own processes, the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peers import ROOT
from step_timer import Settings

STRENGTH = 1.0
"""Physical, so that no network fits a batch within a round: gradients would become denormal then, which slows
down the peers alone, since this project flushes denormal numbers to zero."""
PACKAGES = ("torch", "accelerate", "lightning", "transformers", "numpy", "numba")


@contextmanager
def scratch_folder(folder: Path | None) -> Iterator[Path]:
    """A folder for files needed while measuring; temporary if none is given."""
    with tempfile.TemporaryDirectory(prefix="gravity-cnn-bench-") as temporary:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        yield folder or Path(temporary)


def synthetic_file(scratch: Path, seeds: int, size: int) -> Path:
    """A file of `seeds` pairs of cubes in `scratch`, written if it is not there."""
    path = scratch / f"synthetic_{size}_{seeds}.h5"
    if not path.exists():
        sys.path.insert(0, str(ROOT))
        import datasets

        datasets.write_synthetic(path, seeds=seeds, size=size, strength=STRENGTH)
    return path


def run_benchmark(
    name: str, settings: Settings, launcher: tuple[str, ...] = (), threads: int | None = None
) -> dict[str, Any]:
    """The measurements of a runner in its own process, or in those of a launcher, with `threads` threads.

    Raises RuntimeError with the end of its output if it failed.
    """
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        given, result, output_file = (
            Path(folder) / file for file in ("settings.json", "result.json", "output.txt")
        )
        given.write_text(json.dumps(asdict(settings) | {"scratch": folder}))
        program = [str(ROOT / "benchmarks" / "runners.py"), name, str(given), str(result)]
        environment = dict(os.environ)
        if settings.device == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with output_file.open("w") as output:
            subprocess.run(
                [sys.executable, *launcher, *program],
                stdout=output,
                stderr=output,
                env=environment,
                check=False,
            )
        if not result.exists():
            raise RuntimeError(f"{name} failed with {settings}:\n{output_file.read_text()[-3000:]}")
        numbers: dict[str, Any] = json.loads(result.read_text())
        return numbers


def machine(device: str) -> dict[str, Any]:
    """The hardware and the versions that numbers were measured with."""
    described: dict[str, Any] = {"processor": platform.machine(), "device": device}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        described["processor"] = facts.get("model name", described["processor"])
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        described["instructions"] = [name for name in wanted if name in facts.get("flags", "").split()]
        memory = Path("/proc/meminfo").read_text().split(maxsplit=2)[1]
        described["memory_GiB"] = round(int(memory) / 2**20, 1)
    described["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device == "cuda":
        import torch

        described["gpu"] = torch.cuda.get_device_name()
    described["system"] = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    for package in PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "not installed"
    return described


def machine_line(described: dict[str, Any]) -> str:
    """The machine in one sentence."""
    parts = [f"{described['processor']}, {described['cores']} cores"]
    if described.get("instructions"):
        parts.append(f" ({', '.join(described['instructions'])})")
    if "memory_GiB" in described:
        parts.append(f", {described['memory_GiB']} GiB")
    if "gpu" in described:
        parts.append(f", {described['gpu']}")
    versions = ", ".join(f"{package} {described[package]}" for package in PACKAGES)
    return f"{''.join(parts)}; {described['system']}; {versions}."
