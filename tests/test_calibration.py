"""Temperature and threshold, on simulated logits whose true probabilities are known."""

import sys

import numpy as np
import pytest
import torch

import models
from models.calibration import Calibration, fit_calibration


def simulate(count: int, temperature: float, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are off by a factor and an offset, with labels drawn from the true probabilities."""
    generator = np.random.default_rng(0)
    log_odds = generator.normal(0.5, 1, count)
    labels = generator.random(count) < 1 / (1 + np.exp(-log_odds))
    return temperature * log_odds + threshold, labels.astype(int)


@pytest.mark.parametrize(("temperature", "threshold"), [(2.5, 0.8), (0.1, -3.0), (1e-4, 5e-3), (1.0, 0.0)])
def test_known_temperature_and_threshold_are_recovered(temperature: float, threshold: float) -> None:
    calibration = fit_calibration(*simulate(100_000, temperature, threshold))
    assert calibration is not None
    assert calibration.temperature == pytest.approx(temperature, rel=0.04)  # 4 standard errors
    assert calibration.threshold == pytest.approx(threshold, abs=0.03 * temperature)


def test_probabilities_are_the_frequencies_of_general_relativity() -> None:
    logits, labels = simulate(100_000, 2.5, 0.8)
    calibration = fit_calibration(logits, labels)
    assert calibration is not None
    probability = calibration.probability(torch.from_numpy(logits)).numpy()
    edges = np.quantile(probability, np.linspace(0, 1, 11)[1:-1])
    bins = np.digitize(probability, edges)
    for i in range(10):
        assert labels[bins == i].mean() == pytest.approx(probability[bins == i].mean(), abs=0.02)


def test_the_probability_is_a_half_at_the_threshold_and_rises() -> None:
    probability = Calibration(temperature=2.0, threshold=0.3).probability(torch.tensor([-1.7, 0.3, 2.3]))
    torch.testing.assert_close(probability, torch.sigmoid(torch.tensor([-1.0, 0.0, 1.0])))


def test_logits_that_rank_labels_the_wrong_way_give_no_calibration() -> None:
    logits, labels = simulate(1000, 1.0, 0.0)
    assert fit_calibration(-logits, labels) is None
    assert fit_calibration(np.ones(1000), labels) is None


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(models.ModelError, match="scikit-learn"):
        fit_calibration([0.0, 1.0], [0, 1])
