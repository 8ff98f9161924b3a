"""Metrics against scikit-learn; predictions ordered by sample id; divergence is reported by step and id."""

from system import UserError

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from training import metrics


def predictions(logits: np.ndarray, labels: np.ndarray, seeds: np.ndarray) -> metrics.Predictions:
    zero = np.zeros(len(logits), np.int64)
    return metrics.Predictions(np.arange(len(logits)), seeds, labels, zero, zero, logits)


def random_predictions(seeds: int = 4, slices: int = 50) -> metrics.Predictions:
    labels = np.tile(np.repeat([0, 1], slices), seeds)
    logits = np.random.default_rng(1).normal(0.5 * labels, 1.0).round(2)  # rounded, so that there are ties
    return predictions(logits, labels, np.repeat(np.arange(seeds), 2 * slices))


def test_metrics_agree_with_scikit_learn() -> None:
    from sklearn import metrics as sk

    p = random_predictions()
    predicted, values = p.logit > 0, metrics.compute(p)
    tn, fp, fn, tp = sk.confusion_matrix(p.label, predicted).ravel().tolist()
    assert (values["tp"], values["fp"], values["tn"], values["fn"]) == (tp, fp, tn, fn)
    assert values["slices"] == tp + fp + tn + fn
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(p.label, predicted))
    assert values["precision"] == pytest.approx(sk.precision_score(p.label, predicted))
    assert values["recall"] == values["tpr"] == pytest.approx(sk.recall_score(p.label, predicted))
    assert values["fpr"] == pytest.approx(1 - sk.recall_score(p.label, predicted, pos_label=0))
    assert values["f1"] == pytest.approx(sk.f1_score(p.label, predicted))
    assert values["auc"] == pytest.approx(sk.roc_auc_score(p.label, p.logit))
    assert values["loss"] == pytest.approx(sk.log_loss(p.label, p.probability))


def test_label_smoothing_enters_the_loss() -> None:
    p = predictions(np.array([2.0]), np.array([1]), np.array([0]))
    expected = 0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2))
    assert metrics.loss(p, label_smoothing=0.2) == pytest.approx(expected)


def test_cubes_are_classified_by_their_mean_logit() -> None:
    labels = np.array([0, 0, 1, 1] * 3)
    seeds = np.repeat([7, 8, 9], 4)
    logits = np.array([-5.0, 1, 3, -1, 2.0, 2, 3, 5, 4.0, 4, 1, 1])
    values = metrics.compute(predictions(logits, labels, seeds), simulations=True)
    # means (Newton, GR): seed 7: -2, 1; seed 8: 2, 4; seed 9: 4, 1
    assert values["pair_accuracy"] == pytest.approx(2 / 3)
    assert values["cube_accuracy"] == pytest.approx(4 / 6)


def test_undefined_metrics_have_a_value() -> None:
    values = metrics.compute(
        predictions(np.array([-1.0, -2.0]), np.zeros(2, np.int64), np.zeros(2, np.int64))
    )
    assert (values["precision"], values["recall"], values["f1"], values["auc"]) == (0, 0, 0, 0.5)


def buffer(batches: list[tuple[list[int], list[float], list[int]]]) -> metrics.PredictionBuffer:
    filled = metrics.PredictionBuffer(Accelerator())
    for ids, logits, mask in batches:
        filled.add(torch.tensor(ids), torch.tensor(logits), torch.tensor(mask))
    return filled


def test_predictions_are_ordered_by_id_without_padding() -> None:
    ids, logits = buffer([([5, 3], [0.5, 0.3], [1, 1]), ([9, 3], [0.9, 7.0], [1, 0])]).gather()
    assert ids.tolist() == [3, 5, 9]
    assert logits.tolist() == pytest.approx([0.3, 0.5, 0.9])


def test_a_restored_buffer_continues_where_it_was_gathered() -> None:
    first, second = ([5, 3], [0.5, 0.3], [1, 1]), ([9, 1], [0.9, 0.1], [1, 1])
    uninterrupted = buffer([first, second]).gather()
    resumed = metrics.PredictionBuffer(Accelerator())
    resumed.restore(*buffer([first]).gather())
    resumed.add(*(torch.tensor(column) for column in second))
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted, resumed.gather(), strict=True))


def test_an_empty_buffer_gathers_nothing() -> None:
    ids, logits = buffer([]).gather()
    assert ids.shape == logits.shape == (0,)


def test_a_kept_logit_does_not_change_with_its_tensor() -> None:
    kept, logits = metrics.PredictionBuffer(Accelerator()), torch.zeros(1)
    kept.add(torch.tensor([0]), logits, torch.ones(1))
    logits.fill_(9)
    assert kept.gather()[1].tolist() == [0]


def test_the_first_step_that_is_not_finite_is_named_with_its_slices() -> None:
    kept = buffer([([1, 2], [0.0, 0.0], [1, 1])])
    kept.require_finite(step=11)
    for ids, logits in [([3, 4], [0.0, 1.0]), ([5, 6], [math.inf, 1.0]), ([7, 8], [math.nan, math.nan])]:
        kept.add(torch.tensor(ids), torch.tensor(logits), torch.ones(2))
    with pytest.raises(UserError, match=r"step 13: .* sample ids \[5\]"):
        kept.require_finite(step=14)


BATCHES = [([1.0, -2.0], [1.0, 1.0], [1.0, 1.0]), ([0.5, math.inf], [0.0, 0.0], [1.0, 0.0])]


def running(
    batches: list[tuple[list[float], ...]], sums: Sequence[float] = (0, 0, 0)
) -> metrics.RunningMetrics:
    filled = metrics.RunningMetrics(Accelerator(), sums)
    for batch in batches:
        filled.add(*(torch.tensor(column) for column in batch))
    return filled


def test_running_metrics_are_means_since_the_last_reading() -> None:
    values = running(BATCHES)
    losses = [math.log1p(math.exp(-1)), math.log1p(math.exp(2)), math.log1p(math.exp(0.5))]
    assert values.read() == {"loss": pytest.approx(sum(losses) / 3), "accuracy": pytest.approx(1 / 3)}
    values.add(torch.tensor([3.0, 3.0]), torch.ones(2), torch.ones(2))
    assert values.read() == {"loss": pytest.approx(math.log1p(math.exp(-3))), "accuracy": 1.0}


def test_running_metrics_continue_from_their_sums() -> None:
    sums = running(BATCHES[:1]).sums()
    assert json.loads(json.dumps(sums)) == sums
    assert running(BATCHES[1:], sums).read() == running(BATCHES).read()
