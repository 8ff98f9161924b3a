"""Child processes of the programs that start many runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import UserError

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def parse_launcher(text: str) -> list[str]:
    """The words of --launcher. Raises UserError unless the first is a program."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--launcher: found {text!r}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"--launcher: found {text!r}, but no such program is in PATH")
    return words


def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a program of this project without its output; it gets SIGTERM if this process is killed."""
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        preexec_fn=_end_with_parent,
        env={**os.environ, **(environment or {})},
    )


def _end_with_parent() -> None:
    """Two trainers must not share a run: the child stops when its parent is killed (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Collect SIGINT in a list; the caller stops its children, then raises KeyboardInterrupt.

    An exception raised inside a callback of a database or an import could be lost.
    """
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, handler)
