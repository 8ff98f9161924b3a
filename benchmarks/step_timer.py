"""Settings of a runner, and the time and memory that it takes."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIN_STEPS = 5  # before the timer starts, and again before it stops


@dataclass(frozen=True)
class Settings:
    """Settings that all runners of a round share."""

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
    epochs: int = 0  # of this project; 0: end with the timer
    warmup: float = 2.0  # seconds before the timer starts
    seconds: float = 4.0  # minimum time that is measured
    workers: int = 0  # of the peers' DataLoader
    overrides: dict[str, str] = field(default_factory=dict)  # of further keys of this project's experiment

    @property
    def epoch_steps(self) -> int:
        """Steps in an epoch."""
        return math.ceil(self.seeds * 6 * self.size / self.batch)


class StopTiming(Exception):
    """The measurement is complete."""


@dataclass
class StepTimer:
    """Times training steps, once some have warmed up the process."""

    settings: Settings
    every: int = 1
    """Stop after a multiple of this number of steps, unless that takes twice the time."""
    last: int | None = None
    """Stop after this step instead, without raising StopTiming."""
    began: float = field(default_factory=time.perf_counter)
    done: int = 0
    first: float = 0.0
    started: float = 0.0
    stopped: float = 0.0
    steps: int = 0

    def step(self) -> None:
        """Count one step. Raises StopTiming after the last one that is timed."""
        self.done += 1
        if self.done == 1:
            self.first = self._now()
        elif not self.started:
            warm = time.perf_counter() - self.first > self.settings.warmup
            if self.done >= MIN_STEPS and (warm or 4 * self.done > (self.last or math.inf)):
                self.started = self._now()
        elif not self.stopped:
            self.steps += 1
            if self.done == self.last:
                self.stopped = self._now()
            elif self.last is None and self._long_enough():
                self.stopped = self._now()
                raise StopTiming

    def _long_enough(self) -> bool:
        elapsed = time.perf_counter() - self.started
        if self.steps < MIN_STEPS or elapsed < self.settings.seconds:
            return False
        return self.steps % self.every == 0 or elapsed > 2 * self.settings.seconds

    def _now(self) -> float:
        if self.settings.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Steps and seconds; `first_step`: seconds from construction to the end of the first step."""
        seconds = self.stopped - self.started
        return {
            "steps": self.steps,
            "seconds": round(seconds, 4),
            "slices_per_second": round(self.steps * self.settings.batch / seconds, 2),
            "first_step": round(self.first - self.began, 3),
        }


class AnonymousMemory(threading.Thread):
    """Peak anonymous memory (bytes) of this process, sampled every 20 ms.

    The peak that Linux reports (VmHWM) also counts pages of files.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Sample until the process ends."""
        while Path("/proc/self/status").exists():
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.02)
