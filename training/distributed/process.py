"""Set-up of one process: streams, allocator, arithmetic, rank variables and threads."""

from __future__ import annotations

import system

import ctypes
import os
import platform
import signal
import sys
import warnings
from pathlib import Path

import torch

from training.distributed.devices import configure_miopen, warn_of_unused_accelerator
from training.distributed.errors import LaunchError
from training.distributed.streams import tolerate_closed_streams


def setup_process() -> None:
    """Set what must be set before the first large tensor: streams, allocator, arithmetic, ranks, threads.

    Raises:
        LaunchError: if an environment variable of the launch is missing, invalid or inconsistent.
    """
    tolerate_closed_streams()
    keep_freed_memory()
    configure_miopen()
    # When a network is certain of a batch, gradients fall below 1e-38, where CPUs compute 50 times slower.
    # Threads inherit this setting from the thread that starts them: set it before the first parallel region.
    torch.set_flush_denormal(True)
    # Deterministic cuBLAS kernels need it; cuBLAS reads it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        system.setup_ranks()
        system.launch_seconds()
        share_cores()
        tasks = system.read_int("SLURM_STEP_NUM_TASKS", 1)
    except ValueError as error:
        raise LaunchError(str(error), on_all_ranks=False) from None
    if system.rank() == 0:
        warn_of_unused_accelerator()
    if system.world_size() > 1 and (
        not torch.accelerator.is_available() or torch.backends.mps.is_available()
    ):
        # Otherwise Accelerate takes n CPU ranks for n independent processes, each of which trains the run.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif system.world_size() == 1:
        warn_if_alone(tasks)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ:
        end_with_launcher()


def share_cores() -> None:
    """Divide the cores between the ranks of this host, unless the user chose a number of threads."""
    if threads_set_by_user():
        return
    threads = max(1, system.available_cores() // system.ranks_sharing_cores())
    if "numba" in sys.modules:  # first, because the two may share a thread pool
        sys.modules["numba"].set_num_threads(min(threads, sys.modules["numba"].config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # otherwise Accelerate sets the threads again


def end_with_launcher() -> None:
    """Let the kernel send SIGTERM, on which a run is saved, to this process when its parent ends.

    `accelerate launch` passes no signal on to a single process, which would train on unnoticed.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the kernel.

    By default every tensor above 32 MiB is mapped, zeroed page by page and unmapped again in every step,
    which takes about half of the time of a training step on a CPU. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def warn_if_alone(tasks: int) -> None:
    """Warn if the user asked for several ranks but this process is the only one of its launch.

    `tasks` is the number of processes that srun started.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        warnings.warn(
            "accelerate launch was to start several processes but started one: distributed_type MULTI_CPU "
            "needs mpirun. Use accelerate_configs/cpu_multi.yaml, which does not.",
            stacklevel=3,
        )
    if tasks > 1:
        warnings.warn(
            f"srun started {tasks} independent processes. To start them as the "
            "ranks of one launch, see accelerate_configs/slurm.sbatch.",
            stacklevel=3,
        )


def threads_set_by_user() -> bool:
    """Whether the user set OMP_NUM_THREADS. Launchers set it too (to 1, or to all cores of the host).

    The launcher is the parent process; /proc shows the environment that it was started with.
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
