"""Temperature and threshold, on simulated logits whose true probabilities are known."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

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
    log_odds = torch.tensor([0.0, 1.5])
    logits = calibration.threshold + calibration.temperature * log_odds
    torch.testing.assert_close(calibration.probability(logits), log_odds.sigmoid())


def test_logits_that_rank_labels_the_wrong_way_give_no_calibration() -> None:
    logits, labels = simulate(1000, 1.0, 0.0)
    assert fit_calibration(-logits, labels) is None
    assert fit_calibration(np.ones(1000), labels) is None
    calibration = fit_calibration(logits, labels, [[1.0, 0.0], [0.9, 0.1]])
    assert calibration is not None
    assert calibration.cubes is None


def test_the_targets_are_platts() -> None:
    """Two cubes are two points, through which the logistic curve passes."""
    for seeds, means, share in ((1, [-3.0, 5.0], 2 / 3), (4, [-1.0, 1.0], 5 / 6)):
        calibration = fit_calibration([-2.0, 1.0, -1.0, 2.0], [0, 0, 1, 1], [means] * seeds)
        assert calibration is not None
        assert calibration.cubes is not None
        probability = calibration.cubes.probability(torch.tensor(means))
        torch.testing.assert_close(probability, torch.tensor([1 - share, share]), rtol=1e-4, atol=0)


def test_axes_have_their_temperature_and_threshold() -> None:
    (first, labels), (third, _) = simulate(100_000, 2.5, 0.8), simulate(100_000, 1.0, -3.0)
    axes = np.repeat([0, 2], 100_000)
    logits = np.concatenate([first, third])
    calibration = fit_calibration(logits, np.tile(labels, 2), axes=axes)
    pooled = fit_calibration(logits, np.tile(labels, 2))
    assert calibration is not None
    assert pooled is not None
    assert calibration.axes == (fit_calibration(first, labels), None, fit_calibration(third, labels))
    torch.testing.assert_close(calibration.probability(logits), pooled.probability(logits))
    expected = torch.from_numpy(np.concatenate([(first - 0.8) / 2.5, third + 3]))
    torch.testing.assert_close(calibration.log_odds(logits, axes), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(calibration.log_odds(logits, 1), pooled.log_odds(logits))


def test_a_calibration_survives_a_file_and_older_files_have_neither_cubes_nor_axes() -> None:
    calibration = Calibration(2.0, 0.5, Calibration(0.1, 0.4), (Calibration(1.0, 2.0), None, Calibration()))
    assert Calibration.from_dict(json.loads(json.dumps(asdict(calibration)))) == calibration
    assert Calibration.from_dict({"temperature": 2.0, "threshold": 0.5}) == Calibration(2.0, 0.5)
    assert Calibration.from_dict(None) is None
