"""Devices of the ranks: which they are, whether they reach each other, and what they are called."""

from __future__ import annotations

import system

import atexit
import os
import platform
import shutil
import socket
import tempfile
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from training.distributed.collectives import all_gather_json, format_ranks, raise_if_different
from training.distributed.errors import LaunchError, deadline, error_summary
from training.distributed.launcher import read_flag

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
PCI_ADDRESS = ("pci_domain_id", "pci_bus_id", "pci_device_id")
PRECISION_NAMES = {
    "no": "float32",
    "fp16": "float16 mixed precision",
    "bf16": "bfloat16 mixed precision",
}
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")  # of the drivers of NVIDIA and AMD
GIB = 2**30


def device_of_rank() -> torch.device:
    """The device that Accelerate chooses for this rank."""
    # A torch built for CUDA names it as the current accelerator even without a driver.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or read_flag("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    local_rank = system.read_int("LOCAL_RANK", 0)
    return torch.device(accelerator.type, local_rank % max(1, torch.accelerator.device_count()))


def require_own_devices() -> None:
    """Compare the devices of all ranks, before the Accelerator uses them. Collective, over host memory.

    Raises:
        LaunchError: on all ranks, if the types of devices differ or two ranks share a device.
    """
    device = device_of_rank()
    report = {"host": socket.gethostname(), "problem": "", "device": device.type}
    reports = all_gather_json(report | {"identity": identity(device)}, system.launch_seconds())
    identities = [report.pop("identity") for report in reports]
    raise_if_different(reports)
    ranks_of = defaultdict(list)
    for rank, (report, own) in enumerate(zip(reports, identities, strict=True)):
        if own:
            ranks_of[report["host"], own].append(rank)
    if shared := [(host, ranks) for (host, _), ranks in ranks_of.items() if len(ranks) > 1]:
        host, ranks = shared[0]
        raise LaunchError(
            f"{format_ranks(ranks)} on {host} share one device. Start at most one rank per device: reduce "
            "--num_processes, or make more devices visible."
        )


def identity(device: torch.device) -> str:
    """A text that differs between the devices of a host, also if each rank sees one device; "" if unknown."""
    if device.type == "cpu":
        return ""
    module = torch.get_device_module(device)
    properties = module.get_device_properties(device) if hasattr(module, "get_device_properties") else None
    address = [getattr(properties, name, None) for name in PCI_ADDRESS]
    if None not in address:
        return f"PCI {address}"
    # Without an address, ranks that see several devices are known to see the same ones.
    return str(device) if torch.accelerator.device_count() > 1 else ""


def sum_over_devices(accelerator: Accelerator) -> None:
    """Sum one number over the devices of all ranks, within LAUNCH_SECONDS. Collective.

    The first collective on devices makes their communicators, which can wait for ever for a failed rank.

    Raises:
        LaunchError: if the devices do not reach each other.
    """
    if not dist.is_initialized():
        return
    rank, seconds = dist.get_rank(), system.launch_seconds()

    def not_reached(reason: str) -> LaunchError:
        return LaunchError(
            f"rank {rank} on {socket.gethostname()}: device {accelerator.device} does not reach the devices "
            f"of the other ranks: {reason}\n"
            "Set NCCL_DEBUG=INFO to see why, and NCCL_SOCKET_IFNAME to choose the network.",
            on_all_ranks=False,
        )

    with deadline(seconds + 10, not_reached("no answer")):
        try:
            ones = torch.ones(1, device=accelerator.device)
            dist.all_reduce(ones, async_op=True).wait(timedelta(seconds=seconds))
            total = int(ones.item())
        except RuntimeError as error:
            raise not_reached(error_summary(error)) from error
    if total != dist.get_world_size():
        raise LaunchError(
            f"the devices of {dist.get_world_size()} ranks added as many ones to {total}. Check the drivers."
        )


def describe_hardware(accelerator: Accelerator) -> str:
    """One line about what this rank computes on: device, memory, precision and threads."""
    device, precision = accelerator.device, PRECISION_NAMES[accelerator.mixed_precision]
    if device.type == "cpu":
        name, memory = cpu_name(), f"{system.available_memory() / GIB:.1f} GiB of memory free"
    else:
        module = torch.get_device_module(device)
        name = (
            module.get_device_name(device) if hasattr(module, "get_device_name") else cpu_name()
        )  # MPS: one chip
        memory = "memory shared with the CPU"
        if hasattr(module, "mem_get_info"):
            free, total = module.mem_get_info(device)
            memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB of memory free"
        if accelerator.mixed_precision == "no" and uses_tf32(device):
            precision += " (TF32 in convolutions)"
    threads = torch.get_num_threads()
    return f"{device} ({name}), {memory}, {precision}, {threads} CPU thread{'s' if threads > 1 else ''}"


def uses_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions round operands to 10 bits: the default on NVIDIA GPUs since Ampere."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_name() -> str:
    """The model of the CPU, as far as the operating system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def warn_of_unused_accelerator() -> None:
    """Warn if the CPU will be used although torch is built for GPUs, or the host has some.

    There is no warning if the user asked for the CPU or hid the devices.
    """
    visible = [os.environ[name].strip() for name in VISIBLE_DEVICES if name in os.environ]
    hidden = any(devices == "" or devices.startswith("-") for devices in visible)
    if read_flag("ACCELERATE_USE_CPU") or hidden or torch.accelerator.is_available():
        return
    versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built_for = next((f"{name} {version}" for name, version in versions.items() if version), None)
    if built_for:
        try:
            torch.cuda.init()
            reason = "no device is visible"
        except (RuntimeError, AssertionError) as error:
            reason = error_summary(error)
        warnings.warn(
            f"this run uses the CPU: torch {torch.__version__} is built for {built_for}, but {reason}",
            stacklevel=3,
        )
    elif found := [path for path in GPU_FILES if Path(path).exists()]:
        warnings.warn(
            f"this run uses the CPU: the host has a GPU ({found[0]}), but torch {torch.__version__} is built "
            "without GPU support. Install a torch that supports it.",
            stacklevel=3,
        )


def configure_miopen() -> None:
    """On AMD GPUs, let MIOpen use channels-last kernels and a kernel database per process, on local disk.

    By default torch copies channels-last tensors to NCHW and back, and all ranks write one database in the
    home folder, and damage it (MIOpen issues 1878 and 2214). What the user has set is kept.
    """
    if torch.version.hip is None:
        return
    os.environ.setdefault("PYTORCH_MIOPEN_SUGGEST_NHWC", "1")
    os.environ.setdefault("PYTORCH_MIOPEN_SUGGEST_NHWC_BATCHNORM", "1")
    if "MIOPEN_USER_DB_PATH" not in os.environ:
        folder = tempfile.mkdtemp(prefix="miopen-")
        os.environ["MIOPEN_USER_DB_PATH"] = folder
        os.environ.setdefault("MIOPEN_CUSTOM_CACHE_DIR", folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
