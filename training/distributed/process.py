"""One process: its set-up (streams, allocator, arithmetic, rank variables, threads), and its end."""

from __future__ import annotations

import system
from system import UserError

import atexit
import ctypes
import gc
import io
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from training.distributed.devices import configure_miopen, warn_of_unused_accelerator
from training.distributed.signals import Stopped, ignore_stop_signals, raise_stop_signals

CONNECTION_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "closed by remote peer",
    "remote process exited",
    "Timed out waiting",
)


# Set-up


def setup_process() -> None:
    """Set what must be set before the first large tensor: allocator, arithmetic, ranks, threads.

    Raises:
        UserError: if an environment variable of the launch is missing, invalid or inconsistent.
    """
    keep_freed_memory()
    # Otherwise the interpreter looks for cycles among all objects of torch and matplotlib before it ends.
    atexit.register(gc.freeze)
    configure_miopen()
    # When a network is certain of a batch, gradients fall below 1e-38, where CPUs compute 50 times slower.
    # Threads inherit this setting from the thread that starts them: set it before the first parallel region.
    torch.set_flush_denormal(True)
    # Deterministic cuBLAS kernels need it; cuBLAS reads it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    system.setup_ranks()
    if system.world_size() == 1 or "LOCAL_WORLD_SIZE" in os.environ:  # else when the ranks are connected
        share_cores()
    if system.rank() == 0:
        warn_of_unused_accelerator()
    if system.world_size() == 1:
        warn_if_alone()
    elif not torch.accelerator.is_available() or torch.backends.mps.is_available():
        # Otherwise Accelerate takes n CPU ranks for n independent processes, each of which trains the run.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ:
        end_with_launcher()


