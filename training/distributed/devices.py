"""The device of this process: its name, its settings, and a warning if there is one that is not used."""

from __future__ import annotations

import system

import atexit
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
PRECISION_NAMES = {
    "no": "float32",
    "fp16": "float16 mixed precision",
    "bf16": "bfloat16 mixed precision",
}
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")  # of the drivers of NVIDIA and AMD
GIB = 2**30


def device_type() -> str:
    """The type of the device that Accelerate chooses for this process."""
    # A torch built for CUDA names it as the current accelerator even without a driver.
    if system.read_flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def describe_hardware(accelerator: Accelerator) -> str:
    """One line about what this rank computes on: device, memory, precision and threads."""
    device, precision = accelerator.device, PRECISION_NAMES[accelerator.mixed_precision]
    name, memory = cpu_name(), f"{system.available_memory() / GIB:.1f} GiB of memory free"
    if device.type != "cpu":
        module = torch.get_device_module(device)
        memory = "memory shared with the CPU"  # MPS: one chip
        if hasattr(module, "mem_get_info"):
            name = module.get_device_name(device)
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
    if system.read_flag("ACCELERATE_USE_CPU") or hidden or torch.accelerator.is_available():
        return
    versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built_for = next((f"{name} {version}" for name, version in versions.items() if version), None)
    gpu_file = next((path for path in GPU_FILES if Path(path).exists()), None)
    if built_for:
        try:
            torch.cuda.init()
            reason = "no device is visible"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
        reason = f"torch {torch.__version__} is built for {built_for}, but {reason}"
    elif gpu_file:
        reason = (
            f"the host has a GPU ({gpu_file}), but torch {torch.__version__} is built without GPU support. "
            "Install a torch that supports it."
        )
    else:
        return
    print(f"warning: this run uses the CPU: {reason}", file=sys.stderr)


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
