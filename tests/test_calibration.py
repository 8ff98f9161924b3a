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


def test_probabilities_are_the_frequencies_of_general_relativity() -> None:
    logits, labels = simulate(100_000, 2.5, 0.8)
    calibration = fit_calibration(logits, labels)
    assert calibration is not None
    order = np.argsort(logits)
    probability = calibration.probability(logits).numpy()
    for part in np.array_split(order, 10):
        assert labels[part].mean() == pytest.approx(probability[part].mean(), abs=0.02)
    half = calibration.probability(torch.tensor(calibration.threshold))
    torch.testing.assert_close(half, torch.tensor(0.5))


def test_logits_that_rank_labels_the_wrong_way_give_no_calibration() -> None:
    logits, labels = simulate(1000, 1.0, 0.0)
    assert fit_calibration(-logits, labels) is None
    assert fit_calibration(np.ones(1000), labels) is None
    calibration = fit_calibration(logits, labels, [[1.0, 0.0], [0.9, 0.1]])
    assert calibration is not None
    assert calibration.cubes is None


DIFFERENCE, SCATTER, NOISE, SLICES = 1.0, 0.25, 3.0, 192


def simulate_cubes(seeds: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits and labels of slices (seeds * 2 * SLICES,), and mean logits of cubes (seeds, 2), Newton first.

    Cubes of the two gravities are normal about +-DIFFERENCE / 2, so their log odds are linear in the mean.
    """
    means = DIFFERENCE * (np.array([0, 1]) - 0.5) + generator.normal(0, SCATTER, (seeds, 2))
    noise = generator.normal(0, NOISE, (seeds, 2, SLICES))
    noise -= noise.mean(axis=2, keepdims=True)
    return (means[..., None] + noise).ravel(), np.tile([0, 1], seeds).repeat(SLICES), means


def log_loss(calibration: Calibration, means: np.ndarray) -> float:
    """Mean log loss of cubes (seeds, 2), in nats."""
    probability = calibration.probability(torch.from_numpy(means)).numpy()
    return float(-np.log(np.where([False, True], probability, 1 - probability)).mean())


def test_many_cubes_give_their_true_temperature_and_threshold() -> None:
    means = simulate_cubes(30_000, np.random.default_rng(0))[2] + 0.3
    calibration = fit_calibration([0.0, 1.0, 0.5, 0.4], [0, 1, 0, 1], means)
    assert calibration is not None
    assert calibration.cubes is not None
    assert calibration.cubes.temperature == pytest.approx(SCATTER**2 / DIFFERENCE, rel=0.05)
    assert calibration.cubes.threshold == pytest.approx(0.3, abs=0.01)


def test_few_separable_cubes_give_finite_probabilities_better_than_those_of_slices() -> None:
    generator = np.random.default_rng(0)
    unseen = simulate_cubes(2000, generator)[2]
    losses = []
    for _ in range(40):
        calibration = fit_calibration(*simulate_cubes(4, generator))
        assert calibration is not None
        assert calibration.cubes is not None
        losses.append([log_loss(calibration.cubes, unseen), log_loss(calibration, unseen)])
    few, slices = np.array(losses).T
    assert few.max() < 0.4  # none is certain and wrong
    assert slices.min() > 0.6  # nearly ln 2: knows nothing
    truth = log_loss(Calibration(SCATTER**2 / DIFFERENCE, 0.0), unseen)
    assert truth < few.mean() < 0.25


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