def setup_streams() -> None:
    """Write every line when it is printed, and go on when a stream is closed or its reader has gone.

    Otherwise a print to a lost terminal or to `| head` raises OSError, and after `>&-` sys.stdout is None.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file that opens gets this descriptor, and with it whatever C code prints.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):  # not captured
            # A character that the terminal's encoding lacks must not end a run.
            stream.reconfigure(line_buffering=True, write_through=False, errors="backslashreplace")
            vars(stream)["write"] = or_discard(type(stream).write, stream)
            vars(stream)["flush"] = or_discard(type(stream).flush, stream)


def or_discard(method: Callable[..., Any], stream: io.TextIOWrapper) -> Callable[..., Any]:
    """The `method` of a stream; once it fails, the null device takes the place of the stream's file."""

    def call(*arguments: str) -> Any:
        try:
            return method(stream, *arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    return call


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


def share_cores() -> None:
    """Divide the cores between the ranks of this host, unless the user chose a number of threads."""
    threads = torch.get_num_threads()
    chosen = threads_set_by_user()
    if not chosen:
        ranks = system.local_world_size()
        if (
            "SLURM_STEP_NUM_TASKS" in os.environ
        ):  # each task has other cores, and is one rank or starts several
            ranks = max(1, system.world_size() // system.read_int("SLURM_STEP_NUM_TASKS", 1, minimum=1))
        threads = max(1, system.available_cores() // ranks)
    require_threads(2 * threads + 8)  # about as many as a training has
    if not chosen:
        if "numba" in sys.modules:  # first, because the two may share a thread pool
            numba = sys.modules["numba"]
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # otherwise Accelerate sets the threads again
    torch.ones(2**16).add_(1)  # starts torch's threads, before others take their place


def require_threads(count: int) -> None:
    """Raise RuntimeError unless `count` threads can be started.

    Where libgomp or torch cannot start one, they end the process without an error that could be handled.
    """
    tried = threading.Event()
    threads = [threading.Thread(target=tried.wait) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    finally:
        tried.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def threads_set_by_user() -> bool:
    """Whether the user set OMP_NUM_THREADS. Launchers set it too (to 1, or to all cores of the host).

    The launcher is the parent process; /proc shows the environment that it was started with.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return True  # no launcher
    try:
        parent = Path(f"/proc/{os.getppid()}")
        return (
            b"OMP_NUM_THREADS=" in (parent / "environ").read_bytes()
            or b"num_cpu_threads_per_process" in (parent / "cmdline").read_bytes()
        )
    except OSError:
        return os.environ["OMP_NUM_THREADS"] != "1"


def warn_if_alone() -> None:
    """Warn if the user asked for several ranks but this process is the only one of its launch."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        print(
            "warning: accelerate launch was to start several processes but started one: distributed_type "
            "MULTI_CPU needs mpirun. Use accelerate_configs/cpu_multi.yaml, which does not.",
            file=sys.stderr,
        )
    if (tasks := system.read_int("SLURM_STEP_NUM_TASKS", 1)) > 1:
        print(
            f"warning: srun started {tasks} independent processes. To start them as the ranks of one launch, "
            "see accelerate_configs/slurm.sbatch.",
            file=sys.stderr,
        )


def end_with_launcher() -> None:
    """Let the kernel send SIGTERM, on which a run is saved, to this process when its parent ends.

    `accelerate launch` passes no signal on to a single process, which would train on unnoticed.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


# End


def run_program(program: Callable[[], None], *, resumes: bool = False) -> int:
    """Call `program` and return the exit status: 0, or 2 after printing an error that users can fix.

    Any other error is raised, and ends the process with status 1. A stop signal ends the process at once:
    with status 0 if the same command `resumes` the work, else with 128 plus its number as in a shell.
    """
    setup_streams()
    raise_stop_signals()
    try:
        program()
        status, error_to_print = 0, None
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped during set-up ({stopped})" if resumes else f"stopped ({stopped})")
        hard_exit(0 if resumes else 128 + signal.Signals[str(stopped)])
    except Exception as error:
        status, error_to_print = 2, explain_error(error)
        if error_to_print is None:
            if dist.is_initialized():
                traceback.print_exc()
                hard_exit(1)
            raise
    ignore_stop_signals()
    if error_to_print is not None:
        print_error(error_to_print)
        if dist.is_initialized() and not getattr(error_to_print, "on_all_ranks", False):
            hard_exit(status)
    return status


def explain_error(error: Exception) -> Exception | None:
    """An error that users can fix, with advice if it is one of torch; None for any other error."""
    if isinstance(error, UserError | OSError):
        return error
    text = str(error)
    if "can't start new thread" in text:
        return UserError(
            f"cannot start another thread; limits here: {system.thread_limits()}\n"
            "Raise the limit on processes and threads, or set OMP_NUM_THREADS to fewer threads."
        )
    if dist.is_initialized() and any(words in text for words in CONNECTION_LOST):
        return UserError("another rank ended; see its error")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return UserError(
            f"out of memory: {text.splitlines()[0] if text else 'malloc failed'}\n"
            "Set data_params.cache to disk. In a new run you may also reduce train_params.batch_size or "
            "model_params.layer_param, or raise train_params.gradient_accumulation_steps."
        )
    if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
        return UserError(
            f"the network cannot be compiled: {text.splitlines()[0]}\n"
            "Set train_params.compile to auto or false, or install what is missing."
        )
    return None


def print_error(error: Exception) -> None:
    """Print `error` on standard error. An error that all ranks raise alike is printed by rank 0 alone."""
    if os.environ.get("RANK", "0") == "0" or not getattr(error, "on_all_ranks", False):
        # A single write, so that the lines of several ranks do not mix.
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()


def hard_exit(status: int) -> NoReturn:
    """End the process at once. A normal exit would wait in NCCL for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def deadline(seconds: float, error: UserError) -> Iterator[None]:
    """End the process with `error` and status 2 if the body takes longer than `seconds`, wherever it hangs.

    Gloo and NCCL have no time limit while they connect.
    """

    def end() -> None:
        print_error(error)
        hard_exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def error_summary(error: Exception) -> str:
    """The first line of an error's text, and the last one if it differs.

    Errors of torch continue with a C++ stack; those of NCCL end with the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if lines[-1] == lines[0] else f"{lines[0]} ... {lines[-1]}"
