"""Errors of a launch, and how a program reports an error and ends."""

from __future__ import annotations

import system
from system import UserError

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist

CONNECTION_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "closed by remote peer",
    "remote process exited",
)


class LaunchError(UserError):
    """The ranks of a launch cannot work together, or a rank cannot work with this set-up."""

    def __init__(self, message: str, *, on_all_ranks: bool = True) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks
        """Whether every rank raises this error with the same message."""


def print_error(error: Exception) -> None:
    """Print `error` on standard error. An error that all ranks raise alike is printed by rank 0 alone."""
    if os.environ.get("RANK", "0") == "0" or not getattr(error, "on_all_ranks", False):
        # A single write, so that the lines of several ranks do not mix.
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()


def error_summary(error: Exception) -> str:
    """The first line of an error's text, and the last one if it differs.

    Errors of torch continue with a C++ stack; those of NCCL end with the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if lines[-1] == lines[0] else f"{lines[0]} ... {lines[-1]}"


def explain_error(error: Exception) -> LaunchError | None:
    """A LaunchError with advice for an error of torch that users can fix; None for any other error."""
    text = str(error)
    if dist.is_initialized() and any(words in text for words in CONNECTION_LOST):
        return LaunchError("another rank ended; see its error", on_all_ranks=False)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return LaunchError(
            f"out of memory: {text.splitlines()[0] if text else 'malloc failed'}\n"
            "Reduce train_params.batch_size or model_params.layer_param, raise "
            "train_params.gradient_accumulation_steps, or set data_params.cache to disk.",
            on_all_ranks=False,
        )
    if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
        return LaunchError(
            f"the network cannot be compiled: {text.splitlines()[0]}\n"
            "Set train_params.compile to auto or false, or install what is missing.",
            on_all_ranks=False,
        )
    return None


def run_program(program: Callable[[], None]) -> int:
    """Call `program` and return the exit status: 0, or 2 after printing an error that users can fix.

    Those are UserError, OSError and whatever `explain_error` explains. Any other error is raised, and ends
    the process with status 1.
    """
    error_to_print: Exception | None
    try:
        program()
        return 0
    except (UserError, OSError) as error:
        error_to_print = error
    except Exception as error:
        error_to_print = explain_error(error) if isinstance(error, RuntimeError | MemoryError) else None
        if error_to_print is None:
            if dist.is_initialized():
                traceback.print_exc()
                hard_exit(1)
            raise
    print_error(error_to_print)
    if dist.is_initialized() and not getattr(error_to_print, "on_all_ranks", False):
        hard_exit(2)
    return 2


def hard_exit(status: int) -> NoReturn:
    """End the process at once. A normal exit would wait in NCCL for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def deadline(seconds: float, error: LaunchError) -> Iterator[None]:
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


def ignore_launcher_sigterm() -> None:
    """Ignore SIGTERM from now on, because all ranks are about to end by themselves.

    When the first rank has ended, torchrun and accelerate send SIGTERM to the others. Their exit status would
    be lost.
    """
    if system.world_size() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
