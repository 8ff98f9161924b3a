"""One process: its memory, its threads, and the signals that ask it to stop."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import warnings
from pathlib import Path

import torch

import system


def setup_process() -> None:
    """Set what must stand before the first large tensor: allocator, arithmetic, CPU processes, threads."""
    keep_freed_memory()
    # Once a network is sure of a batch its gradients fall below 1e-38, where a CPU computes 50 times slower.
    # Threads take this over from the one that starts them, so it stands before the first parallel operation.
    torch.set_flush_denormal(True)
    # What deterministic kernels need of cuBLAS, which reads it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    system.adopt_mpi_ranks()
    if system.world_size() > 1 and (
        not torch.accelerator.is_available() or torch.backends.mps.is_available()
    ):
        # Without this Accelerate makes of n CPU processes n single ones, each of which trains the whole run.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif system.world_size() == 1:
        warn_of_lone_process()
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ:
        end_with_launcher()
    if not threads_were_chosen():
        threads = max(1, system.available_cores() // system.local_world_size())
        if "numba" in sys.modules:  # first, because the two may share their pool of threads
            sys.modules["numba"].set_num_threads(min(threads, sys.modules["numba"].config.NUMBA_NUM_THREADS))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # or Accelerate sets them anew


def end_with_launcher() -> None:
    """Have the kernel send this process SIGTERM, by which a run is saved, when its parent ends.

    `accelerate launch` passes no signal on to a single process, which would train on, unseen.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of handing it back to the kernel.

    By default every tensor above 32 MiB is mapped, zeroed page by page and unmapped again at every step,
    which takes about half of the time of a training step on a CPU. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def warn_of_lone_process() -> None:
    """Warn where several processes were asked for and this one is alone."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        warnings.warn(
            "accelerate launch was asked for several processes and started one: distributed_type MULTI_CPU "
            "needs mpirun. accelerate_configs/cpu_multi.yaml starts several without it.",
            stacklevel=3,
        )
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        warnings.warn(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} programs that do not know each other. "
            "accelerate_configs/slurm_multi_node.sbatch shows how to start them as one.",
            stacklevel=3,
        )


def threads_were_chosen() -> bool:
    """Whether the user set OMP_NUM_THREADS; launchers set it too (to 1, or to all cores of the host).

    The launcher is the parent process, and /proc still shows the environment that it was started with.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if "LOCAL_RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return True
    try:
        parent = Path(f"/proc/{os.getppid()}")
        return (
            b"OMP_NUM_THREADS=" in (parent / "environ").read_bytes()
            or b"num_cpu_threads_per_process" in (parent / "cmdline").read_bytes()
        )
    except OSError:
        return os.environ["OMP_NUM_THREADS"] != "1"
