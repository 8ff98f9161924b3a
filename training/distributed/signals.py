"""Signals that request a graceful stop, and flags that all ranks share."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist


class AnyRankFlags:
    """Whether any rank has set a flag.

    With one rank the answer is immediate. With several ranks it comes one call later, the same on all: each
    call starts an all-reduce in host memory and returns the result of the previous one, which has long
    arrived. So neither device nor host waits.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank set it. Every rank must call this equally often."""
        if not dist.is_initialized():
            return flags
        previous = self._pending
        values = torch.tensor(flags, dtype=torch.int64)
        self._pending = dist.all_reduce(values, async_op=True), values
        if previous is None:
            return (False,) * len(flags)
        work, values = previous
        work.wait()
        return tuple(bool(value) for value in values.tolist())


def ignore_stop_signals() -> None:
    """Ignore SIGTERM, SIGUSR1 and SIGHUP from now on: the program has done its work and is about to end.

    A scheduler would take a program that such a signal ends for one that failed, and start it again.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """A context in which SIGTERM, SIGINT, SIGUSR1, SIGHUP or a time limit in minutes request a graceful stop.

    A second SIGINT ends the process at once. SIGHUP stays ignored if it was ignored before (`nohup`). After a
    request, the other signals are ignored also when the context ends: the program is about to end, and
    another signal must not change its exit status.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, minutes: float | None = None) -> None:
        self.reason: str | None = None
        """Why this rank stops: the name of a signal, or max_minutes."""
        self._timer: threading.Timer | None = None
        if minutes is not None:
            self._timer = threading.Timer(60 * minutes, self._request, ["max_minutes"])
            self._timer.daemon = True
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self.reason is not None

    def __enter__(self) -> StopSignals:
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._previous = {
            number: signal.signal(number, self._received) for number in self.SIGNALS if number not in ignored
        }
        if self._timer is not None:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous.items():
            ends = self.requested and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ends else handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            # The kernel handles the next SIGINT, even while Python waits inside a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _request(self, reason: str) -> None:
        self.reason = self.reason or reason
