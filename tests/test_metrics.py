"""Metrics: against independent definitions, in any order, and what is not finite is named."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import metrics


def outcome(rng: np.random.Generator, seeds: int = 4, slices: int = 50, **options: float) -> metrics.Outcome:
    labels = np.tile(np.repeat([0, 1], slices), seeds)
    logits = rng.normal(0.5 * labels, 1.0).round(2)  # rounded, so that there are ties
    return metrics.Outcome(logits, labels, np.repeat(np.arange(seeds), 2 * slices), **options)


def test_slice_metrics_against_torchmetrics() -> None:
    from torchmetrics.functional import classification as reference

    o = outcome(np.random.default_rng(1))
    logits, labels = torch.from_numpy(o.logits), torch.from_numpy(o.labels)
    said = (logits > 0).long()
    numbers = o.numbers()
    tp, fp, tn, fn, _ = reference.binary_stat_scores(said, labels).tolist()
    assert (numbers["tp"], numbers["fp"], numbers["tn"], numbers["fn"]) == (tp, fp, tn, fn)
    assert numbers["slices"] == tp + fp + tn + fn
    for name, function in {
        "accuracy": reference.binary_accuracy,
        "precision": reference.binary_precision,
        "recall": reference.binary_recall,
        "f1": reference.binary_f1_score,
    }.items():
        assert numbers[name] == pytest.approx(float(function(said, labels)), abs=1e-6), name
    assert numbers["auc"] == pytest.approx(float(reference.binary_auroc(logits.sigmoid(), labels)), abs=1e-6)
    assert numbers["tpr"] == tp / (tp + fn)
    assert numbers["fpr"] == fp / (fp + tn)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double())
    assert numbers["loss"] == pytest.approx(float(loss), rel=1e-12)


def test_label_smoothing_enters_the_loss() -> None:
    o = metrics.Outcome(np.array([2.0]), np.array([1]), np.array([0]), label_smoothing=0.2)
    assert metrics.loss(o) == pytest.approx(0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2)))


def test_simulations_are_judged_by_their_mean_logit() -> None:
    labels = np.array([0, 0, 1, 1] * 3)
    seeds = np.repeat([7, 8, 9], 4)
    logits = np.array([-5.0, 1, 3, -1, 2.0, 2, 3, 5, 4.0, 4, 1, 1])
    numbers = metrics.Outcome(logits, labels, seeds).numbers(simulations=True)
    # means (Newton, GR): seed 7: -2, 1; seed 8: 2, 4; seed 9: 4, 1
    assert numbers["pair_accuracy"] == pytest.approx(2 / 3)
    assert numbers["cube_accuracy"] == pytest.approx(4 / 6)


def test_numbers_that_have_no_meaning_are_numbers_still() -> None:
    numbers = metrics.Outcome(np.array([-1.0, -2.0]), np.array([0, 0]), np.array([0, 0])).numbers()
    assert (numbers["precision"], numbers["recall"], numbers["f1"], numbers["auc"]) == (0, 0, 0, 0.5)


def predictions(batches: list[tuple[list[int], list[float], list[int]]]) -> metrics.Predictions:
    said = metrics.Predictions(Accelerator())
    for ids, logits, weights in batches:
        said.add(torch.tensor(ids), torch.tensor(logits), torch.tensor(weights))
    return said


def test_what_was_said_is_ordered_by_id_without_the_filling() -> None:
    said = predictions([([5, 3], [0.5, 0.3], [1, 1]), ([9, 3], [0.9, 7.0], [1, 0])])
    ids, logits = said.gather()
    assert ids.tolist() == [3, 5, 9]
    assert logits.tolist() == pytest.approx([0.3, 0.5, 0.9])


def test_what_was_said_goes_on_after_a_restore() -> None:
    first, second = ([5, 3], [0.5, 0.3], [1, 1]), ([9, 1], [0.9, 0.1], [1, 1])
    whole = predictions([first, second]).gather()
    continued = predictions([second])
    continued.restore(*predictions([first]).gather())
    assert all(torch.equal(a, b) for a, b in zip(whole, continued.gather(), strict=True))


def test_nothing_said_is_nothing() -> None:
    ids, logits = predictions([]).gather()
    assert ids.shape == logits.shape == (0,)


def test_a_kept_logit_does_not_change_with_its_tensor() -> None:
    said, buffer = metrics.Predictions(Accelerator()), torch.zeros(1)
    said.add(torch.tensor([0]), buffer, torch.ones(1))
    buffer.fill_(9)
    assert said.gather()[1].tolist() == [0]


def test_the_first_step_that_is_not_finite_is_named_with_its_slices() -> None:
    said = predictions([([1, 2], [0.0, 0.0], [1, 1])])
    said.require_finite(step=11)
    for ids, logits in [([3, 4], [0.0, 1.0]), ([5, 6], [math.inf, 1.0]), ([7, 8], [math.nan, math.nan])]:
        said.add(torch.tensor(ids), torch.tensor(logits), torch.ones(2))
    with pytest.raises(metrics.DivergenceError, match=r"step 13: .* sample ids \[5\]"):
        said.require_finite(step=14)
