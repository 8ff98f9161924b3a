"""Where a run stands: what is done, what was asked for, and what follows from the two."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """Counters of a run, as every checkpoint holds them."""

    mean: float
    std: float
    """What the cubes are standardised by."""
    epoch: int = 0
    """Epochs trained to their end."""
    step: int = 0
    """Optimizer steps taken."""
    step_in_epoch: int = 0
    seconds: float = 0.0
    """Spent on the running epoch."""
    awaiting_test: bool = False
    """The last epoch ended, its test has not."""
    first_epoch: int = 0
    target_epoch: int = 0
    """What was asked for last, and so the learning-rate schedule, runs from first_epoch to target_epoch."""
    test_loss: float | None = None
    """Of the last test."""
    best_loss: float | None = None
    tests_without_better: int = 0
    ended_early: bool = False

    @property
    def finished(self) -> bool:
        """All that was asked for is done."""
        return not self.awaiting_test and (self.epoch >= self.target_epoch or self.ended_early)

    @property
    def where(self) -> dict[str, int]:
        """What a line of the log begins with."""
        return {"epoch": self.epoch, "step": self.step}

    def ask_for(self, epochs: int) -> None:
        """Train `epochs` more."""
        self.first_epoch, self.target_epoch = self.epoch, self.epoch + epochs
        self.tests_without_better, self.ended_early = 0, False

    def learning_rate(self, lr: float, schedule: str, warmup_epochs: float, steps: int) -> float:
        """The learning rate of the next step, with `steps` steps to an epoch.

        A linear warm-up from zero, then constant or half a cosine down to zero (Loshchilov & Hutter 2017,
        arXiv:1608.03983). It depends on steps alone, so it is the same on any number of processes.
        """
        epochs = self.epoch - self.first_epoch + self.step_in_epoch / steps
        if epochs < warmup_epochs:
            return lr * min(1.0, (epochs + 1 / steps) / warmup_epochs)
        if schedule == "none":
            return lr
        whole = self.target_epoch - self.first_epoch - warmup_epochs
        return lr * 0.5 * (1 + math.cos(math.pi * (epochs - warmup_epochs) / whole))

    def end_step(self) -> None:
        """One more optimizer step is done."""
        self.step += 1
        self.step_in_epoch += 1

    def end_epoch(self, test_every: int) -> None:
        """The running epoch is done; the last one, and every `test_every`-th, is to be tested."""
        self.epoch += 1
        self.step_in_epoch, self.seconds = 0, 0.0
        self.awaiting_test = self.epoch == self.target_epoch or self.epoch % test_every == 0
        self.test_loss = None

    def end_test(self, loss: float, patience: int | None) -> None:
        """The last epoch's test is done; training ends after `patience` tests without a better loss."""
        self.awaiting_test = False
        self.test_loss = loss
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.tests_without_better = loss, 0
        else:
            self.tests_without_better += 1
        self.ended_early = patience is not None and self.tests_without_better >= patience
