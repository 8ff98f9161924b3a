"""Training state: learning rate, pending evaluations, early stopping, extending a finished run."""

import math

import pytest
from accelerate import Accelerator

import metrics
from run import TrainState


def new_state() -> TrainState:
    return TrainState(metrics.PredictionBuffer(Accelerator()), mean=0.0, std=1.0)


def rates(state: TrainState, steps: int, epochs: int, schedule: str, warmup: float) -> list[float]:
    state.extend(epochs)
    found = []
    for _ in range(epochs):
        for _ in range(steps):
            found.append(state.learning_rate(1.0, schedule, warmup, steps))
            state.end_step()
        state.end_epoch(test_every=1)
    return found


def test_a_constant_rate_is_constant() -> None:
    assert rates(new_state(), 3, 2, "none", 0) == [1.0] * 6


def test_warm_up_rises_linearly_and_reaches_the_rate() -> None:
    assert rates(new_state(), 4, 2, "none", 1.0) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_warm_up_never_exceeds_the_rate() -> None:
    assert rates(new_state(), 3, 1, "none", 0.5) == pytest.approx([2 / 3, 1.0, 1.0])
    assert max(rates(new_state(), 7, 2, "cosine", 0.01)) == 1.0


def test_a_cosine_falls_to_zero_over_the_epochs() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    state = new_state()
    assert rates(state, 3, 2, "cosine", 0) == pytest.approx(expected)
    assert rates(state, 3, 2, "cosine", 0) == pytest.approx(expected), "an extended run has its own"


def test_the_last_epoch_is_always_evaluated() -> None:
    state, evaluated = new_state(), []
    state.extend(5)
    for _ in range(5):
        state.end_epoch(test_every=2)
        evaluated.append(state.evaluation_pending)
        assert not (state.evaluation_pending and state.finished)
        if state.evaluation_pending:
            state.end_evaluation(1.0, None)
    assert evaluated == [False, True, False, True, True]
    assert state.finished


def test_early_stopping_counts_evaluations_without_improvement() -> None:
    state, finished = new_state(), []
    state.extend(100)
    for loss in [1.0, 0.5, 0.6, 0.5]:
        state.end_epoch(test_every=1)
        state.end_evaluation(loss, patience=2)
        finished.append(state.finished)
    assert finished == [False, False, False, True]
    assert state.best_loss == 0.5
    state.extend(3)
    assert not state.finished
    assert state.target_epoch == 7
