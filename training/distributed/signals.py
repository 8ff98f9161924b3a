"""Signals that stop a program: at once while there is nothing to save, else after the current step."""

from __future__ import annotations

import system

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,  # SGE and submitit send it before SIGKILL
    signal.SIGXCPU,  # the limit of CPU time
)


class Stopped(BaseException):
    """A signal, whose name this is, ends the program now. It is no Exception that could be handled as one."""


def handle_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Call `handler` for every stop signal. SIGHUP stays ignored if it was ignored before (`nohup`)."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def raise_stop_signals() -> None:
    """From now on the first stop signal raises Stopped; later ones are ignored, but a second SIGINT kills."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise Stopped(signal.Signals(number).name)

    handle_stop_signals(stop)


def ignore_stop_signals() -> None:
    """Ignore stop signals from now on, but for SIGINT: the program has done its work and is about to end.

    A scheduler would take a program that such a signal ends for one that failed, and start it again.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


def ignore_launcher_sigterm() -> None:
    """Ignore SIGTERM from now on, because all ranks are about to end by themselves.

    When the first rank has ended, torchrun and accelerate send SIGTERM to the others. Their exit status would
    be lost.
    """
    if system.world_size() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StopSignals:
    """A context in which a stop signal requests a graceful stop, as a time limit does.

    A second SIGINT ends the process at once. When the context ends, signals are ignored: the program is about
    to end, and another signal must not change its exit status.
    """

    def __init__(self, minutes: float | None = None) -> None:
        """The time limit starts now."""
        self._signal: str | None = None
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def reason(self) -> str | None:
        """Why this rank stops: the name of a signal, or max_minutes; None if it was not asked to."""
        if self._signal is None and self._end is not None and time.monotonic() > self._end:
            return "max_minutes"
        return self._signal

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self.reason is not None

    def __enter__(self) -> StopSignals:
        handle_stop_signals(self._received)
        return self

    def __exit__(self, *error: object) -> None:
        ignore_stop_signals()

    def _received(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            # The kernel handles the next SIGINT, even while Python waits inside a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
