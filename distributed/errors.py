"""Errors of a launch, and how a program reports them and ends."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist


class LaunchError(ValueError):
    """The processes of a launch cannot work together."""

    def __init__(self, message: str, *, on_all_ranks: bool = True) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks
        """Whether every process raises it, with the same words."""


def print_error(error: Exception) -> None:
    """Print `error` on standard error: once per launch, not once per process, what all raise alike."""
    if os.environ.get("RANK", "0") == "0" or not getattr(error, "on_all_ranks", False):
        # One write, so that the lines of several processes do not mix.
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()


def explain_error(error: Exception) -> LaunchError | None:
    """What the user can do about an error of torch, which is error_to_print in its text alone; None for any other."""
    text = str(error)
    if dist.is_initialized() and any(
        word in text
        for word in (
            *("closed by peer", "reset by peer", "Broken pipe"),
            *("closed by remote peer", "remote process exited"),
        )
    ):
        return LaunchError("another process ended; its message says why", on_all_ranks=False)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return LaunchError(
            f"there is not enough memory: {text.splitlines()[0] if text else 'malloc failed'}\n"
            "allowed: a smaller model_params.layer_param or train_params.batch_size, more "
            "train_params.gradient_accumulation_steps, or data_params.cache disk",
            on_all_ranks=False,
        )
    if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
        return LaunchError(
            f"the network cannot be compiled: {text.splitlines()[0]}\n"
            "allowed: train_params.compile auto or false, or what is missing",
            on_all_ranks=False,
        )
    return None


def run_program(work: Callable[[], None], user_errors: tuple[type[Exception], ...]) -> int:
    """Do `work`. Returns 0, or 2 after telling an error that users can mend: of `user_errors`, or `explain_error`."""
    error_to_print: Exception | None
    try:
        work()
        return 0
    except user_errors as error:
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
    """End at once. At an orderly end NCCL would wait for the others, who wait for this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ignore_launcher_sigterm() -> None:
    """Ignore SIGTERM from now on, because this process ends by itself, and all others with it.

    When the first has ended, torchrun and accelerate send SIGTERM to the rest, whose status would be lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
