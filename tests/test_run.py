"""Where a run stands: schedules, tests that are due, early stopping, going on."""

import math

import pytest

from run import TrainState


def rates(progress: TrainState, steps: int, epochs: int, schedule: str, warmup: float) -> list[float]:
    progress.extend(epochs)
    found = []
    for _ in range(epochs):
        for _ in range(steps):
            found.append(progress.learning_rate(1.0, schedule, warmup, steps))
            progress.end_step()
        progress.end_epoch(test_every=1)
    return found


def test_a_constant_rate_is_constant() -> None:
    assert rates(TrainState(0, 1), 3, 2, "none", 0) == [1.0] * 6


def test_warm_up_rises_linearly_and_reaches_the_rate() -> None:
    assert rates(TrainState(0, 1), 4, 2, "none", 1.0) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_warm_up_never_passes_the_rate() -> None:
    assert rates(TrainState(0, 1), 3, 1, "none", 0.5) == pytest.approx([2 / 3, 1.0, 1.0])
    assert max(rates(TrainState(0, 1), 7, 2, "cosine", 0.01)) == 1.0


def test_a_cosine_falls_over_the_epochs_asked_for() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    progress = TrainState(0, 1)
    assert rates(progress, 3, 2, "cosine", 0) == pytest.approx(expected)
    assert rates(progress, 3, 2, "cosine", 0) == pytest.approx(expected), "a continuation has its own"


def test_the_last_epoch_is_always_tested() -> None:
    progress, tested = TrainState(0, 1), []
    progress.extend(5)
    for _ in range(5):
        progress.end_epoch(test_every=2)
        tested.append(progress.evaluation_pending)
        assert not (progress.evaluation_pending and progress.finished)
        if progress.evaluation_pending:
            progress.end_evaluation(1.0, None)
    assert tested == [False, True, False, True, True]
    assert progress.finished


def test_early_stopping_counts_tests_without_a_better_loss() -> None:
    progress, finished = TrainState(0, 1), []
    progress.extend(100)
    for loss in [1.0, 0.5, 0.6, 0.5]:
        progress.end_epoch(test_every=1)
        progress.end_evaluation(loss, patience=2)
        finished.append(progress.finished)
    assert finished == [False, False, False, True]
    assert progress.best_loss == 0.5
    progress.extend(3)
    assert not progress.finished
    assert progress.target_epoch == 7
