"""One process: its memory, its threads, and the signals that ask it to stop."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

CGROUP_OF_SELF, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def prepare_process() -> None:
    """Set what must stand before the first large tensor: allocator, arithmetic, CPU processes, threads."""
    keep_freed_memory()
    # Once a network is sure of a batch its gradients fall below 1e-38, where a CPU computes 50 times slower.
    # Threads take this over from the one that starts them, so it stands before the first parallel operation.
    torch.set_flush_denormal(True)
    # What deterministic kernels need of cuBLAS, which reads it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Under mpirun the ranks have other names; torch knows only its own.
    for name, others in {
        "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
        "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
        "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
        "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    }.items():
        for other in others:
            if other in os.environ:
                os.environ.setdefault(name, os.environ[other])
    if world_size() > 1 and (not torch.accelerator.is_available() or torch.backends.mps.is_available()):
        # Without this Accelerate makes of n CPU processes n single ones, each of which trains the whole run.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif world_size() == 1:
        warn_of_lone_process()
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ:
        end_with_launcher()
    if not threads_were_chosen():
        threads = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
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


def world_size() -> int:
    """Processes of this launch, as the launcher told them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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


def available_cores() -> int:
    """Cores this process may use: of its affinity mask, its control group (version 2) and its SLURM task."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if "SLURM_CPUS_PER_TASK" in os.environ:
        limits.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    try:
        groups = CGROUP_OF_SELF.read_text().splitlines()
        group = CGROUPS / next((line[3:].lstrip("/") for line in groups if line.startswith("0::")), "")
        for folder in (group, *group.parents):
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max":
                    limits.append(max(1, int(quota) // int(period)))
    except OSError:
        pass
    return min(limits)


class Vote:
    """Whether any process wishes something.

    With one process the answer is immediate. With several it comes one call later, the same on all: each call
    starts a sum of 8 bytes between hosts' memories and takes the result of the call before, which has long
    arrived. So neither the device nor the host waits, however long a step is.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __call__(self, wish: bool) -> bool:
        """Every process must call this equally often."""
        if not dist.is_initialized():
            return wish
        before = self._pending
        wishes = torch.tensor([int(wish)])
        self._pending = dist.all_reduce(wishes, async_op=True), wishes
        if before is None:
            return False
        work, wishes = before
        work.wait()
        return bool(wishes.item())


class StopSignals:
    """A context in which SIGTERM, SIGINT and SIGUSR1 are a wish to stop; a second SIGINT ends at once.

    So are `minutes`, if given, when they have passed.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, minutes: float | None = None) -> None:
        self.name: str | None = None
        """Why to stop: the name of the signal that this process received, or what `request` was told."""
        self._clock: threading.Timer | None = None
        if minutes is not None:
            self._clock = threading.Timer(60 * minutes, self.request, ["max_minutes"])
            self._clock.daemon = True
        self._vote = Vote()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._received) for number in self.SIGNALS}
        if self._clock is not None:
            self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._clock is not None:
            self._clock.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            # The kernel acts on the next one, also while Python waits inside a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def request(self, reason: str) -> None:
        """Wish to stop for another reason than a signal, such as the time being up."""
        self.name = self.name or reason

    def agreed(self) -> bool:
        """Whether to stop now, the same on all processes; to be called by all of them once a step."""
        stop = self._vote(self.name is not None)
        if stop:
            self.request("another process was told to")
        return stop
