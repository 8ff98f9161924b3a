"""Standard output and standard error that may close while a program runs."""

from __future__ import annotations

import contextlib
import io
import os
import sys


class LossyFile(io.FileIO):
    """A file descriptor that discards what it cannot write: the reader of a pipe or a terminal has gone."""

    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        """Write `data`, or discard it."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def tolerate_closed_streams() -> None:
    """Let the program continue when standard output or standard error is or becomes closed.

    Otherwise a print to a lost terminal or to `| head` raises OSError, and after `>&-` sys.stdout is None.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file that opens gets this descriptor, and with it whatever C code prints.
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # someone captures the output
        if stream is None:  # the descriptor may belong to another file by now
            descriptor = os.open(os.devnull, os.O_WRONLY)
        else:
            with contextlib.suppress(OSError):
                stream.flush()
        replacement = io.TextIOWrapper(
            io.BufferedWriter(LossyFile(descriptor, "w", closefd=False)),  # type: ignore[type-var]
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace",  # a name that the terminal's encoding lacks must not end a run
            line_buffering=getattr(stream, "line_buffering", True),
        )
        setattr(sys, name, replacement)
        setattr(sys, f"__{name}__", replacement)
