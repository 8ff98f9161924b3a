"""What a contestant is told and what is measured of it: time and memory."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS_AT_LEAST = 5  # before the watch starts, and again before it stops


@dataclass(frozen=True)
class Settings:
    """What the contestants of a round have in common."""

    datafile: str
    scratch: str  # for runs and logs
    device: str = "cpu"  # or cuda
    architecture: str = "RACOON"
    layer_param: int = 16
    batch: int = 64
    precision: str = "fp32"  # or bf16
    size: int = 256
    seeds: int = 6  # seeds 0 to seeds - 1 train
    test_seeds: int = 1
    epochs: int = 0  # of this project: 0 to end with the watch, otherwise the run goes on to its end
    warmup: float = 2.0  # seconds before the watch starts
    seconds: float = 4.0  # that the watch runs, at least
    workers: int = 0  # of the peers' DataLoader

    @property
    def epoch_steps(self) -> int:
        """Steps in an epoch."""
        return math.ceil(self.seeds * 6 * self.size / self.batch)


class Enough(Exception):
    """The watch has stopped."""


@dataclass
class Watch:
    """Times training steps, once some have warmed up the process."""

    settings: Settings
    every: int = 1
    """The watch stops after a multiple of so many steps, unless that takes twice as long as it should."""
    last: int | None = None
    """The step that it stops after instead; the contestant then goes on."""
    began: float = field(default_factory=time.perf_counter)
    done: int = 0
    first: float = 0.0
    started: float = 0.0
    stopped: float = 0.0
    steps: int = 0

    def step(self) -> None:
        """One step is done. Raises Enough after the last one that is timed."""
        self.done += 1
        if self.done == 1:
            self.first = self._now()
        elif not self.started:
            warm = time.perf_counter() - self.first > self.settings.warmup
            if self.done >= STEPS_AT_LEAST and (warm or 4 * self.done > (self.last or math.inf)):
                self.started = self._now()
        elif not self.stopped:
            self.steps += 1
            if self.done == self.last:
                self.stopped = self._now()
            elif self.last is None and self._enough():
                self.stopped = self._now()
                raise Enough

    def _enough(self) -> bool:
        elapsed = time.perf_counter() - self.started
        if self.steps < STEPS_AT_LEAST or elapsed < self.settings.seconds:
            return False
        return self.steps % self.every == 0 or elapsed > 2 * self.settings.seconds

    def _now(self) -> float:
        if self.settings.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def result(self) -> dict[str, Any]:
        """What was timed; `first_step`: seconds from the making of the watch to the end of the first step."""
        seconds = self.stopped - self.started
        return {
            "steps": self.steps,
            "seconds": round(seconds, 4),
            "slices_per_second": round(self.steps * self.settings.batch / seconds, 2),
            "first_step": round(self.first - self.began, 3),
        }


class AnonymousMemory(threading.Thread):
    """The largest anonymous memory (bytes) of this process, looked at every few milliseconds.

    The peak that Linux keeps (VmHWM) also counts pages of files, which it may take back.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Look until the process ends."""
        while Path("/proc/self/status").exists():
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.02)
